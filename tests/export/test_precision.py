import collections
import json

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.export import parity, runtime

REASON = "needs the export extra: pip install -e '.[export]'"
onnx = pytest.importorskip("onnx", reason=REASON)
ir = pytest.importorskip("onnx_ir", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
precision = pytest.importorskip("vit_jax.export.precision", reason=REASON, exc_type=ImportError)
patterns = pytest.importorskip("vit_jax.export.patterns", reason=REASON, exc_type=ImportError)
rewrite = pytest.importorskip("vit_jax.export.rewrite", reason=REASON, exc_type=ImportError)
to_onnx = pytest.importorskip("vit_jax.export.to_onnx", reason=REASON, exc_type=ImportError)

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def run(model: ir.Model, images: np.ndarray, optimize: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


def images(batch: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 16, 16, 3), dtype=np.float32)


def half_model(forward, converter, kind):
    model = to_onnx.to_model(forward, converter)
    precision.to_half(model, kind)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@pytest.mark.parametrize("kind, tolerance", [("fp16", 2e-3), ("bf16", 2e-2)])
def test_16_bits_stay_close_to_float32(converter, make_forward, kind, tolerance):
    forward = make_forward(gelu="erf")
    model = half_model(forward, converter, kind)
    expected = forward.jitted()(images())
    rounded = run(precision.emulate(model), images(), optimize=False)
    assert rounded.dtype == np.float32
    difference = np.abs(rounded - expected).max() / np.abs(expected).max()
    assert 1e-5 < difference < tolerance  # Something was rounded, and not much was lost.


def test_onnxruntime_runs_the_fp16_file_as_it_is(converter, make_forward):
    forward = make_forward(gelu="erf")
    expected = forward.jitted()(images())
    outputs = run(half_model(forward, converter, "fp16"), images())
    np.testing.assert_allclose(outputs, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("options", [{}, {"include_preprocessing": True}], ids=["float", "uint8"])
def test_norms_and_head_are_float32_and_attention_is_not(converter, make_forward, kind, options):
    model = half_model(make_forward(gelu="erf", **options), converter, kind)
    count = collections.Counter(node.op_type for node in model.graph)
    # Two layers: two norms and an attention each, and the last norm; the head is the only Gemm.
    assert (count["LayerNormalization"], count["Gemm"], count["Softmax"]) == (5, 1, 2)
    assert count["Erf"] == 2 and count["MatMul"] >= 2 * 6
    for node in model.graph:
        if node.op_type in ("LayerNormalization", "Gemm"):
            assert {value.dtype for value in node.inputs} == {ir.DataType.FLOAT}, node.name
        if node.op_type in ("MatMul", "Softmax", "Erf"):
            assert {value.dtype for value in node.inputs} == {HALF[kind]}, node.name
        if node.op_type == "Softmax":  # Nothing between it and the two products.
            assert node.inputs[0].producer().op_type == "MatMul"
            assert node.outputs[0].consumers()[0].op_type == "MatMul"
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_weights_take_half_the_space(converter, make_forward):
    forward = make_forward(hidden_size=64, mlp_dim=256)

    def size(model):
        return sum(value.const_value.nbytes for value in model.graph.initializers.values())

    full = size(to_onnx.to_model(forward, converter))
    assert 0.5 < size(half_model(forward, converter, "fp16")) / full < 0.52


def test_large_inputs_of_norms_overflow_a_naive_conversion_and_not_ours(
    converter, make_forward, monkeypatch
):
    forward = make_forward(gelu="erf")
    for name in (
        "embedding",
        "cls",
    ):  # The residual stream grows to thousands, its squares above 65504.
        forward.params[name] = jax.tree.map(lambda x: x * 2000, forward.params[name])
    expected = forward.jitted()(images())
    ours = run(precision.emulate(half_model(forward, converter, "fp16")), images(), optimize=False)
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 5e-3
    assert (ours.argmax(1) == expected.argmax(1)).all()

    rules = patterns.RewriteRuleSet([patterns._Softmax.rule(), patterns._GeluErf.rule()])
    monkeypatch.setattr(rewrite, "FUSIONS", rules)
    monkeypatch.setattr(precision, "_float32_nodes", lambda graph: set())
    model = to_onnx.to_model(forward, converter)
    precision.to_half(model, "fp16")
    naive = run(precision.emulate(model), images(), optimize=False).astype(np.float32)
    # Divided by an infinite deviation, every token becomes 0, and every image the same.
    assert not np.isfinite(naive).all() or np.ptp(naive, axis=0).max() < 1e-3


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

    emulation = precision.Emulation(path)
    row = parity.compare(reference, emulation.predict(images())) | emulation.range()
    (failure,) = parity.failures(row, "fp16", reference)
    assert failure.startswith("Transformer/encoderblock_1/MlpBlock_3/Dense_0/")
    assert "is beyond 65504" in failure and failure.endswith("use --precision bf16")


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_largest_number_in_fp16_is_that_of_the_hidden_units(
    converter, make_forward, tmp_path, gelu
):
    forward = with_hidden_units(make_forward(gelu=gelu), 2e4)
    emulation = precision.Emulation(to_onnx.save(half_model(forward, converter, "fp16"), tmp_path))
    for part in np.split(images(), 2):
        emulation.predict(part)
    found = emulation.range()
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
    found = run(precision.emulate(ir.Model(graph, ir_version=10)), x, optimize=False)
    with np.errstate(over="ignore"):
        expected = np.float16(2 * np.float32(np.float16(x)))
    np.testing.assert_array_equal(found, np.float32(expected))
    assert np.isinf(found[:5]).all() and found[5] > 0 and found[6] == 0


def test_a_weight_that_fp16_cannot_hold_is_refused(converter, make_forward):
    forward = make_forward()
    forward.params["embedding"]["bias"][0] = 70000
    with pytest.raises(UserError, match="embedding/bias has 7e\\+04.*--precision bf16"):
        half_model(forward, converter, "fp16")
    half_model(forward, converter, "bf16")


def test_int8_quantizes_the_products_that_stand_it(converter, make_forward):
    forward = make_forward(gelu="erf")
    model = precision.to_int8(to_onnx.to_model(forward, converter), images(20))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert model.metadata_props["precision"] == "int8"
    quantized = []
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].producer() is not None:
            left, right = (value.producer() for value in node.inputs)
            if right.op_type == "DequantizeLinear":  # A weight, in 8 bits for each channel.
                assert right.inputs[0].const_value.dtype == ir.DataType.INT8
                assert right.inputs[1].const_value.size == right.inputs[0].const_value.shape[1]
                assert not right.inputs[2].const_value.numpy().any()
                assert left.op_type == "DequantizeLinear"
                assert left.inputs[0].producer().op_type == "QuantizeLinear"
                quantized.append(node.name)
    # Of each of the 2 layers: q, k and v; the heads' outputs; the first layer of the MLP.
    assert len(quantized) == 3 * 2
    assert not any("Dense_1" in name for name in quantized)
    expected = forward.jitted()(images())
    difference = np.abs(run(model, images()) - expected).max() / np.abs(expected).max()
    assert 1e-4 < difference < 0.1
