"""The folder of an export is enough: its README is followed without this package."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.images import preprocess, read_image
from vit_jax.data.protocols import Preprocessing
from vit_jax.export import forward
from vit_jax.export.folder import write_folder
from vit_jax.export.parity_picture import draw
from vit_jax.export.pipeline import Export
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
numpy.save("found.npy", block["logits"])
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


def followed(folder):
    """The logits that a reader of the README has, and what it prints."""
    (folder / "block.py").write_text(blocks(folder)[0], encoding="utf-8")
    command = [sys.executable, "-c", READER]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npy"), done.stdout


def linear(folder, rule, pixels="preprocessed", names=None):
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
        [onnx.numpy_helper.from_array(weights.astype(np.float32), "weights")],
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


def test_pixels_are_rounded_where_mean_and_std_are_in_the_graph(tmp_path):
    weights = linear(tmp_path, RULES["central"], "uint8", names=list(NAMES)) / 30
    photograph(tmp_path / "photo.jpg")
    seen = preprocess(read_image(tmp_path / "photo.jpg"), RULES["central"]) * 127.5 + 127.5
    found, _ = followed(tmp_path)
    off = np.abs(found / 30 - np.rint(seen).ravel() @ weights)
    assert off.max() < 5e-2
    assert "whole numbers from 0 to 255" in (tmp_path / "README.md").read_text()


def test_the_readme_says_how_an_image_is_resized(tmp_path):
    linear(tmp_path, RULES["whole"])
    text = (tmp_path / "README.md").read_text()
    assert "This is what `center_crop: null` means" in text
    assert "bilinear **without** antialiasing, half-pixel centers" in text
    assert "in the order RGB" in text
    assert not (tmp_path / "classes.txt").exists()
    linear(tmp_path, RULES["timm"])
    text = (tmp_path / "README.md").read_text()
    assert "until it just covers 17 x 17; then the central 16 x 16" in text


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_the_lines_for_tensorrt_use_what_it_has(version, tmp_path, monkeypatch):
    if version.startswith("8"):
        pytest.skip("the README names TensorRT 10 and 11")
    linear(tmp_path, RULES["whole"])
    trt = fake_tensorrt.install(monkeypatch, version)

    class Logger(trt.ILogger):
        """The one that the real module has beside."""

        def __init__(self, _severity):
            super().__init__()

    trt.Logger = Logger
    build(tmp_path / "model.onnx", tmp_path, batch="1:1:2")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).random((1, 4, 4, 3), np.float32)
    found = {"np": np, "images": images.swapaxes(1, 2).copy().swapaxes(1, 2)}
    exec(blocks(tmp_path)[1], found)
    expected = images.mean() * np.arange(1, fake_tensorrt.OUTPUTS + 1)
    np.testing.assert_allclose(found["outputs"][0], expected, rtol=1e-5)


def test_the_picture_draws_what_is_infinite_and_what_is_equal(tmp_path):
    stages = [
        {"name": "ONNX fp32", "precision": "fp32", "relative_difference": 0.0},
        {"name": "ONNX fp16", "precision": "fp16", "relative_difference": None},
        {"name": "x" * 99, "precision": "int8", "relative_difference": 0.9},
    ]
    draw(stages, tmp_path / "parity.png")
    with Image.open(tmp_path / "parity.png") as picture:
        assert picture.width > 500
