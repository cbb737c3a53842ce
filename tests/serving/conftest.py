import contextlib

import pytest

from . import tiny

WAY_OUT = "needs the serve extra: pip install '.[serve]'"


@pytest.fixture
def folder(tmp_path):
    """What `vit-jax export` writes, with a model of one product."""
    pytest.importorskip("onnx", reason="needs the export extra", exc_type=ImportError)
    pytest.importorskip("onnxruntime", reason=WAY_OUT, exc_type=ImportError)
    tiny.save_onnx(tmp_path / "tiny" / "model.onnx")
    return tmp_path / "tiny"


@pytest.fixture
def start_app(folder):
    """Starts an application in this process; returns its client, and `Served` with `changes`."""
    pytest.importorskip("fastapi", reason=WAY_OUT, exc_type=ImportError)
    pytest.importorskip("httpx2", reason="needs the test extra", exc_type=ImportError)
    import dataclasses

    from fastapi.testclient import TestClient

    from vit_jax.serving.app import Options, create_app
    from vit_jax.serving.served import load

    with contextlib.ExitStack() as stack:

        def start(changes=None, attention=None, **options):
            served = load(folder)
            served = dataclasses.replace(served, **(changes(served) if changes else {}))
            app = create_app(served, Options(**options), attention)
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start


@pytest.fixture
def client(start_app):
    return start_app()
