import hashlib
import os

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.export.onnx_file import Tensor, read_metadata, read_onnx

onnx = pytest.importorskip("onnx", reason="needs the export extra", exc_type=ImportError)
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def save(path, *, dtype=np.float32, quantized=False, batch="batch", **options):
    """images @ weights, then Softmax; 600 weights, and 200 more in float32."""
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = numpy_helper.from_array(np.arange(600).reshape(30, 20).astype(dtype), "weights")
    bias = numpy_helper.from_array(np.zeros((200, 1), np.float32), "bias")
    nodes = [
        helper.make_node("MatMul", ["images", "weights"], ["x"]),
        helper.make_node("Softmax", ["x"], ["logits"]),
    ]
    if quantized:
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s"], ["unused"]))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", onnx_type, [batch, 30])],
        [helper.make_tensor_value_info("logits", onnx_type, [batch, 20])],
        [weights, bias],
    )
    model = helper.make_model(graph)
    helper.set_model_props(model, {"class_names": '["rose", "água"]', "pixels": "uint8"})
    onnx.save(model, path, **options)
    return path


def test_reads_what_the_file_says_of_itself(tmp_path):
    path = save(tmp_path / "model.onnx")
    found = read_onnx(path)
    assert found.inputs == (Tensor("images", "FLOAT", (-1, 30)),)
    assert found.outputs == (Tensor("logits", "FLOAT", (-1, 20)),)
    assert found.softmaxes == 1
    assert found.metadata == {"class_names": '["rose", "água"]', "pixels": "uint8"}
    assert read_metadata(path) == found.metadata
    assert found.sha256 == {"model.onnx": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_fixed_batch_is_a_number(tmp_path):
    found = read_onnx(save(tmp_path / "model.onnx", batch=3))
    assert found.inputs[0].shape == (3, 30)


@pytest.mark.parametrize("dtype, precision", [(np.float32, "fp32"), (np.float16, "fp16")])
def test_the_precision_is_that_of_most_weights(tmp_path, dtype, precision):
    found = read_onnx(save(tmp_path / "model.onnx", dtype=dtype))
    assert found.precision == precision
    assert found.weight_types == {"fp32", precision}


def test_bfloat16_is_recognized(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert read_onnx(save(tmp_path / "m.onnx", dtype=ml_dtypes.bfloat16)).precision == "bf16"


def test_quantized_nodes_make_it_int8_whatever_its_weights_are(tmp_path):
    found = read_onnx(save(tmp_path / "model.onnx", dtype=np.float16, quantized=True))
    assert found.precision == "int8"
    assert "fp16" in found.weight_types


def test_external_data_belongs_to_the_file(tmp_path):
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "model.onnx.data"}
    path = save(tmp_path / "model.onnx", **options)
    data = tmp_path / "model.onnx.data"
    found = read_onnx(path)
    assert found.precision == "fp32"
    assert found.sha256["model.onnx.data"] == hashlib.sha256(data.read_bytes()).hexdigest()
    data.unlink()
    with pytest.raises(UserError, match=r"model\.onnx\.data.*side by side"):
        read_onnx(path)


@pytest.mark.parametrize("content", [b"", b"no onnx", b"\x00" * 64, bytes(range(256)) * 4])
def test_what_is_not_onnx_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx is not an ONNX file") as caught:
        read_onnx(path)
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_file_is_an_error_and_none_a_crash(tmp_path):
    whole = save(tmp_path / "model.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    # What follows the graph are only the operator set and the metadata.
    for size in range(0, whole.index(b"graph"), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_onnx(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.onnx cannot be read"):
        read_onnx(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("name", ["./model.onnx.data", "link"])
def test_weights_may_lie_behind_a_link_of_the_folder(tmp_path, name):
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "model.onnx.data"}
    path = save(tmp_path / "model.onnx", **options)
    sha256 = read_onnx(path).sha256["model.onnx.data"]
    os.symlink(tmp_path / "model.onnx.data", tmp_path / "link")
    name_weights(path, name)
    assert read_onnx(path).sha256[name] == sha256


def name_weights(path, name):
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("name", ["/dev/zero", "../other", "a/../model.onnx", "zero", "\x1b[2J"])
def test_weights_outside_its_folder_are_never_read(tmp_path, name):
    os.symlink("/dev/zero", tmp_path / "zero")
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "model.onnx.data"}
    path = save(tmp_path / "model.onnx", **options)
    name_weights(path, name)
    with pytest.raises(UserError, match="must lie in its own folder") as caught:
        read_onnx(path)
    assert str(caught.value).isprintable()
