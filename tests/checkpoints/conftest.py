import threading

import pytest

from vit_jax.checkpoints import download

from .array_files import import_torch
from .bucket import Bucket


@pytest.fixture
def torch():
    return import_torch()


@pytest.fixture(autouse=True)
def no_other_bucket(monkeypatch):
    monkeypatch.delenv("VIT_JAX_BUCKET_URL", raising=False)


@pytest.fixture
def bucket(monkeypatch):
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("VIT_JAX_BUCKET_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_FIRST_PAUSE", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setenv("VIT_JAX_BUCKET_URL", "http://127.0.0.1:1")  # no one listens there
