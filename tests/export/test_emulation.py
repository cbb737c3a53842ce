import json

import numpy as np
import pytest

from vit_jax import models
from vit_jax.export import parity, runtime
from vit_jax.export.precisions import PRECISIONS

from .graphs import HALF, REASON, half_model, images, ir, run, to_onnx

emulation = pytest.importorskip("vit_jax.export.emulation", reason=REASON, exc_type=ImportError)


def with_hidden_units(forward, largest):
    """Scales the MLP of the last layer: its hidden units to `largest`, its output far below."""
    layer = forward.params["Transformer"]["encoderblock_1"]
    norm, mlp = layer["LayerNorm_2"], layer["MlpBlock_3"]
    mlp["Dense_0"]["bias"] = mlp["Dense_0"]["bias"] * 0
    scale = np.float32(largest / hidden_units(forward).max())
    for name in ("scale", "bias"):  # A weight alone would be too large.
        norm[name] = norm[name] * 100
    mlp["Dense_0"]["kernel"] = mlp["Dense_0"]["kernel"] * (scale / 100)
    mlp["Dense_1"]["kernel"] = mlp["Dense_1"]["kernel"] / scale**0.5
    assert hidden_units(forward).max() == pytest.approx(largest, rel=1e-3)
    return forward


def hidden_units(forward):
    """What Flax has before GELU in the last layer."""
    model = models.create_model(json.loads(forward.metadata["model"]))
    _, state = model.apply({"params": forward.params}, images(), capture_intermediates=True)
    block = state["intermediates"]["Transformer"]["encoderblock_1"]["MlpBlock_3"]
    return block["Dense_0"]["__call__"][0]


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_units_beyond_fp16_pass_onnxruntime_and_fail_the_emulation(
    converter, make_forward, tmp_path, gelu
):
    forward = with_hidden_units(make_forward(gelu=gelu), 2e5)
    reference = parity.Reference(images(), forward.jitted()(images()), None, parity.SYNTHETIC)
    path = to_onnx.save(half_model(forward, converter, "fp16"), tmp_path)
    with runtime.load(path) as model:
        row = parity.compare(reference, model.predict(images()))
    assert parity.failures(row, "fp16", reference) == []

    emulated = emulation.Emulation(path, PRECISIONS["fp16"])
    row = parity.compare(reference, emulated.predict(images())) | emulated.range()
    (failure,) = parity.failures(row, "fp16", reference)
    assert failure.startswith("Transformer/encoderblock_1/MlpBlock_3/Dense_0/")
    assert "is beyond 65504" in failure and failure.endswith("use --precision bf16")


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_largest_number_in_fp16_is_that_of_the_hidden_units(
    converter, make_forward, tmp_path, gelu
):
    forward = with_hidden_units(make_forward(gelu=gelu), 2e4)
    path = to_onnx.save(half_model(forward, converter, "fp16"), tmp_path)
    emulated = emulation.Emulation(path, PRECISIONS["fp16"])
    for part in np.split(images(), 2):
        emulated.predict(part)
    found = emulated.range()
    assert found["overflow_at"] is None
    assert found["largest_at"].startswith("Transformer/encoderblock_1/MlpBlock_3/Dense_0/")
    # x (1 + erf) comes before it is halved; the cube beside it only saturates.
    assert np.abs(hidden_units(forward)).max() < 4e4
    assert found["largest"] == pytest.approx(2 * 2e4, rel=0.01)


def test_rounding_to_fp16_is_numpys():
    special = [65504, 65519.9, 65520, 1e6, -7e4, 6e-8, 2.9e-8, 5e-5, 1 / 3, 0.0]
    random = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-8, 2).repeat(100)
    x = np.float32([*special, *random])
    value = ir.Value(name="images", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([len(x)]))
    down = ir.Node("", "Cast", [value], [ir.AttrInt64("to", HALF["fp16"])], name="down")
    double = ir.Node("", "Add", [down.outputs[0]] * 2, name="double")
    up = ir.Node("", "Cast", double.outputs, [ir.AttrInt64("to", ir.DataType.FLOAT)], name="up")
    for node, dtype in ((down, HALF["fp16"]), (double, HALF["fp16"]), (up, ir.DataType.FLOAT)):
        node.outputs[0].name = f"{node.name}:0"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    graph = ir.Graph([value], up.outputs, nodes=[down, double, up], opset_imports={"": 17})
    found = run(emulation.emulate(ir.Model(graph, ir_version=10)), x, optimize=False)
    with np.errstate(over="ignore"):
        expected = np.float16(2 * np.float32(np.float16(x)))
    np.testing.assert_array_equal(found, np.float32(expected))
    assert np.isinf(found[:5]).all() and found[5] > 0 and found[6] == 0
