"""The model of a folder: found, checked, and refused in a line."""

import sys

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.export.to_tensorrt import build
from vit_jax.serving import __main__, served

from ..export import fake_tensorrt
from . import tiny


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"neither model.onnx nor model.engine"):
        served.load(tmp_path)
    with pytest.raises(UserError, match="nowhere is missing"):
        served.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"preprocessing": None}, "does not say how images are prepared"),
        ({"output": "{path}/predict"}, "gives '{path}/predict': export one of logits"),
        ({"class_names": '["a", "b"]'}, "has 2 class names for 5 classes"),
        (
            {"preprocessing": tiny.METADATA["preprocessing"].replace("8", "16", 1)},
            "its preprocessing makes",
        ),
    ],
)
def test_a_model_that_cannot_be_served_is_one_line(folder, metadata, message):
    tiny.save_onnx(folder / "model.onnx", **metadata)
    with pytest.raises(UserError, match=message) as caught:
        served.load(folder)
    assert "\n" not in str(caught.value)


def test_a_fixed_batch_is_the_largest(folder):
    tiny.save_onnx(folder / "model.onnx", batch=3)
    model = served.load(folder)
    assert model.largest == 3
    rows = model.predict(np.zeros((2, 8, 8, 3), np.float32))
    np.testing.assert_array_equal(rows, np.zeros((2, tiny.CLASSES)))


def test_the_engine_is_taken_where_tensorrt_is(folder, monkeypatch, capsys):
    inputs = [("images", "FLOAT", (-1, 8, 8, 3))]
    fake_tensorrt.install(monkeypatch, "10.0.1", inputs=inputs)
    build(folder / "model.onnx", folder, batch="1:4:8")
    assert served.find(folder) == folder / "model.engine"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert served.find(folder) == folder / "model.onnx"
    assert "model.engine is left out for model.onnx" in capsys.readouterr().out
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match="TensorRT is not installed here"):
        served.find(folder)


def test_without_fastapi_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "vit_jax.serving.app", raising=False)
    with pytest.raises(UserError, match=r"serving needs more packages .*pip install '\.\[serve\]'"):
        __main__.main(["--model", str(folder), "--port", "0"])
