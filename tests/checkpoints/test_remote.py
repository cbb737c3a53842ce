import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from vit_jax.checkpoints import remote

from .bucket import PATH, ROOT, Blob, files, random_bytes, refused, start

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    "name, path",
    [
        ("ViT-B_16", "imagenet21k/ViT-B_16.npz"),
        ("ViT-B_16.npz", "imagenet21k/ViT-B_16.npz"),
        ("R50+ViT-B_16", "imagenet21k/R50+ViT-B_16.npz"),
        ("ViT-L_16-224", "imagenet21k+imagenet2012/ViT-L_16-224.npz"),
        ("imagenet21k/ViT-H_14", "imagenet21k/ViT-H_14.npz"),
        ("imagenet21k+imagenet2012/ViT-B_16", "imagenet21k+imagenet2012/ViT-B_16.npz"),
        ("sam/ViT-B_32.npz", "sam/ViT-B_32.npz"),
        (
            "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
            "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
        ),
        ("gs://vit_models/lit/LiT-B16B.npz", "lit/LiT-B16B.npz"),
        (
            "https://storage.googleapis.com/vit_models/gsam/ViT-S_16.npz",
            "gsam/ViT-S_16.npz",
        ),
    ],
)
def test_a_name_is_one_file_of_the_bucket(name, path, cache):
    url, place = remote.locate(name)
    assert url == f"https://storage.googleapis.com/vit_models/{path.replace('+', '%2B')}"
    assert place == cache / path


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "imagenet21k/../../x",
        "imagenet21k/..",
        "imagenet21k//x",
        "imagenet21k/.hidden",
        "imagenet21k",
        "imagenet21k/",
        "gs://vit_models/../x",
        "gs://vit_models//etc/passwd",
        "gs://vit_models/x",
        "gs://bit_models/BiT-M-R50x1",
        "https://storage.googleapis.com/vit_models/../x/y",
        "https://example.org/vit_models/x",
        "augreg/a\\..\\b",
        "augreg/a\0b",
        "augreg/a b",
        "augreg/a%2e%2e",
        "augreg/a?b",
        "augreg/a\n",
        "ViT-B_16\n",
        "Mixer-B_16",
        "",
        "hf:owner",
        "hf:../x",
        "hf:a/..",
        "hf:a/b/c",
        "hf:a/b@../../x",
        "hf:a/b@",
    ],
)
def test_a_name_that_could_lead_elsewhere_is_refused(name, bucket, cache):
    with refused(repr(name), "give"):
        remote.fetch(name)
    assert not bucket.requests
    assert not cache.exists()


def test_remote_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remote_names = [
        "hf:google/vit-base-patch16-224",
        "gs://vit_models/augreg/x.npz",
        "https://storage.googleapis.com/vit_models/sam/ViT-B_16.npz",
        "imagenet21k+imagenet2012/ViT-B_16.npz",
        "augreg/B_16-i21k-300ep",
        "ViT-B_16",
        "R50+ViT-L_32",
        "ViT-B_16-224",
        "R26_S_32",
    ]
    paths = ["ViT-B_16.npz", "./ViT-B_16", "runs/b16", "/imagenet21k/x", "~/ViT-B_16", "B_7", ""]
    assert [x for x in remote_names if not remote.is_remote_name(x)] == []
    assert [x for x in paths if remote.is_remote_name(x)] == []
    for name in ("ViT-B_16", "augreg/x.npz", "R26_S_32"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("here")
        assert not remote.is_remote_name(name)


def test_a_file_is_fetched_once_and_then_used_without_the_network(bucket, cache, monkeypatch):
    body = random_bytes(3_000_000)
    bucket.blobs[PATH] = Blob(body)
    path = remote.fetch("ViT-B_16")
    assert path == cache / PATH[1:]
    assert path.read_bytes() == body
    assert files(cache) == [PATH[1:]]
    monkeypatch.setenv("VIT_JAX_BUCKET_URL", "http://127.0.0.1:1")
    assert remote.fetch("gs://vit_models/imagenet21k/ViT-B_16.npz") == path
    assert len(bucket.requests) == 1


@pytest.mark.usefixtures("unreachable")
def test_offline_says_which_file_to_put_where(cache):
    with refused(
        "ViT-B_16 is not in the cache and 127.0.0.1 cannot be reached (Connection refused)",
        f"put ViT-B_16.npz from http://127.0.0.1:1{PATH} at {cache / PATH[1:]}",
    ):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


@pytest.mark.usefixtures("unreachable")
def test_a_file_put_there_by_hand_is_used(cache):
    path = cache / "augreg" / "x.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    assert remote.fetch("augreg/x") == path


def test_the_default_cache_is_in_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("VIT_JAX_CACHE")
        else:
            monkeypatch.setenv("VIT_JAX_CACHE", value)
        assert remote.cache_dir() == pathlib.Path("/home/someone/.cache/vit_jax")


def test_neither_jax_nor_the_network_libraries_are_imported_before_they_are_needed():
    code = (
        "import sys; import vit_jax.checkpoints.remote; "
        "print({'jax', 'numpy', 'tensorflow', 'requests', 'huggingface_hub'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "set()\n"


SHA = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as its client needs for one repository, owner/name."""

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, _ = self.path.partition("?")
        contents = self.server.files
        if path.startswith("/api/models/owner/name/revision/"):
            siblings = [{"rfilename": name} for name in contents]
            self._answer(json.dumps({"id": "owner/name", "sha": SHA, "siblings": siblings}))
        elif path.startswith("/api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(text), "oid": _etag(text)}
                for name, text in contents.items()
            ]
            self._answer(json.dumps(tree))
        elif (name := path.removeprefix(f"/owner/name/resolve/{SHA}/")) in contents:
            self.server.served.append(name)
            self._answer(contents[name], ETag=f'"{_etag(contents[name])}"')
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, text: str, **headers: str) -> None:
        self.send_response(200)
        for key, value in {"X-Repo-Commit": SHA, **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text.encode())


def _etag(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub", exc_type=ImportError)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.daemon_threads = True
    server.files, server.served = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch_apart(name: str, **environment: str) -> tuple[str, str]:
    """Fetches in a process of its own: the hub's client reads its environment when imported."""
    with start(name, env={**os.environ, **environment}) as process:
        out, error = process.communicate(timeout=120)
    return out.strip(), (error.strip().splitlines() or [""])[-1]


def test_a_repository_of_the_hub_comes_without_its_pickles(hub):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    hub.files = {
        "config.json": "{}",
        "preprocessor_config.json": "{}",
        "model.safetensors.index.json": json.dumps(index),
        "model-00001-of-00002.safetensors": "one",
        "pytorch_model.bin": "pickle",
        "model.safetensors.pkl": "pickle",
        "training_args.bin": "pickle",
        "tf_model.h5": "other",
        "README.md": "text",
    }
    folder, error = fetch_apart("hf:owner/name@main")
    assert files(pathlib.Path(folder)) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
    ], error
    assert not [name for name in hub.served if name.endswith((".bin", ".pkl", ".h5"))]
    # What is complete in the cache does without the network.
    assert fetch_apart("hf:owner/name@main", HF_HUB_OFFLINE="1")[0] == folder


def test_a_repository_with_only_pickles_is_refused(hub):
    hub.files = {"config.json": "{}", "pytorch_model.bin": "pickle"}
    out, error = fetch_apart("hf:owner/name")
    assert out == ""
    assert "UserError: hf:owner/name has no model.safetensors: only safetensors are read" in error


def test_a_repository_without_all_its_shards_is_refused(hub):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002"}}
    hub.files = {
        "config.json": "{}",
        "model.safetensors.index.json": json.dumps(index),
        "model-00001-of-00002.safetensors": "one",
    }
    _, error = fetch_apart("hf:owner/name")
    assert "hf:owner/name has no model-00002-of-00002" in error


@pytest.mark.usefixtures("hub")
def test_a_repository_that_does_not_exist_is_one_line():
    _, error = fetch_apart("hf:owner/other")
    assert "UserError: hf:owner/other cannot be fetched (" in error
    assert "check the name" in error


@pytest.mark.usefixtures("hub")
def test_the_hub_offline_says_which_files_to_put_where():
    out, error = fetch_apart("hf:owner/name@v1", HF_ENDPOINT="http://127.0.0.1:1")
    assert out == ""
    assert "UserError: hf:owner/name@v1 is not in the cache and 127.0.0.1 cannot be reach" in error
    assert "model.safetensors from http://127.0.0.1:1/owner/name/tree/v1 into a folder" in error
