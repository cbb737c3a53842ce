import importlib.util

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.protocols import Preprocessing
from vit_jax.export.to_tf import can_serialize_graphs
from vit_jax.image_size import sides

from . import fake_tensorrt

TINY = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 32,
    "num_layers": 2,
    "mlp_dim": 64,
    "num_heads": 2,
    "num_classes": 5,
}


EXPORT_OPTIONS = {"outputs", "layer", "include_preprocessing", "free_size"}


@pytest.fixture
def need_jax2tf():
    if not can_serialize_graphs():
        pytest.skip("jax2tf emits TensorFlow graphs up to JAX 0.7.1")
    pytest.importorskip("tf2onnx", reason="needs the export extra: pip install -e '.[export]'")


@pytest.fixture(params=["jax2tf", "jax2onnx"])
def converter(request):
    """Each of the two that is installed here."""
    pytest.importorskip("onnxscript", reason="needs the export extra: pip install -e '.[export]'")
    if request.param == "jax2tf":
        request.getfixturevalue("need_jax2tf")
    elif not importlib.util.find_spec("jax2onnx"):
        pytest.skip("needs jax2onnx, see docs/deployment.md")
    return request.param


@pytest.fixture
def make_forward():
    """Any model with random weights, or with weights that take no memory."""
    from vit_jax.export.forward import make_forward

    def make(
        name=None,
        image_size=16,
        channels=3,
        weights="random",
        class_names=None,
        loss="softmax",
        **config,
    ):
        export = {key: config.pop(key) for key in EXPORT_OPTIONS & set(config)}
        if only := config.pop("only", None):
            config = only
        else:
            config = {**(models.model_config(name) if name else TINY), "num_classes": 5, **config}
        images = jax.ShapeDtypeStruct((1, *sides(image_size), channels), np.float32)
        init = models.create_model(config).init
        params = jax.eval_shape(init, jax.random.key(0), images)["params"]
        generator = np.random.default_rng(0)

        def weight(leaf):
            if weights == "random":
                x = generator.standard_normal(leaf.shape, dtype=np.float32)
                return x * np.float32(0.5 / max(leaf.shape[0], 4) ** 0.5)
            return np.broadcast_to(np.float32(0.5), leaf.shape)  # All elements at one address.

        params = jax.tree.map(weight, params)
        preprocessing = Preprocessing(image_size=image_size).with_channels(channels)
        pretrained = Pretrained(params, config, preprocessing, class_names, loss, "random")
        return make_forward(pretrained, **export)

    return make


@pytest.fixture
def onnx_file(tmp_path):
    """Writes an ONNX file with one weight; what is in the network is the fake parser's."""
    onnx = pytest.importorskip("onnx", reason="needs the export extra", exc_type=ImportError)

    def make(dtype="float32", quantized=False):
        operators = ["Softmax", *["QuantizeLinear"] * quantized]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(operator, ["a"], ["b"]) for operator in operators],
            "graph",
            [onnx.helper.make_tensor_value_info("images", 1, ["batch", 4, 4, 3])],
            [onnx.helper.make_tensor_value_info("logits", 1, ["batch", 5])],
            [onnx.numpy_helper.from_array(np.ones((2, 2)).astype(dtype), "weights")],
        )
        model = onnx.helper.make_model(graph)
        onnx.helper.set_model_props(model, {"class_names": '["a", "b"]'})
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return path

    return make


@pytest.fixture
def fake(monkeypatch):
    return lambda version, **behavior: fake_tensorrt.install(monkeypatch, version, **behavior)
