import collections

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.export.precisions import PRECISIONS

from .graphs import HALF, REASON, half_model, images, ir, onnx, run, to_onnx

casts = pytest.importorskip("vit_jax.export.casts", reason=REASON, exc_type=ImportError)
emulation = pytest.importorskip("vit_jax.export.emulation", reason=REASON, exc_type=ImportError)
fusions = pytest.importorskip("vit_jax.export.fusions", reason=REASON, exc_type=ImportError)
rewrite = pytest.importorskip("vit_jax.export.rewrite", reason=REASON, exc_type=ImportError)


@pytest.mark.parametrize("kind, tolerance", [("fp16", 2e-3), ("bf16", 2e-2)])
def test_16_bits_stay_close_to_float32(converter, make_forward, kind, tolerance):
    forward = make_forward(gelu="erf")
    model = half_model(forward, converter, kind)
    expected = forward.jitted()(images())
    rounded = run(emulation.emulate(model), images(), optimize=False)
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
    ours = run(emulation.emulate(half_model(forward, converter, "fp16")), images(), optimize=False)
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 5e-3
    assert (ours.argmax(1) == expected.argmax(1)).all()

    rules = fusions.RewriteRuleSet([fusions._Softmax.rule(), fusions._GeluErf.rule()])
    monkeypatch.setattr(rewrite, "FUSIONS", rules)
    monkeypatch.setattr(casts, "_float32_nodes", lambda graph: set())
    model = to_onnx.to_model(forward, converter)
    casts.to_half(model, onnx_type=10)
    naive = run(emulation.emulate(model), images(), optimize=False).astype(np.float32)
    # Divided by an infinite deviation, every token becomes 0, and every image the same.
    assert not np.isfinite(naive).all() or np.ptp(naive, axis=0).max() < 1e-3


def test_a_weight_that_fp16_cannot_hold_is_refused(converter, make_forward):
    forward = make_forward()
    forward.params["embedding"]["bias"][0] = 70000
    with pytest.raises(UserError, match="embedding/bias has 7e\\+04.*--precision bf16"):
        half_model(forward, converter, "fp16")
    half_model(forward, converter, "bf16")


def test_int8_quantizes_the_products_that_stand_it(converter, make_forward):
    forward = make_forward(gelu="erf")
    model = PRECISIONS["int8"].apply(to_onnx.to_model(forward, converter), images(20))
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
