"""The scores and boxes of every cell in every form, against Flax, and the README's Python."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from vit_jax.checkpoints.detector import with_detector
from vit_jax.errors import UserError
from vit_jax.evaluation.detections import in_original
from vit_jax.export.forward import make_forward as forward_of
from vit_jax.export.parity import load_report
from vit_jax.export.pipeline import Export, Photographs
from vit_jax.export.precisions import PRECISIONS
from vit_jax.export.to_tf import can_serialize_graphs
from vit_jax.models.detection import Found, candidates

from ..detectors import random_detector

NAMES = ("disc", "<square>")


@pytest.fixture(scope="module")
def pretrained():
    return random_detector(NAMES)


def test_they_are_those_of_the_model_in_shares(pretrained):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    forward = forward_of(pretrained, outputs="boxes")
    found = forward.jitted()(images)
    assert found.shape == (2, 64, 6) and 0 <= found.min() <= found.max() <= 1
    assert json.loads(forward.metadata["box_classes"]) == list(NAMES)
    module, params = with_detector(pretrained)
    best = candidates(module.apply({"params": params}, images), (16, 16), 128)
    for index in range(2):
        pairs = found[index, :, :2].ravel()
        order = np.argsort(-pairs, kind="stable")
        np.testing.assert_allclose(best.scores[index], pairs[order], rtol=1e-5)
        np.testing.assert_allclose(
            best.corners[index], 16 * found[index, order // 2, 2:], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_stage_is_as_flax(pretrained, converter, precision, tmp_path):
    export = Export(
        tmp_path / "out", precision=PRECISIONS[precision], batch="1:2:3", latency_seconds=0
    )
    export.convert(pretrained, outputs="boxes", converter=converter)
    assert export.failures == []
    rows = load_report(tmp_path / "out")
    made_in = ["SavedModel"] if converter == "jax2tf" and can_serialize_graphs() else []
    names = [row["name"] for row in rows]
    assert names[: len(made_in) + 1] == [*made_in, f"ONNX {precision}"]
    assert rows[-1]["relative_difference"] < (1e-5 if precision == "fp32" else 1e-2)
    deploy = (tmp_path / "out/deploy/README.md").read_text()
    assert "Of every cell a score of each class" in deploy


@pytest.mark.parametrize("protocol", ["letterbox", "inception"])
def test_the_readme_finds_the_objects_that_detect_finds(converter, protocol, tmp_path, monkeypatch):
    pretrained = random_detector(NAMES, protocol=protocol)
    export = Export(tmp_path / "out", batch="1:1:1", latency_seconds=0)
    export.convert(pretrained, stages=("onnx",), outputs="boxes", converter=converter)
    monkeypatch.chdir(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 44, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photo.jpg", quality=95)
    readme = (tmp_path / "out/README.md").read_text()
    assert "many tell the same object" in readme
    code = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)[0]
    code = code.replace("least=0.5", "least=0.05")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    module, params = with_detector(pretrained)
    from vit_jax.data.image_files import read_view

    images = read_view("photo.jpg", pretrained.preprocessing)[None]
    best = candidates(module.apply({"params": params}, images), (16, 16), 1000)
    one = Found(*(np.asarray(x)[0] for x in best))
    expected = in_original(one, pretrained.preprocessing, 30, 44)
    lines = printed.getvalue().splitlines()
    found = [re.fullmatch(r"(\S+) ([\d.]+) \[(.*)\]", line).groups() for line in lines]
    assert len(found) == len(expected.scores) > 3
    for (name, score, box), label, exact, corners in zip(
        found, expected.classes, expected.scores, expected.corners, strict=True
    ):
        assert name == NAMES[label] and float(score) == pytest.approx(exact, abs=0.006)
        np.testing.assert_allclose(np.array(box.split(), float), corners, atol=0.01)


def test_images_of_a_data_set_with_boxes_are_compared(pretrained, tmp_path):
    from experiments.detection import write_folder

    write_folder(tmp_path / "shapes", {"train": 2, "test": 3}, 32)
    photographs = Photographs(dataset=f"folder:{tmp_path / 'shapes'}")
    images, labels = photographs.read(pretrained, 4, "boxes")
    assert images.shape == (3, 16, 16, 3) and labels is None
    raw, labels = photographs.read_raw(pretrained, 2, "boxes")
    assert len(raw) == 2 and labels is None


def test_of_other_models_and_other_outputs_they_are_refused(pretrained, make_forward):
    with pytest.raises(UserError, match="finds no objects: train it with --config detection:"):
        make_forward(outputs="boxes")
    with pytest.raises(UserError, match="has no head, so no logits: use --outputs features or box"):
        forward_of(pretrained)
    with pytest.raises(UserError, match="boxes are exported for one size of images"):
        forward_of(pretrained, outputs="boxes", free_size=True)


def test_letterboxes_are_not_made_in_the_graph(pretrained, tmp_path):
    export = Export(tmp_path / "out", batch="1:1:1", latency_seconds=0)
    with pytest.raises(UserError, match="images are letterboxed, which is not done in the graph"):
        export.convert(pretrained, outputs="boxes", in_graph=True)
