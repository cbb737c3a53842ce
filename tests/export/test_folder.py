"""The folder of an export is enough: its README is followed without this package."""

import contextlib
import dataclasses
import json
import math
import re
import subprocess
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.images import preprocess, read_image
from vit_jax.data.protocols import Preprocessing, whole_pixels
from vit_jax.errors import UserError
from vit_jax.export import __main__, forward, parity
from vit_jax.export.deploy import write_deploy
from vit_jax.export.folder import write_folder
from vit_jax.export.parity_picture import draw
from vit_jax.export.pipeline import Export
from vit_jax.export.stages import Resolution
from vit_jax.export.to_tensorrt import build
from vit_jax.image_size import of_sides

from . import fake_tensorrt
from .graphs import onnx

# What a reader has: nothing of this package, of JAX, and of what only it needs.
READER = """
import sys
sys.modules.update(dict.fromkeys(["vit_jax", "jax", "flax", "scipy", "tensorflow"]))
block = {}
exec(open("block.py").read(), block)
import numpy
numpy.save("found.npy", block[sys.argv[1]])
"""
RULES = {
    "whole": Preprocessing(16),
    "whole bicubic": Preprocessing(16, None, "bicubic"),
    "central": Preprocessing(16, 0.875),
    "squashed": Preprocessing(16, 0.875, squash=True),
    "antialiased": Preprocessing(of_sides(16, 24), 0.9, antialias=True),
    "antialiased bicubic": Preprocessing(16, None, "bicubic", True),
    "areas": Preprocessing(16, 0.875, "area", resize="big_vision"),
    "areas, wide": Preprocessing(of_sides(12, 20), 0.8, "area", resize="big_vision"),
    "timm": Preprocessing(16, 0.9, "bicubic", True, resize="timm"),
    "timm, wide": Preprocessing(of_sides(12, 20), 0.9, "bilinear", True, resize="timm"),
    "huggingface": Preprocessing(15, 0.875, "bilinear", True, resize="huggingface"),
    "mean and std": Preprocessing(16, mean=(0.48, 0.46, 0.4), std=(0.27, 0.26, 0.28)),
    "fast": Preprocessing(16, jpeg_dct="fast"),
    "gray": Preprocessing(16).with_channels(1),
    "five channels": Preprocessing(16, 0.9, "bicubic", True, resize="timm").with_channels(5),
}
NAMES = ("rose", "a\nb", "água", "tulip", "iris")


def photograph(path, height=53, width=87, orientation=1):
    """Blotches, as a JPEG."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, "JPEG", quality=90, exif=exif)
    return path


def blocks(folder):
    return re.findall(r"(?s)```python\n(.*?)```", (folder / "README.md").read_text("utf-8"))


def followed(folder, output="logits"):
    """The outputs that a reader of the README has, and what it prints."""
    (folder / "block.py").write_text(blocks(folder)[0], encoding="utf-8")
    command = [sys.executable, "-c", READER, output]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npy"), done.stdout


def linear(folder, rule, pixels="preprocessed", names=None, dtype="float32"):
    """Writes a model of one product; returns its weights."""
    kind = onnx.TensorProto.UINT8 if pixels == "uint8" else onnx.TensorProto.FLOAT
    weights = np.random.default_rng(1).normal(size=(np.prod(rule.image_shape), 5)) / 30
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=1),
            helper.make_node("Flatten", ["floats"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "graph",
        [helper.make_tensor_value_info("images", kind, ["batch", *rule.image_shape])],
        [helper.make_tensor_value_info("logits", 1, ["batch", 5])],
        [onnx.numpy_helper.from_array(weights.astype(dtype), "weights")],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    metadata = {"preprocessing": json.dumps(dataclasses.asdict(rule)), "pixels": pixels}
    if names:
        metadata["class_names"] = json.dumps(names)
    helper.set_model_props(model, metadata)
    onnx.save(model, folder / "model.onnx")
    write_folder(folder)
    return weights


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_readers_image_is_that_of_evaluation(rule, tmp_path):
    weights = linear(tmp_path, rule)
    path = tmp_path / "photo.jpg"
    if rule.channels == 5:
        pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 5), np.uint8)
        with path.open("wb") as file:
            np.save(file, pixels)
    else:
        photograph(path, orientation=6)
    image = read_image(path, jpeg_dct=rule.jpeg_dct, channels=rule.channels)
    expected = preprocess(image, rule).ravel() @ weights
    found, _ = followed(tmp_path)
    np.testing.assert_allclose(found, expected[None], atol=1e-4)


def test_a_phones_jpeg_of_several_pictures_is_decoded_as_in_evaluation(tmp_path):
    rule = RULES["fast"]
    weights = linear(tmp_path, rule)
    with Image.open(photograph(tmp_path / "one.jpg")) as one:
        one.save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[one.rotate(90)])
    seen = preprocess(read_image(tmp_path / "photo.jpg", jpeg_dct="fast"), rule)
    found, _ = followed(tmp_path)
    np.testing.assert_allclose(found, (seen.ravel() @ weights)[None], atol=1e-4)


@pytest.mark.parametrize("names", [("sky", "a\nb", "<car>"), None], ids=["named", "unnamed"])
def test_the_readme_gives_the_classes_of_pixels(names, tmp_path):
    rule, helper = RULES["central"], onnx.helper
    weights = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "weights"], ["pixels"])],
        "graph",
        [helper.make_tensor_value_info("images", 1, ["batch", *rule.image_shape])],
        [helper.make_tensor_value_info("pixels", 1, ["batch", *rule.image_shape])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    metadata = {"preprocessing": json.dumps(dataclasses.asdict(rule)), "output": "pixels"}
    if names:
        metadata["pixel_classes"] = json.dumps(names)
    helper.set_model_props(model, metadata)
    onnx.save(model, tmp_path / "model.onnx")
    write_folder(tmp_path)
    image = preprocess(read_image(photograph(tmp_path / "photo.jpg")), rule)
    found, printed = followed(tmp_path, "pixels")
    np.testing.assert_allclose(found, (image @ weights)[None], atol=1e-4)
    told = dict(reversed(line.split("% ")) for line in printed.splitlines())
    labels = [r"a\nb" if name == "a\nb" else name for name in names or "012"]
    counts = np.bincount((image @ weights).argmax(-1).ravel(), minlength=3)
    expected = {x: count / 2.56 for x, count in zip(labels, counts, strict=True) if count}
    assert {x: float(share) for x, share in told.items()} == pytest.approx(expected, abs=0.4)
    assert "a score for each class of every pixel" in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize("in_graph", [False, True], ids=["outside", "in_graph"])
def test_the_readme_gives_the_logits_of_flax(in_graph, converter, make_forward, tmp_path):
    made = make_forward(num_layers=1)
    model, rule = json.loads(made.metadata["model"]), RULES["timm"]
    pretrained = Pretrained(made.params, model, rule, NAMES, "softmax", "runs/flowers")
    export = Export(tmp_path, batch="1:1:2", latency_seconds=0)
    export.convert(pretrained, converter=converter, in_graph=in_graph, stages=["onnx"])
    assert not export.failures
    image = preprocess(read_image(photograph(tmp_path / "photo.jpg", orientation=8)), rule)
    expected = forward.make_forward(pretrained).jitted()(image[None])
    found, printed = followed(tmp_path)
    np.testing.assert_allclose(found, expected, atol=1e-4)

    order = expected[0].argsort()[::-1]
    assert [line.split("% ")[1] for line in printed.splitlines()] == [
        r"a\nb" if NAMES[i] == "a\nb" else NAMES[i] for i in order
    ]
    text = (tmp_path / "README.md").read_text("utf-8")
    listed = set(re.findall(r"(?m)^\| `(\S+\.\S+|deploy)` \|", text))
    written = {path.name for path in tmp_path.iterdir()} - {"block.py", "found.npy", "photo.jpg"}
    assert written - {"README.md"} == listed
    with Image.open(tmp_path / "parity.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    told = json.loads((tmp_path / "preprocess.json").read_text())
    assert told["left_to_the_client"][-1] == ("turn upright" if in_graph else "normalize")
    assert (told["resize"], told["center_crop"], told["image_size"]) == ("timm", 0.9, [16, 16])


def test_the_readme_tells_what_tokens_of_images_of_any_size_are(converter, make_forward, tmp_path):
    made, rule = make_forward(num_layers=1), RULES["timm"]
    pretrained = Pretrained(
        made.params, json.loads(made.metadata["model"]), rule, NAMES, "softmax", "random"
    )
    Export(tmp_path, batch="1:1:1", latency_seconds=0).convert(
        pretrained, converter=converter, stages=["onnx"], outputs="tokens", free_size=True
    )
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "[any, any, any, 3]" in text and "- **Other sizes**: height and width are" in text
    assert "features of every patch, row by row, after those of other tokens: class." in text
    assert "An engine is built for one size of images" in text
    photograph(tmp_path / "photo.jpg")
    with contextlib.chdir(tmp_path):
        found = {}
        exec(blocks(tmp_path)[0], found)
    assert found["tokens"].shape == (1, 1 + 2 * 2, 32)


def test_pixels_are_rounded_where_mean_and_std_are_in_the_graph(tmp_path):
    weights = linear(tmp_path, RULES["central"], "uint8", names=list(NAMES)) / 30
    photograph(tmp_path / "photo.jpg")
    seen = preprocess(read_image(tmp_path / "photo.jpg"), RULES["central"]) * 127.5 + 127.5
    found, _ = followed(tmp_path)
    off = np.abs(found / 30 - np.rint(seen).ravel() @ weights)
    assert off.max() < 5e-2
    assert "whole numbers from 0 to 255" in (tmp_path / "README.md").read_text()


def test_classes_have_names_that_people_know(tmp_path):
    linear(tmp_path, RULES["whole"], names=["n01440764", "n11939491", "rose", "tulip", "iris"])
    lines = (tmp_path / "classes.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["tench", "daisy", "rose", "tulip", "iris"]
    labels = write_deploy(tmp_path) / "models/vit_onnx/labels.txt"
    assert labels.read_text().splitlines() == lines
    photograph(tmp_path / "photo.jpg")
    assert "daisy" in followed(tmp_path)[1]


def test_the_readme_says_how_an_image_is_resized(tmp_path):
    linear(tmp_path, RULES["whole"])
    text = (tmp_path / "README.md").read_text()
    assert "This is what `center_crop: null` means" in text
    assert "bilinear **without** antialiasing, half-pixel centers" in text
    assert "in the order RGB" in text
    assert not (tmp_path / "classes.txt").exists()


@pytest.mark.parametrize("name", ["areas", "areas, wide", "timm", "timm, wide", "huggingface"])
def test_the_sizes_of_the_readme_are_those_of_evaluation(name, tmp_path):
    rule = RULES[name]
    linear(tmp_path, rule)
    text = (tmp_path / "README.md").read_text()
    found = re.search(
        r"multiplied by the larger of (\d+) / height and (\d+) / width, and rounded "
        r"(down|to.*one); then the central (\d+) x (\d+) .* left over, rounded (down|to.*one)\.",
        text,
    )
    tall, wide, rounded, *view, halved = found.groups()
    assert [int(tall), int(wide)] == json.loads((tmp_path / "preprocess.json").read_text())[
        "resized"
    ]
    ways = {"down": math.floor, "to the nearest whole number, halves to the even one": round}
    for height, width in ((31, 47), (500, 375), (600, 452), (16, 16), (99, 13)):
        scale = max(Fraction(int(tall), height), Fraction(int(wide), width))
        resized = [ways[rounded](x * scale) for x in (height, width)]
        corner = [ways[halved](Fraction(x - int(y), 2)) for x, y in zip(resized, view, strict=True)]
        assert (*resized, *corner) == whole_pixels(rule, height, width)


def test_outputs_that_are_not_finite_are_told_and_the_readme_is_written(
    converter, make_forward, tmp_path, monkeypatch, capsys
):
    made = make_forward(num_layers=1)
    model, rule = json.loads(made.metadata["model"]), RULES["timm"]
    pretrained = Pretrained(made.params, model, rule, None, "softmax", "random")
    monkeypatch.setattr(__main__.flags, "load", lambda _: pretrained)
    # The outputs of Flax, and then those of the ONNX file.
    expected = np.ones((16, 5), np.float32)
    outputs = iter([expected, expected * np.nan])
    monkeypatch.setattr(parity, "in_batches", lambda *_: next(outputs))
    arguments = ["--checkpoint=x", f"--output={tmp_path}", "--stages=onnx", "--latency_seconds=0"]
    assert __main__.main([*arguments, f"--converter={converter}"]) == 1
    assert "error: ONNX fp32: relative difference nan is above 1e-05" in capsys.readouterr().err
    assert "| ONNX fp32 | nan | nan | nan | nan |" in (tmp_path / "README.md").read_text()


def test_the_readme_of_another_is_not_overwritten(tmp_path):
    linear(tmp_path, RULES["whole"], names=list(NAMES))
    linear(tmp_path, RULES["whole"])
    assert not (tmp_path / "classes.txt").exists()
    files = {"README.md": "# My own", "classes.txt": "cat\ndog\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "model.onnx").unlink()
    for stage in (lambda x: x.convert(None), Export.build_engine):
        with pytest.raises(UserError, match=r"README.md is not an export's.*another folder"):
            stage(Export(tmp_path))
    with pytest.raises(UserError, match="is not an export's"):
        write_folder(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_what_is_no_longer_true_does_not_stay(make_forward, tmp_path, monkeypatch):
    (tmp_path / "parity.png").touch()
    linear(tmp_path, RULES["whole"], names=list(NAMES))
    assert not (tmp_path / "parity.png").exists()
    (tmp_path / "model.onnx").unlink()
    monkeypatch.setattr(Export, "_resolve", lambda *_: Resolution(("tf",), "", ()))
    monkeypatch.setattr(Export, "_to_tf", lambda *_: None)
    made = make_forward(num_layers=1)
    model, rule = json.loads(made.metadata["model"]), RULES["whole"]
    Export(tmp_path).convert(Pretrained(made.params, model, rule, None, "softmax", "random"))
    assert [path.name for path in tmp_path.iterdir()] == ["parity_reference.npz"]


def test_of_what_onnxruntime_does_not_compute_the_readme_prepares_images_alone(tmp_path):
    linear(tmp_path, RULES["whole"], dtype=ml_dtypes.bfloat16)
    text = (tmp_path / "README.md").read_text()
    assert "onnxruntime does not compute bf16 on a CPU" in text
    assert not any("onnxruntime" in block for block in blocks(tmp_path))
    photograph(tmp_path / "photo.jpg")
    with contextlib.chdir(tmp_path):
        found = {}
        exec(blocks(tmp_path)[0], found)
    expected = preprocess(read_image(tmp_path / "photo.jpg"), RULES["whole"])
    np.testing.assert_allclose(found["images"], expected[None], atol=1e-5)


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
@pytest.mark.parametrize("batch", ["1:1:2", "8:8:8"])
def test_the_lines_for_tensorrt_use_what_it_has(version, batch, tmp_path, monkeypatch):
    if version.startswith("8"):
        pytest.skip("the README names TensorRT 10 and 11")
    linear(tmp_path, RULES["whole"])
    cuda = fake_tensorrt.FakeCuda()  # The lines leave it to the end of the program to free memory.
    monkeypatch.setattr(fake_tensorrt, "CUDA", cuda)
    trt = fake_tensorrt.install(monkeypatch, version)

    class Logger(trt.ILogger):
        """The one that the real module has beside."""

        def __init__(self, _severity):
            super().__init__()

    trt.Logger = Logger
    build(tmp_path / "model.onnx", tmp_path, batch=batch)
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).random((1, 4, 4, 3), np.float32)
    found = {"np": np, "images": images.swapaxes(1, 2).copy().swapaxes(1, 2)}
    exec(blocks(tmp_path)[1], found)
    expected = images.mean() * np.arange(1, fake_tensorrt.OUTPUTS + 1)
    np.testing.assert_allclose(found["outputs"], expected[None], rtol=1e-5)
    found["images"] = np.repeat(images, 9, axis=0)
    with pytest.raises(AssertionError, match="built for other batches"):
        exec(blocks(tmp_path)[1], found)
    monkeypatch.setattr(cuda, "cudaMalloc", lambda _: (2, None))
    with pytest.raises(AssertionError, match="error 2"):
        exec(blocks(tmp_path)[1], found)


def test_the_picture_draws_what_is_infinite_and_what_is_equal(tmp_path):
    stages = [
        {"name": "ONNX fp32", "precision": "fp32", "relative_difference": 0.0},
        {"name": "ONNX fp16", "precision": "fp16", "relative_difference": None},
        {"name": "x" * 99, "precision": "int8", "relative_difference": 0.9},
    ]
    draw(stages, tmp_path / "parity.png")
    with Image.open(tmp_path / "parity.png") as picture:
        assert picture.width > 500
