"""Preprocessing in the graph: pixels against evaluation's own, and logits against Flax."""

import dataclasses
import json

import numpy as np
import pytest

from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.images import preprocess
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export import forward, runtime
from vit_jax.export.__main__ import main
from vit_jax.export.onnx_file import read_onnx
from vit_jax.export.parity import load_report
from vit_jax.export.pipeline import Export
from vit_jax.export.precisions import PRECISIONS
from vit_jax.export.to_tensorrt import build
from vit_jax.image_size import of_sides

from .graphs import ir, onnx, onnxruntime

in_graph = pytest.importorskip("vit_jax.export.in_graph", exc_type=ImportError)

TIMM = Preprocessing(16, 0.9, "bicubic", True, resize="timm")
RULES = {
    "whole": Preprocessing(16),
    "whole bicubic": Preprocessing(of_sides(12, 20), None, "bicubic"),
    "central": Preprocessing(16, 0.875),
    "squashed": Preprocessing(16, 0.875, squash=True),
    "antialiased": Preprocessing(of_sides(16, 24), 0.9, antialias=True),
    "antialiased bicubic": Preprocessing(16, None, "bicubic", True),
    "areas": Preprocessing(16, 0.875, "area", resize="big_vision"),
    "areas, whole": Preprocessing(of_sides(20, 12), None, "area", resize="big_vision"),
    "timm": TIMM,
    "timm, wide": Preprocessing(of_sides(12, 20), 0.9, "bilinear", True, resize="timm"),
    "timm, squashed": dataclasses.replace(TIMM, squash=True, image_size=15),
    "huggingface": Preprocessing(15, 0.875, "bilinear", True, resize="huggingface"),
    "huggingface, whole": Preprocessing(16, None, "bicubic", True, resize="huggingface"),
    "gray": Preprocessing(16).with_channels(1),
    "five channels": TIMM.with_channels(5),
}
# Smaller and larger than the model's, odd, of one pixel, wide and tall.
SIZES = [(16, 16), (37, 53), (5, 7), (1, 1), (1, 40), (64, 48), (300, 211), (15, 16)]
SIZES += [(100, 31), (90, 16), (61, 39), (400, 20), (31, 100)]


def front(rule, tmp_path):
    """A session from raw pixels to what a model sees."""
    images = ir.Value(
        name="images",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(("batch", *rule.image_shape)),
    )
    node = ir.Node("", "Identity", [images])
    seen = node.outputs[0]
    seen.name, seen.type, seen.shape = "seen", images.type, images.shape
    graph = ir.Graph([images], [seen], nodes=[node], opset_imports={"": 17}, name="nothing")
    model = ir.Model(graph, ir_version=10)
    model.metadata_props["preprocessing"] = json.dumps(dataclasses.asdict(rule))
    in_graph.add_preprocessing(model)
    path = tmp_path / "front.onnx"
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pictures(height, width, channels):
    """Noise, and two flat ones, whose means must not fall a gray level short."""
    noise = np.random.default_rng(height).integers(0, 256, (1, height, width, channels))
    flat = [np.full_like(noise, level) for level in (77, 255)]
    return np.concatenate([noise, *flat]).astype(np.uint8)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_graph_sees_what_evaluation_sees_of_images_of_any_size(rule, tmp_path):
    session = front(rule, tmp_path)
    for height, width in SIZES:
        raw = pictures(height, width, rule.channels)
        (seen,) = session.run(None, {"images": raw})
        expected = np.stack([preprocess(image, rule) for image in raw])
        gray_levels = np.abs(seen - expected).max() * 255 * min(rule.std)
        assert gray_levels < 1e-3, (height, width)


@pytest.mark.parametrize("image_size", [16, "16x24", "24x10"])
@pytest.mark.parametrize("crop", [None, 0.9])
def test_the_passes_of_pil_are_in_its_order(image_size, crop, tmp_path):
    """It goes over the rows of some tall images first, and rounds in between."""
    rule = Preprocessing(image_size, crop, "bicubic", True, resize="timm")
    session, random = front(rule, tmp_path), np.random.default_rng(0)
    for height, width in random.integers(8, 90, (40, 2)):
        raw = random.integers(0, 256, (1, height, width, 3), np.uint8)
        (seen,) = session.run(None, {"images": raw})
        np.testing.assert_allclose(seen[0], preprocess(raw[0], rule), atol=1e-5)


@pytest.fixture
def exported(make_forward, tmp_path):
    def export(converter, rule=TIMM, **options):
        made = make_forward(num_layers=1, image_size=rule.image_size)
        model = json.loads(made.metadata["model"])
        pretrained = Pretrained(made.params, model, rule, None, "softmax", "random")
        export = Export(tmp_path, batch="1:1:2", latency_seconds=0, **options)
        export.convert(pretrained, converter=converter, in_graph=True)
        return export, pretrained

    return export


@pytest.mark.parametrize("rule", [TIMM, RULES["areas"], RULES["whole"]], ids=lambda x: x.resize)
def test_logits_of_raw_images_are_those_of_flax(rule, exported, converter, tmp_path):
    export, pretrained = exported(converter, rule)
    assert not export.failures
    (stage,) = load_report(tmp_path)
    assert stage["relative_difference"] < 1e-5
    flax = forward.make_forward(pretrained).jitted()
    with runtime.load(tmp_path / "model.onnx") as model:
        assert model.image_shape == (-1, -1, 3)
        for height, width in SIZES:
            raw = pictures(height, width, 3)
            expected = flax(np.stack([preprocess(image, rule) for image in raw]))
            np.testing.assert_allclose(model.predict(raw), expected, atol=1e-4)
        with pytest.raises(UserError, match="do not fit"):
            model.predict(raw.astype(np.float32))


@pytest.mark.parametrize(
    "kind, forms", [("fp16", ["", ", emulated"]), ("bf16", [", emulated"]), ("int8", [""])]
)
def test_every_precision_prepares_images_as_float32_does(
    kind, forms, exported, converter, tmp_path
):
    export, _ = exported(converter, precision=PRECISIONS[kind])
    assert not export.failures
    stages = load_report(tmp_path)
    assert [stage["name"] for stage in stages] == [f"ONNX {kind}{form}" for form in forms]
    # The limit of int8 is a wide one.
    assert all(0 < stage["relative_difference"] < 0.3 for stage in stages)
    (image,) = read_onnx(tmp_path / "model.onnx").inputs
    assert (image.type, image.shape) == ("UINT8", (-1, -1, -1, 3))


def test_an_engine_of_it_is_refused_in_one_line(exported, converter, tmp_path):
    exported(converter)
    with pytest.raises(UserError, match="antialiased Resize nor 64-bit floats: export without"):
        build(tmp_path / "model.onnx", tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stages=tensorrt"], "Triton's ensemble"),
        (["--stages=tf,onnx"], "use --stages onnx"),
        (["--free_size"], "goes without --free_size"),
        (["--include_preprocessing"], "goes without --include_preprocessing"),
    ],
)
def test_what_does_not_go_with_it_is_said(flags, message):
    with pytest.raises(UserError, match=message):
        main(["--checkpoint=x", "--output=x", "--preprocessing=in_graph", *flags])
