import sys
import types

import pytest

from vit_jax.errors import UserError
from vit_jax.export import nvidia


def test_a_tensorrt_that_is_too_old_is_named(monkeypatch):
    module = type(sys)("tensorrt")
    module.__version__ = "8.5.3.1"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(UserError, match=r"8\.5\.3\.1 is too old"):
        nvidia.import_tensorrt()


def test_cuda_python_is_found_in_its_old_and_its_new_place(monkeypatch):
    old, new = types.ModuleType("cuda.cudart"), types.ModuleType("cuda.bindings.runtime")
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.cudart, bindings.runtime = old, new
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    assert nvidia.import_cudart() is new
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert nvidia.import_cudart() is old
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(UserError, match="pip install cuda-python"):
        nvidia.import_cudart()
