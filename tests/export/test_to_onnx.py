import collections
import json
import math
import unittest.mock

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.export import runtime
from vit_jax.export.engine_report import report
from vit_jax.export.onnx_file import read_onnx
from vit_jax.export.to_tf import can_serialize_graphs, to_tf

REASON = "needs the export extra: pip install -e '.[export]'"
onnx = pytest.importorskip("onnx", reason=REASON)
ir = pytest.importorskip("onnx_ir", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
to_onnx = pytest.importorskip("vit_jax.export.to_onnx", reason=REASON, exc_type=ImportError)

# Of the operators that TensorRT 8.6's parser lists, those that a graph of this project may have.
TENSORRT_8_6 = {
    *("Add", "Concat", "Conv", "Div", "Erf", "Gather", "Gemm", "GlobalAveragePool"),
    *("InstanceNormalization", "LayerNormalization", "MatMul", "MaxPool", "Mean", "Mul", "Pad"),
    *("Pow", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt"),
    *("Exp", "Neg", "Reciprocal"),  # As tf2onnx has a sigmoid.
    *("Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze"),
}


def operators(model: ir.Model) -> collections.Counter:
    return collections.Counter(node.op_type for node in model.graph)


def check_contract(model: ir.Model, num_layers: int, gelu: str = "erf") -> None:
    count = operators(model)
    assert count["LayerNormalization"] == 2 * num_layers + 1
    assert count["Softmax"] == num_layers
    assert len(gelus(model, gelu)) == num_layers
    # GELU counts as the five nodes of its erf form; the tanh form has eight.
    surplus = 3 * num_layers if gelu == "tanh" else 0
    assert sum(count.values()) - surplus <= 30 * num_layers + 20
    assert set(count) <= TENSORRT_8_6
    assert model.opset_imports == {"": 17}
    inputs, outputs = model.graph.inputs, model.graph.outputs
    assert [value.name for value in inputs] == ["images"]
    assert [value.name for value in outputs] == ["logits"]
    assert [str(value.shape[0]) for value in (*inputs, *outputs)] == ["batch", "batch"]
    check_scale_on_q(model, num_layers)


def check_scale_on_q(model: ir.Model, num_layers: int) -> None:
    """MatMul -> Softmax -> MatMul without anything between, and a Mul before the first."""
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    for node in softmaxes:
        product = node.inputs[0].producer()
        assert product.op_type == "MatMul"
        assert [use.op_type for use in node.outputs[0].consumers()] == ["MatMul"]
        q = product.inputs[0].producer()
        while q.op_type in ("Transpose", "Reshape"):
            q = q.inputs[0].producer()
        head_dim = product.inputs[0].shape[-1]
        assert q.op_type == "Mul"
        assert math.isclose(q.inputs[1].const_value.numpy().item(), head_dim**-0.5, rel_tol=1e-6)
    assert len(softmaxes) == num_layers


def gelus(model: ir.Model, form: str) -> list[list[ir.Node]]:
    """The chains of operators that engines recognize as GELU."""
    chain, with_x = {
        "erf": (["Div", "Erf", "Add", "Mul", "Mul"], [3]),
        "tanh": (["Pow", "Mul", "Add", "Mul", "Tanh", "Add", "Mul", "Mul"], [2, 6]),
    }[form]
    found = []
    for node in model.graph:
        nodes = [node]
        while len(nodes) < len(chain) and len(nodes[-1].outputs[0].consumers()) == 1:
            nodes.append(nodes[-1].outputs[0].consumers()[0])
        if [n.op_type for n in nodes] == chain:
            assert all(node.inputs[0] in nodes[i].inputs for i in with_x)
            found.append(nodes)
    return found


def run(path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a - b).max() / np.abs(b).max()


def images(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, size, size, 3), dtype=np.float32)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize(
    "options", [{}, {"classifier": "gap", "representation_size": 8}], ids=["token", "gap"]
)
def test_graph_is_whole_and_equals_flax_at_any_batch_size(
    converter, make_forward, tmp_path, gelu, options
):
    forward = make_forward(gelu=gelu, **options)
    model = to_onnx.to_model(forward, converter)
    check_contract(model, 2, gelu)
    path = to_onnx.save(model, tmp_path)
    for batch in (1, 3, 128):  # The last is more than the graph was traced with.
        x = images(batch, 16)
        assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-5


def test_graph_of_the_newer_parts_is_as_whole(converter, make_forward, tmp_path):
    parts = {"layer_scale": 0.1, "num_registers": 2, "mlp": "swiglu", "distillation_token": True}
    forward = make_forward(gelu="tanh", **parts)
    model = to_onnx.to_model(forward, converter)
    count = operators(model)
    assert set(count) <= TENSORRT_8_6
    assert (count["Softmax"], count["LayerNormalization"]) == (2, 2 * 2 + 1)
    assert not count["Expand"]  # Tokens are not repeated for each image.
    path = to_onnx.save(model, tmp_path)
    for batch in (1, 3):
        x = images(batch, 16)
        assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-5


def test_graph_of_attention_pooling_does_not_repeat_its_query(converter, make_forward, tmp_path):
    forward = make_forward(gelu="tanh", classifier="map")
    model = to_onnx.to_model(forward, converter)
    count = operators(model)
    assert set(count) <= TENSORRT_8_6
    assert (count["Softmax"], count["LayerNormalization"]) == (2 + 1, 2 * 2 + 1 + 1)
    assert len(gelus(model, "tanh")) == 3
    path = to_onnx.save(model, tmp_path)
    file = read_onnx(path)
    found = report(["fused_mha"] * 2 + ["softmax"], [], file.softmaxes, file.metadata)["attention"]
    assert (found["fused"], found["softmax_nodes"]) == (True, 2)
    for batch in (1, 3, 128):
        x = images(batch, 16)
        assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "ViT-Ti/16",
        "ViT-B/16",
        pytest.param("ViT-L/16", marks=pytest.mark.slow),
        pytest.param("ViT-H/14", marks=pytest.mark.slow),
    ],
)
def test_graph_contract_holds_for_the_models_of_the_paper(converter, make_forward, name):
    if converter == "jax2onnx" and name != "ViT-Ti/16":
        pytest.skip("the graph depends on the layers' form, which Ti has; jax2onnx is slow")
    # Their real shapes; of the large ones every weight is one number that has all elements.
    weights = "random" if name == "ViT-Ti/16" else "constant"
    forward = make_forward(name, image_size=224, gelu="erf", num_classes=1000, weights=weights)
    model = to_onnx.to_model(forward, converter)
    check_contract(model, forward.num_layers)
    tokens = (224 // int(name[-2:])) ** 2 + 1
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    assert softmax.outputs[0].shape[1:] == (models_heads(name), tokens, tokens)


def models_heads(name: str) -> int:
    return {"Ti": 3, "B": 12, "L": 16, "H": 16}[name[4:-3]]


HYBRID = {"architecture": "hybrid", "resnet_layers": (1, 1), "patch_size": 1}


def test_graph_of_a_hybrid_has_plain_convolutions_and_whole_norms(
    converter, make_forward, tmp_path
):
    forward = make_forward(image_size=32, gelu="erf", **HYBRID)
    model = to_onnx.to_model(forward, converter)
    count = operators(model)
    # The root, and two units of three convolutions and a shortcut.
    assert count["Conv"] == count["InstanceNormalization"] == 9
    assert count["Relu"] == 7
    # To channels first and back, and four in each layer of attention.
    assert count["Transpose"] == 2 + 4 * 2
    # A convolution has its norm (5 nodes) and Relu; a unit has its sum.
    assert sum(count.values()) <= 30 * 2 + 20 + 7 * 9 + 2
    assert set(count) <= TENSORRT_8_6
    assert all(
        node.inputs[1].const_value is not None for node in model.graph if node.op_type == "Conv"
    )
    path = to_onnx.save(model, tmp_path)
    for batch in (1, 3):
        x = images(batch, 32)
        assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-5


def test_graph_of_a_resnet_equals_flax_at_any_batch_size(converter, make_forward, tmp_path):
    config = {"architecture": "resnet", "resnet_layers": (1, 1), "num_classes": 5}
    forward = make_forward(image_size=32, only=config)
    model = to_onnx.to_model(forward, converter)
    count = operators(model)
    assert set(count) <= TENSORRT_8_6
    assert count["InstanceNormalization"] == count["Relu"] == 7
    path = to_onnx.save(model, tmp_path)
    for batch in (1, 3, 128):  # The last is more than the graph was traced with.
        x = images(batch, 32)
        assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-5


def test_graph_of_an_axial_model_is_that_of_twice_the_layers(converter, make_forward, tmp_path):
    forward = make_forward(image_size=32, gelu="erf", architecture="axial_vit")
    model = to_onnx.to_model(forward, converter)
    count = operators(model)
    assert count["LayerNormalization"] == 2 * 4 + 1
    assert count["Softmax"] == len(gelus(model, "erf")) == 4
    # A ViT's layer, and the Reshapes to rows and columns and back; columns are two Transposes more.
    assert sum(count.values()) <= 34 * 4 + 20
    assert set(count) <= TENSORRT_8_6
    check_scale_on_q(model, 4)
    path = to_onnx.save(model, tmp_path)
    for batch in (1, 3, 128):  # The last is more than the graph was traced with.
        x = images(batch, 32)
        assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-5


def test_graph_of_an_axial_resnet_equals_flax_at_any_batch_size(converter, make_forward, tmp_path):
    config = {"architecture": "axial_resnet", "resnet_layers": (1, 1), "num_classes": 5}
    forward = make_forward(image_size=32, only=config)
    path = to_onnx.save(to_onnx.to_model(forward, converter), tmp_path)
    for batch in (1, 3, 128):
        x = images(batch, 32)
        assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("need_jax2tf")
def test_graph_contract_holds_for_the_hybrid_of_the_paper(make_forward):
    forward = make_forward(
        "R50+ViT-B/16", image_size=224, gelu="erf", num_classes=1000, weights="constant"
    )
    model = to_onnx.to_model(forward, "jax2tf")
    convolutions = 1 + 3 * (3 + 4 + 9) + 3
    units = 3 + 4 + 9
    count = operators(model)
    assert count["LayerNormalization"] == 2 * 12 + 1
    assert count["Softmax"] == len(gelus(model, "erf")) == 12
    assert count["Conv"] == count["InstanceNormalization"] == convolutions
    assert sum(count.values()) <= 30 * 12 + 20 + 7 * convolutions + units


@pytest.mark.slow
@pytest.mark.usefixtures("need_jax2tf")
def test_base_in_either_format_equals_flax_at_any_batch_size(make_forward, tmp_path):
    forward = make_forward("ViT-B/16", image_size=96, num_classes=1000)  # 64 large ones take long
    flax = forward.jitted()
    paths = [to_tf(forward, tmp_path), to_onnx.save(to_onnx.to_model(forward), tmp_path)]
    for batch in (1, 3, 64):
        x = images(batch, 96)
        expected = flax(x)
        for path in paths:
            with runtime.load(path) as model:
                assert relative_difference(model.predict(x), expected) < 1e-5


def test_probabilities_sum_to_one_and_features_are_the_heads_input(
    converter, make_forward, tmp_path
):
    x = images(3, 16)
    logits = make_forward().jitted()(x)
    forward = make_forward(outputs="probabilities")
    probabilities = run(to_onnx.save(to_onnx.to_model(forward, converter), tmp_path / "p"), x)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)

    forward = make_forward(outputs="features")
    features = run(to_onnx.save(to_onnx.to_model(forward, converter), tmp_path / "f"), x)
    head = make_forward().params["head"]
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-4)


def test_preprocessing_in_the_graph_takes_pixels(converter, make_forward, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    forward = make_forward(image_size="16x24", include_preprocessing=True)
    path = to_onnx.save(to_onnx.to_model(forward, converter), tmp_path)
    expected = make_forward(image_size="16x24").jitted()((pixels / 127.5 - 1).astype(np.float32))
    assert relative_difference(run(path, pixels), expected) < 1e-5
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_metadata_tells_classes_and_preprocessing(converter, make_forward, tmp_path):
    names = ["Löwe", "b", "c", "d", "e"]
    forward = make_forward(image_size="8x16", class_names=names)
    path = to_onnx.save(to_onnx.to_model(forward, converter), tmp_path)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["class_names"]) == names
    assert json.loads(metadata["preprocessing"])["mean"] == [0.5, 0.5, 0.5]
    assert json.loads(metadata["preprocessing"])["image_size"] == "8x16"
    assert read_onnx(path).inputs[0].shape == (-1, 8, 16, 3)


def test_weights_that_repeat_are_stored_once(converter, make_forward):
    forward = make_forward()
    layers = forward.params["Transformer"]
    layers["encoderblock_1"] = jax.tree.map(np.copy, layers["encoderblock_0"])
    one_layer = make_forward(num_layers=1)
    sizes = [
        sum(value.const_value.nbytes for value in model.graph.initializers.values())
        for model in (to_onnx.to_model(f, converter) for f in (forward, one_layer))
    ]
    assert sizes[0] == sizes[1]


def test_weights_keep_the_names_of_their_parameters(converter, make_forward):
    model = to_onnx.to_model(make_forward(), converter)
    names = set(model.graph.initializers)
    assert {"head/kernel", "Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias"} <= names
    assert len({node.name for node in model.graph}) == len(list(model.graph))


def test_large_models_have_their_weights_beside_them(
    converter, make_forward, tmp_path, monkeypatch
):
    monkeypatch.setattr(to_onnx, "_EXTERNAL_ABOVE", 1024)
    forward = make_forward()
    model = to_onnx.to_model(forward, converter)
    to_onnx.save(model, tmp_path)
    path = to_onnx.save(to_onnx.to_model(forward, converter), tmp_path)  # Replaces both files.
    assert len(list(tmp_path.iterdir())) == 2
    assert path.stat().st_size < 50_000
    x = images(2, 16)
    assert relative_difference(run(path, x), forward.jitted()(x)) < 1e-5


def test_a_write_that_fails_leaves_the_file_that_was_there(
    converter, make_forward, tmp_path, monkeypatch
):
    path = to_onnx.save(to_onnx.to_model(make_forward(), converter), tmp_path)
    before = path.read_bytes()

    full = OSError(28, "No space left on device")
    monkeypatch.setattr(onnx.checker, "check_model", unittest.mock.Mock(side_effect=full))
    with pytest.raises(UserError, match="No space left on device"):
        to_onnx.save(to_onnx.to_model(make_forward(num_layers=1), converter), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_an_unknown_converter_is_refused(make_forward):
    with pytest.raises(UserError, match="'tf' is unknown: use jax2tf or jax2onnx"):
        to_onnx.to_model(make_forward(), "tf")


def test_a_jax_without_graph_serialization_names_both_ways_out(make_forward):
    if can_serialize_graphs():
        pytest.skip("this JAX has it")
    with pytest.raises(UserError, match=r"\.\[export\].*jax2onnx"):
        to_onnx.to_model(make_forward(), "jax2tf")
