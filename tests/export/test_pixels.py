"""The logits of every pixel in every form, against Flax and the tokens that they are of."""

import contextlib
import io
import json
import re

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.checkpoints.decoder import Decoder
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export import __main__, parity
from vit_jax.export.forward import make_forward
from vit_jax.export.parity import load_report
from vit_jax.export.pipeline import Export, Photographs
from vit_jax.export.precisions import PRECISIONS
from vit_jax.export.stages import Resolution
from vit_jax.export.to_tf import can_serialize_graphs

from .conftest import TINY

NAMES = ("sky", "road", "<car>")


@pytest.fixture(scope="module")
def pretrained():
    model, rng = {**TINY, "num_classes": 0}, np.random.default_rng(0)
    images = np.zeros((1, 16, 24, 3), np.float32)
    shapes = jax.eval_shape(models.create_model(model).init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    kernel = rng.normal(size=(32, 3)).astype(np.float32)
    decoder = Decoder({"kernel": kernel, "bias": np.float32([0.1, 0.2, 0.3])}, NAMES)
    rule = Preprocessing("16x24")
    return Pretrained(params, model, rule, None, "softmax", "random", segmentation=decoder)


def test_they_are_a_linear_layer_on_the_grid_enlarged(pretrained):
    images = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
    grid = make_forward(pretrained, outputs="grid").jitted()(images)
    head = pretrained.segmentation.params
    expected = [
        cv2.resize(x, (24, 16), interpolation=cv2.INTER_LINEAR)
        for x in grid @ head["kernel"] + head["bias"]
    ]
    forward = make_forward(pretrained, outputs="pixels")
    np.testing.assert_allclose(forward.jitted()(images), expected, rtol=1e-4, atol=1e-5)
    assert forward.output_name == "pixels"
    assert json.loads(forward.metadata["pixel_classes"]) == list(NAMES)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_stage_is_as_flax(pretrained, converter, precision, tmp_path):
    export = Export(
        tmp_path / "out", precision=PRECISIONS[precision], batch="1:2:3", latency_seconds=0
    )
    export.convert(pretrained, outputs="pixels", converter=converter)
    assert export.failures == []
    rows = load_report(tmp_path / "out")
    made_in = ["SavedModel"] if converter == "jax2tf" and can_serialize_graphs() else []
    names = [row["name"] for row in rows]
    assert names[: len(made_in) + 1] == [*made_in, f"ONNX {precision}"]
    assert rows[-1]["relative_difference"] < (1e-5 if precision == "fp32" else 1e-2)
    assert all(row["max_difference"] > 0 or row["cosine"] == 1 for row in rows)
    deploy = (tmp_path / "out/deploy/README.md").read_text()
    assert "Logits of every pixel, of the classes" in deploy
    assert (tmp_path / "out/classes.txt").read_text() == "sky\nroad\n<car>\n"
    assert (
        "[any, 16, 24, 3]: a score for each class of every pixel"
        in (tmp_path / "out/README.md").read_text()
    )


def test_the_readme_tells_the_class_of_every_pixel(pretrained, converter, tmp_path):
    Export(tmp_path, batch="1:1:1", latency_seconds=0).convert(
        pretrained, stages=["onnx"], outputs="pixels", converter=converter
    )
    pixels = np.random.default_rng(2).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", "PNG")
    text = (tmp_path / "README.md").read_text("utf-8")
    (block, *_) = re.findall(r"(?s)```python\n(.*?)```", text)
    printed = io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(printed):
        exec(block, {})
    prepared = (pixels / 255 - 0.5) / 0.5
    expected = make_forward(pretrained, outputs="pixels").jitted()(prepared[None].astype("f4"))
    found, counts = np.unique(expected.argmax(-1), return_counts=True)
    assert len(found) > 1
    assert printed.getvalue().splitlines() == [
        f"{count / (16 * 24):.2%} {NAMES[i]}" for i, count in zip(found, counts, strict=True)
    ]


@pytest.fixture
def streets(tmp_path):
    """Five images and their masks, in a folder without splits."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "streets" / kind).mkdir(parents=True)
    for index in range(5):
        mask = rng.choice([0, 1, 2, 255], (16, 24)).astype(np.uint8)
        pixels = rng.integers(0, 256, (16, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"streets/images/{index}.png")
        Image.fromarray(mask).save(tmp_path / f"streets/masks/{index}.png")
    (tmp_path / "streets/classes.txt").write_text("\n".join(NAMES))
    return f"folder:{tmp_path}/streets"


def test_a_data_set_of_masks_is_one_of_images_and_pixels(pretrained, streets, tmp_path):
    photographs = Photographs(dataset=streets)
    images, masks = photographs.read(pretrained, 4, "pixels")
    assert images.shape == (4, 16, 24, 3) and masks.shape == (4, 16, 24)
    assert {*np.unique(masks)} == {0, 1, 2, 255}
    assert photographs.read(pretrained, 4, "features")[1] is None
    raw, labels = photographs.read_raw(pretrained, 4, "pixels")
    assert len(raw) == 4 and labels is None
    (tmp_path / "streets/classes.txt").write_text("sky\nroad\ntree\n")
    with pytest.raises(UserError, match="class 2 of folder:.* is 'tree', and random has '<car>'"):
        photographs.read(pretrained, 4, "pixels")


def test_the_command_tells_the_accuracy_of_pixels(
    pretrained, streets, converter, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(__main__.flags, "load", lambda _: pretrained)
    flags = ["--checkpoint=x", f"--output={tmp_path}/out", "--outputs=pixels", "--stages=onnx"]
    flags += [f"--dataset={streets}", "--latency_seconds=0", f"--converter={converter}"]
    assert __main__.main(flags) == 0
    (row,) = load_report(tmp_path / "out")
    assert "accuracy" in row and f"{row['accuracy']:.2%} (Flax" in capsys.readouterr().out
    images, masks = Photographs(dataset=streets).read(pretrained, 5, "pixels")
    predicted = np.asarray(make_forward(pretrained, outputs="pixels").jitted()(images)).argmax(-1)
    there = masks != 255
    expected = (predicted == masks)[there].mean()
    assert row["reference_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_images_are_compared_a_few_at_a_time(pretrained, streets, tmp_path, monkeypatch):
    forward = make_forward(pretrained, outputs="pixels")
    assert forward.output_bytes == forward.jitted()(np.zeros((1, 16, 24, 3), np.float32)).nbytes
    monkeypatch.setattr(parity, "_OF_ALL", 3 * forward.output_bytes)
    monkeypatch.setattr(parity, "_OF_A_CALL", 2 * forward.output_bytes)
    sizes, original = [], parity.in_batches

    def spy(predict, images, batch_size):
        sizes.append((len(images), batch_size))
        return original(predict, images, batch_size)

    monkeypatch.setattr(parity, "in_batches", spy)
    export = Export(tmp_path / "out", batch="1:2:64", latency_seconds=0.001)
    photographs = Photographs(dataset=streets)
    # Of no stage: the reference alone is made.
    none = Resolution(stages=(), converter="", left_out=())
    monkeypatch.setattr(Export, "_resolve", lambda *_: none)
    export.convert(pretrained, outputs="pixels", photographs=photographs)
    assert sizes == [(3, 2)]
    export._compare("Flax", forward.jitted(), "fp32 tokens")
    assert sizes[1] == (3, 2)
    (row,) = load_report(tmp_path / "out")
    assert [timed["batch"] for timed in row["latency"]] == [1, 2]
    assert row["top1_agreement"] == 1 and row["accuracy"] == row["reference_accuracy"] < 1


def test_of_other_models_and_other_outputs_they_are_refused(pretrained, make_forward):
    from vit_jax.export import forward

    with pytest.raises(UserError, match="tells no pixels apart: train it with --config segmentati"):
        make_forward(outputs="pixels")
    with pytest.raises(UserError, match="has no head, so no logits: use --outputs features or pix"):
        forward.make_forward(pretrained)
    with pytest.raises(UserError, match="pixels are exported for one size of images"):
        forward.make_forward(pretrained, outputs="pixels", free_size=True)
