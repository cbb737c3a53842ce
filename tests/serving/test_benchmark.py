"""The benchmark of the server: bare onnxruntime on models of all kinds of input."""

import importlib
from pathlib import Path

import pytest

from . import tiny


@pytest.mark.parametrize("dtype", ["FLOAT", "UINT8"])
@pytest.mark.parametrize("batch", ["batch", 3])
def test_bare_onnxruntime_gets_what_the_model_takes(folder, monkeypatch, dtype, batch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    tiny.save_onnx(folder / "model.onnx", dtype=dtype, batch=batch)
    images = [tiny.encode(tiny.pixels(seed)) for seed in range(2)]
    assert importlib.import_module("serving").bare(str(folder), images, 0.01) > 0
