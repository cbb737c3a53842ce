"""The Triton repository's decoder, run with a stand-in of Triton's module, and its ensemble."""

import dataclasses
import importlib
import io
import json
import sys
import types
from unittest import mock

import numpy as np
import pytest
from PIL import Image, features

from vit_jax.data.images import preprocess, read_image
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export.deploy import write_deploy

from .test_deploy import onnx, read_config

RULES = {
    "whole": Preprocessing(16),
    "timm": Preprocessing(16, 0.9, "bicubic", True, resize="timm"),
    "areas": Preprocessing(16, 0.875, "area", resize="big_vision"),
    "gray": Preprocessing(16, 0.875).with_channels(1),
}


def deployed(folder, rule, *, kind="FLOAT", pixels="preprocessed", batch="batch", **options):
    """The folder of a model that does nothing of use."""
    helper = onnx.helper
    shape = ["height", "width"] if pixels == "raw" else list(rule.image_shape[:2])
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["images"], ["logits"])],
        "graph",
        [
            helper.make_tensor_value_info(
                "images", getattr(onnx.TensorProto, kind), [batch, *shape, rule.channels]
            )
        ],
        [helper.make_tensor_value_info("logits", 1, [batch, 2])],
    )
    model = helper.make_model(graph)
    metadata = {"preprocessing": json.dumps(dataclasses.asdict(rule)), "pixels": pixels}
    metadata |= {"class_names": json.dumps(["a", "b"]), "precision": "fp32"}
    helper.set_model_props(model, metadata)
    onnx.save(model, folder / "model.onnx")
    return write_deploy(folder, batch="1:2:8", **options)


class Response:
    """Triton's, of tensors or of an error."""

    def __init__(self, tensors, error=None):
        self.tensors, self.error = tensors, error


class Tensor:
    """Triton's, a name and an array."""

    def __init__(self, name, array):
        self.name, self._array = name, array

    def as_numpy(self):
        return self._array


@pytest.fixture
def decoder(monkeypatch):
    """The class in a model.py, which may import neither this package nor JAX."""
    stub = types.ModuleType("triton_python_backend_utils")
    stub.Tensor, stub.InferenceResponse, stub.TritonError = Tensor, Response, str
    stub.get_input_tensor_by_name = lambda request, name: request[name]

    def load(target):
        found = {}
        text = (target / "models/vit_decode/1/model.py").read_text(encoding="utf-8")
        with monkeypatch.context() as there:
            there.setitem(sys.modules, stub.__name__, stub)
            for name in ("vit_jax", "jax", "scipy"):
                there.setitem(sys.modules, name, None)
            exec(compile(text, "model.py", "exec"), found)
        model = found["TritonPythonModel"]()
        model.initialize({})
        return lambda *requests: model.execute(
            [{"encoded": Tensor("encoded", np.array(x, np.object_))} for x in requests]
        )

    return load


def encoded(height, width, kind="JPEG"):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    if kind == "deep PNG":
        deep = np.random.default_rng(height).integers(0, 65536, (height, width), np.uint16)
        Image.fromarray(deep).save(file, "PNG")
    elif kind == "transparent GIF":
        indices = Image.fromarray(pixels[..., 0] % 4).convert("P")
        indices.putpalette([9, 200, 30, 250, 240, 230, 10, 90, 250, 128, 5, 60])
        indices.save(file, "GIF", transparency=1)
    else:
        Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


KINDS = ["PNG", "deep PNG", "GIF", "transparent GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000"]
KINDS += ["AVIF"] * features.check("avif")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_decoder_prepares_images_as_evaluation_does(rule, tmp_path, decoder):
    execute = decoder(deployed(tmp_path, rule))
    files = [encoded(53, 37), encoded(20, 90, "PNG"), encoded(16, 16)]
    both, alone = execute([[files[0]], [files[1]]], [[files[2]]])
    assert both.error is None and both.tensors[0].name == "images"
    found = np.concatenate([both.tensors[0].as_numpy(), alone.tensors[0].as_numpy()])
    assert found.dtype == np.float32
    images = [read_image("x", file, channels=rule.channels) for file in files]
    expected = np.stack([preprocess(image, rule) for image in images])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_decoder_reads_what_evaluation_reads(kind, channels, tmp_path, decoder):
    rule = RULES["whole"].with_channels(channels)
    execute = decoder(deployed(tmp_path, rule, kind="UINT8", pixels="raw"))
    file = encoded(20, 30, kind)
    (answer,) = execute([[file]])
    assert answer.error is None
    expected = read_image("x", file, channels=channels)
    np.testing.assert_array_equal(answer.tensors[0].as_numpy(), expected[None])


def test_a_damaged_image_is_an_error_of_its_request_alone(tmp_path, decoder):
    execute = decoder(deployed(tmp_path, RULES["whole"]))
    bad, good = execute([[b"no image\x1b"]], [[encoded(9, 9)]])
    assert good.error is None
    assert bad.tensors == [] and "cannot be read: UnidentifiedImageError" in bad.error
    assert bad.error.isprintable()
    # PIL would start Ghostscript.
    (postscript,) = execute([[b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]])
    assert "UnidentifiedImageError" in postscript.error


def test_of_a_model_that_prepares_images_itself_it_only_decodes(tmp_path, decoder):
    target = deployed(tmp_path, RULES["timm"], kind="UINT8", pixels="raw")
    execute = decoder(target)
    one, several = execute([[encoded(53, 37, "PNG")]], [[encoded(9, 9)], [encoded(8, 9)]])
    assert one.tensors[0].as_numpy().shape == (1, 53, 37, 3)
    assert one.tensors[0].as_numpy().dtype == np.uint8
    assert "same shape" in several.error
    config = read_config(target / "models/vit_decode/config.pbtxt")
    assert list(config.output[0].dims) == [-1, -1, 3]
    # TensorRT would not take it.
    served = read_config(target / "models/vit_onnx/config.pbtxt")
    assert not served.optimization.execution_accelerators.gpu_execution_accelerator
    readme = (target / "README.md").read_text()
    assert "antialiased Resize" in readme and "trtexec" not in readme


def test_the_ensemble_leads_from_files_to_logits(tmp_path):
    target = deployed(tmp_path, RULES["whole"], name="flowers", decoders=3)
    models = target / "models"
    assert {path.name for path in models.iterdir()} == {"flowers", "flowers_decode", "flowers_onnx"}
    ensemble, decode, served = (
        read_config(models / name / "config.pbtxt")
        for name in ("flowers", "flowers_decode", "flowers_onnx")
    )
    assert (ensemble.platform, ensemble.max_batch_size) == ("ensemble", 8)
    assert str(ensemble.input[0]) == str(decode.input[0])  # Of two classes of messages.
    assert (decode.input[0].data_type, list(decode.input[0].dims)) == (13, [1])
    first, second = ensemble.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == ("flowers_decode", "flowers_onnx")
    assert (first.model_version, second.model_version) == (-1, -1)
    assert dict(first.input_map) == {"encoded": "encoded"}
    assert first.output_map["images"] == second.input_map["images"]
    assert dict(second.output_map) == {"logits": "logits"}
    assert (decode.backend, decode.max_batch_size) == ("python", 8)
    assert (decode.output[0].name, list(decode.output[0].dims)) == ("images", [16, 16, 3])
    assert decode.output[0].data_type == served.input[0].data_type
    assert (decode.instance_group[0].count, decode.instance_group[0].kind) == (3, 2)
    assert (models / "flowers" / ensemble.output[0].label_filename).read_text() == "a\nb\n"
    assert (models / "flowers" / "1").is_dir()
    compile((target / "client.py").read_text(), "client.py", "exec")


def test_gpus_run_onnx_by_tensorrt_and_the_cpu_beside_them(tmp_path):
    target = deployed(tmp_path, RULES["whole"], instances=2, cpu_instances=1)
    config = read_config(target / "models/vit_onnx/config.pbtxt")
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, 1), (1, 2)]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["precision_mode"] == "FP32"

    (tmp_path / "model.engine").write_bytes(b"built elsewhere")
    target = write_deploy(tmp_path, instances=0, cpu_instances=3)
    config = read_config(target / "models/vit_onnx/config.pbtxt")
    assert [(group.count, group.kind) for group in config.instance_group] == [(3, 2)]
    assert not config.HasField("optimization")
    assert not (target / "models/vit_tensorrt").exists()
    with pytest.raises(UserError, match="must be one at least"):
        write_deploy(tmp_path, instances=0)


def test_the_ensemble_takes_the_engine_where_there_is_one(tmp_path):
    deployed(tmp_path, RULES["whole"])
    (tmp_path / "model.engine").write_bytes(b"built elsewhere")
    target = write_deploy(tmp_path, batch="1:2:4")
    ensemble = read_config(target / "models/vit/config.pbtxt")
    assert ensemble.ensemble_scheduling.step[1].model_name == "vit_tensorrt"
    assert ensemble.max_batch_size == 4


def test_there_is_no_ensemble_of_a_fixed_batch_or_of_many_channels(tmp_path):
    for options in ({"batch": 3}, {}):
        rule = RULES["whole"] if options else RULES["whole"].with_channels(5)
        target = deployed(tmp_path, rule, **options)
        assert [path.name for path in (target / "models").iterdir()] == ["vit_onnx"]
        assert not (target / "client.py").exists()


def test_the_client_asks_the_ensemble_for_classes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tritonclient", reason="needs tritonclient")
    # What carries the request, of which none is sent here.
    for module in ("gevent", "gevent.pool", "geventhttpclient", "geventhttpclient.url"):
        monkeypatch.setitem(sys.modules, module, mock.MagicMock())
    http = importlib.import_module("tritonclient.http")
    target = deployed(tmp_path, RULES["whole"])
    (tmp_path / "photo.jpg").write_bytes(encoded(9, 9))
    asked = []

    class Answer:
        def as_numpy(self, name):
            return np.array([[f"0.9:1:{name}"]])

    def infer(_client, name, inputs, outputs):
        asked.append((name, inputs[0].name(), inputs[0].datatype(), list(inputs[0].shape())))
        asked.append((outputs[0].name(), inputs[0]._get_binary_data()[4:]))
        return Answer()

    monkeypatch.setattr(http.InferenceServerClient, "infer", infer)
    monkeypatch.setattr(sys, "argv", ["client.py", str(tmp_path / "photo.jpg")])
    exec(compile((target / "client.py").read_text(), "client.py", "exec"), {})
    assert asked == [("vit", "encoded", "BYTES", [1, 1]), ("logits", encoded(9, 9))]
    assert "0.9:1:logits" in capsys.readouterr().out
