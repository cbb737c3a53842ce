"""A model of one product in an ONNX file, and what it should answer, by NumPy and PIL alone."""

import dataclasses
import io
import json

import numpy as np
from PIL import Image

from vit_jax.data.protocols import Preprocessing

SIZE, CLASSES = 8, 5
PREPROCESSING = Preprocessing(SIZE, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.25))
NAMES = ["daisy", "rose", "<script>alert(1)</script>", "tulip\x1b[2J", "iris"]
WEIGHTS = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, CLASSES)).astype(np.float32)
METADATA = {
    "preprocessing": json.dumps(dataclasses.asdict(PREPROCESSING)),
    "class_names": json.dumps(NAMES),
    "loss": "softmax",
    "output": "logits",
    "source": "tiny.npz",
}


def save_onnx(path, *, dtype="FLOAT", batch="batch", weights=WEIGHTS, **metadata):
    """outputs = the pixels of an image @ weights; metadata of None are left out."""
    import onnx

    helper, from_array = onnx.helper, onnx.numpy_helper.from_array
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["outputs"]),
    ]
    kind = getattr(onnx.TensorProto, dtype)
    shape = np.array([-1, len(weights)], np.int64)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", kind, [batch, SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("outputs", onnx.TensorProto.FLOAT, [batch, len(weights.T)])],
        [from_array(shape, "shape"), from_array(weights, "weights")],
    )
    return _save(path, graph, metadata)


def save_raw_onnx(path, **metadata):
    """outputs = the means of the channels of an image of any size @ the first rows of WEIGHTS."""
    import onnx

    helper = onnx.helper
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["outputs"]),
    ]
    shape = ["batch", "height", "width", 3]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("outputs", onnx.TensorProto.FLOAT, ["batch", CLASSES])],
        [onnx.numpy_helper.from_array(WEIGHTS[:3], "weights")],
    )
    return _save(path, graph, {"pixels": "raw", **metadata})


def _save(path, graph, metadata):
    import onnx

    helper = onnx.helper
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    given = {key: value for key, value in (METADATA | metadata).items() if value is not None}
    helper.set_model_props(model, given)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def encode(image, kind="PNG"):
    """The file of an image."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind)
    return data.getvalue()


def logits(image):
    """Of an image of the model's size, which is neither resized nor cropped."""
    normalized = (image / 255 - PREPROCESSING.mean) / PREPROCESSING.std
    return normalized.reshape(-1) @ WEIGHTS.astype(np.float64)


def probabilities(image):
    exponents = np.exp(logits(image) - logits(image).max())
    return exponents / exponents.sum()


def check(answer, image):
    """Compares an answer of /predict to an image as its only file."""
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    check_classes(result["predictions"], image)


def check_classes(predictions, image):
    expected = probabilities(image)
    assert [each["index"] for each in predictions] == list(np.argsort(-expected))
    for each in predictions:
        assert each["label"] == NAMES[each["index"]]
        np.testing.assert_allclose(each["probability"], expected[each["index"]], rtol=1e-4)
