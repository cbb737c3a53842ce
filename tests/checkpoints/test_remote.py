import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vit_jax.checkpoints import download, remote
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
PATH = "/imagenet21k/ViT-B_16.npz"
BLOCK = 65_536  # what is written at once; what comes after the last whole one may be lost


@dataclasses.dataclass
class Blob:
    """A file as the bucket has it, and how the server misbehaves about it."""

    body: bytes
    etag: str = '"first"'
    hashes: str | None = None  # by default the MD5 of the body
    break_after: list[int] = dataclasses.field(default_factory=list)  # bytes sent by each answer
    statuses: list[int] = dataclasses.field(default_factory=list)  # answered first
    claimed: int | None = None  # the length that is told in place of the true one
    ignores_if_range: bool = False
    encoding: str | None = None
    stored_length: int | None = None
    pace: float = 0.0  # seconds between two pieces

    def goog_hash(self) -> str:
        if self.hashes is not None:
            return self.hashes
        return "md5=" + base64.b64encode(hashlib.md5(self.body).digest()).decode()


class Bucket(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, Blob] = {}
        self.requests: list[dict[str, str]] = []
        self.sent: list[int] = []  # bytes of the body of each answer
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append({"path": self.path, **self.headers})
        blob = server.blobs.get(self.path)
        status = 404 if blob is None else blob.statuses.pop(0) if blob.statuses else 200
        if status != 200:
            self.send_error(status)
            return
        start, claimed = 0, blob.claimed or len(blob.body)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, blob.etag) or blob.ignores_if_range
        if wanted and same:
            start = int(wanted[1])
            if start >= claimed:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{claimed - 1}/{claimed}")
        else:
            self.send_response(200)
            self.send_header("x-goog-hash", blob.goog_hash())
        self.send_header("ETag", blob.etag)
        self.send_header("Content-Length", str(claimed - start))
        if blob.encoding:
            self.send_header("x-goog-stored-content-encoding", blob.encoding)
        if blob.stored_length:
            self.send_header("x-goog-stored-content-length", str(blob.stored_length))
        self.end_headers()
        piece = blob.body[start:]
        if blob.break_after:
            piece = piece[: blob.break_after.pop(0)]
        server.sent.append(0)
        for i in range(0, len(piece), 1 << 14):
            self.wfile.write(piece[i : i + (1 << 14)])
            self.wfile.flush()
            server.sent[-1] += len(piece[i : i + (1 << 14)])
            time.sleep(blob.pace)


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


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("VIT_JAX_BUCKET_URL", raising=False)
    monkeypatch.setattr(download, "_FIRST_PAUSE", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setenv("VIT_JAX_BUCKET_URL", "http://127.0.0.1:1")  # no one listens there


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def files(directory: pathlib.Path) -> list[str]:
    return sorted(str(x.relative_to(directory)) for x in directory.rglob("*") if x.is_file())


@contextlib.contextmanager
def refused(*parts: str):
    """One line that has all the parts."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


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


def test_a_cut_connection_is_resumed_where_it_broke(bucket, cache):
    body = random_bytes(30 * BLOCK + 7)
    bucket.blobs[PATH] = Blob(body, break_after=[10 * BLOCK, 5 * BLOCK + 1234])
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert bucket.sent == [10 * BLOCK, 5 * BLOCK + 1234, 15 * BLOCK + 7]
    assert [x.get("Range") for x in bucket.requests] == [
        None,
        f"bytes={10 * BLOCK}-",
        f"bytes={15 * BLOCK}-",
    ]
    assert [x.get("If-Range") for x in bucket.requests] == [None, '"first"', '"first"']
    assert files(cache) == [PATH[1:]]


def test_what_came_is_kept_for_the_next_call(bucket, cache):
    body = random_bytes(10 * BLOCK)
    bucket.blobs[PATH] = blob = Blob(body, break_after=[4 * BLOCK, 0, 0, 0])
    way_out = f"put ViT-B_16.npz from {bucket.url}{PATH} at {cache / PATH[1:]}"
    with refused("ViT-B_16 is not in the cache", "broke off", "262,144 bytes", way_out):
        remote.fetch("ViT-B_16")
    assert (cache / f"{PATH[1:]}.partial").read_bytes() == body[: 4 * BLOCK]
    assert not blob.break_after  # It tried as often as it should, no more.
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert bucket.sent == [4 * BLOCK, 0, 0, 0, 6 * BLOCK]
    assert files(cache) == [PATH[1:]]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_a_file_that_changed_meanwhile_is_begun_anew(bucket, cache, ignores_if_range):
    old, new = random_bytes(500_000, 1), random_bytes(600_000, 2)
    bucket.blobs[PATH] = Blob(old, break_after=[3 * BLOCK, 0, 0, 0])
    with refused("196,608 bytes"):
        remote.fetch("ViT-B_16")
    bucket.blobs[PATH] = Blob(new, etag='"second"', ignores_if_range=ignores_if_range)
    assert remote.fetch("ViT-B_16").read_bytes() == new
    assert files(cache) == [PATH[1:]]


def test_a_file_that_shrank_meanwhile_is_begun_anew(bucket):
    new = random_bytes(100_000, 2)
    bucket.blobs[PATH] = Blob(random_bytes(500_000), break_after=[3 * BLOCK, 0, 0, 0])
    with refused("196,608 bytes"):
        remote.fetch("ViT-B_16")
    bucket.blobs[PATH] = Blob(new, etag='"second"', ignores_if_range=True)
    assert remote.fetch("ViT-B_16").read_bytes() == new
    assert bucket.sent[-1] == 100_000


def test_an_unfinished_download_of_unknown_origin_is_begun_anew(bucket, cache):
    body = random_bytes(300_000)
    bucket.blobs[PATH] = Blob(body)
    partial = cache / f"{PATH[1:]}.partial"
    partial.parent.mkdir(parents=True)
    for note in (None, "not json", '{"etag": 1}', "[]"):
        partial.write_bytes(b"x" * 1000)
        if note is not None:
            pathlib.Path(f"{partial}.json").write_text(note)
        path = remote.fetch("ViT-B_16")
        assert path.read_bytes() == body
        assert files(cache) == [PATH[1:]]
        path.unlink()


def test_a_killed_process_leaves_what_the_next_one_finishes(bucket, cache):
    body = random_bytes(2_000_000)
    bucket.blobs[PATH] = blob = Blob(body, pace=0.02)
    with start("ViT-B_16") as process:
        deadline = time.time() + 60
        while sum(bucket.sent) < 500_000 and time.time() < deadline:
            time.sleep(0.01)
        process.kill()
    blob.pace = 0
    assert not (cache / PATH[1:]).exists()
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert "Range" in bucket.requests[-1]
    assert files(cache) == [PATH[1:]]


def test_everything_is_there_but_the_rename(bucket, cache):
    body = random_bytes(2 * BLOCK)
    bucket.blobs[PATH] = Blob(body, break_after=[BLOCK, 0, 0, 0])
    with refused("65,536 bytes"):
        remote.fetch("ViT-B_16")
    with open(cache / f"{PATH[1:]}.partial", "ab") as file:
        file.write(body[BLOCK:])
    asked = len(bucket.requests)
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert len(bucket.requests) == asked


def test_a_wrong_md5_deletes_what_came(bucket, cache):
    bucket.blobs[PATH] = Blob(random_bytes(1000), hashes="md5=1B2M2Y8AsgTpgAmY7PhCfg==")
    with refused("ViT-B_16 is not what was published", "not 1B2M2Y8AsgTpgAmY7PhCfg==", "deleted"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_one_altered_byte_is_found_after_a_resume(bucket, cache):
    body = random_bytes(1_000_000)
    bucket.blobs[PATH] = Blob(body, break_after=[6 * BLOCK, 0, 0, 0])
    with refused("393,216 bytes"):
        remote.fetch("ViT-B_16")
    with open(cache / f"{PATH[1:]}.partial", "r+b") as file:
        file.seek(123_456)
        file.write(bytes([body[123_456] ^ 1]))
    with refused("MD5"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []
    assert remote.fetch("ViT-B_16").read_bytes() == body


def test_crc32c_counts_where_there_is_no_md5(bucket, cache):
    pytest.importorskip("google_crc32c", reason="needs google-crc32c", exc_type=ImportError)
    # The check value of CRC-32C, 0xE3069283 for "123456789": RFC 3720, appendix B.4, and others.
    right = base64.b64encode(bytes.fromhex("E3069283")).decode()
    bucket.blobs[PATH] = Blob(b"123456789", hashes=f"crc32c={right}")
    assert remote.fetch("ViT-B_16").read_bytes() == b"123456789"
    (cache / PATH[1:]).unlink()
    bucket.blobs[PATH] = Blob(b"123456788", hashes=f"crc32c={right}")
    with refused("CRC32C", f"not {right}"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_both_checksums_in_one_header(bucket):
    body = random_bytes(1000)
    md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
    bucket.blobs[PATH] = Blob(body, hashes=f"crc32c=AAAAAA==, md5={md5}")
    assert remote.fetch("ViT-B_16").read_bytes() == body


def test_without_a_checksum_it_says_so(bucket, capsys):
    bucket.blobs[PATH] = Blob(b"x", hashes="")
    remote.fetch("ViT-B_16")
    assert "ViT-B_16 could not be verified" in capsys.readouterr().err


def test_a_login_page_is_not_taken_for_the_bucket(bucket, cache, monkeypatch):
    monkeypatch.setattr(remote, "_BUCKET_URL", bucket.url)
    bucket.blobs[PATH] = Blob(b"<html>Please log in", hashes="")
    with refused("ViT-B_16 is not in the cache", "login page", "put ViT-B_16.npz at"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_the_checksum_of_a_compressed_original_is_not_held_against_it(bucket, capsys):
    bucket.blobs[PATH] = Blob(b"x", hashes="md5=1B2M2Y8AsgTpgAmY7PhCfg==", encoding="gzip")
    assert remote.fetch("ViT-B_16").read_bytes() == b"x"
    assert "could not be verified" in capsys.readouterr().err


def test_a_length_that_never_comes(bucket, cache):
    bucket.blobs[PATH] = Blob(b"0123456789", claimed=15)
    with refused("127.0.0.1 broke off"):
        remote.fetch("ViT-B_16")
    assert not (cache / PATH[1:]).exists()


def test_a_file_cut_short_by_its_length_is_not_taken(bucket, cache):
    bucket.blobs[PATH] = Blob(b"0123456789", claimed=7)
    with refused("is not what was published", "MD5"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_a_length_counts_where_there_is_no_checksum(bucket, cache):
    bucket.blobs[PATH] = Blob(b"0123456789", claimed=7, stored_length=10, hashes="")
    with refused("is not what was published (7 bytes came, not 10)"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_a_server_out_of_breath_is_asked_again(bucket):
    bucket.blobs[PATH] = Blob(b"x", statuses=[503, 429, 500])
    assert remote.fetch("ViT-B_16").read_bytes() == b"x"


def test_a_server_that_stays_down_is_given_up(bucket, cache):
    bucket.blobs[PATH] = Blob(b"x", statuses=[503] * 10)
    with refused("127.0.0.1 answers with HTTP status 503", "put ViT-B_16.npz"):
        remote.fetch("ViT-B_16")
    assert len(bucket.requests) == download._ATTEMPTS
    assert files(cache) == []


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_not_in_the_bucket_is_not_asked_for_twice(status, bucket, cache):
    bucket.blobs["/augreg/x.npz"] = Blob(b"x", statuses=[status] * 10)
    with refused("augreg/x is not", f"{bucket.url}/augreg/x.npz", f"status {status}", "check"):
        remote.fetch("augreg/x")
    assert len(bucket.requests) == 1
    assert files(cache) == []


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


FETCH = "import sys; from vit_jax.checkpoints import remote; print(remote.fetch(sys.argv[1]))"


@contextlib.contextmanager
def start(name: str, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, name],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_fetch_one_file_once(bucket, cache):
    body = random_bytes(1_000_000)
    bucket.blobs[PATH] = Blob(body, pace=0.02)
    with start("ViT-B_16") as first, start("ViT-B_16") as second, start("ViT-B_16") as third:
        outputs = [process.communicate(timeout=60) for process in (first, second, third)]
    assert [out for out, _ in outputs] == [f"{cache / PATH[1:]}\n"] * 3
    assert (cache / PATH[1:]).read_bytes() == body
    assert bucket.sent == [len(body)]
    assert files(cache) == [PATH[1:]]


def test_the_waiting_process_takes_over_from_a_killed_one(bucket, cache):
    body = random_bytes(1_000_000)
    bucket.blobs[PATH] = Blob(body, pace=0.02)
    with start("ViT-B_16") as first:
        while not bucket.sent:
            time.sleep(0.01)
        with start("ViT-B_16") as second:
            assert "another process fetches" in second.stderr.readline()
            first.kill()
            out, _ = second.communicate(timeout=60)
    assert out == f"{cache / PATH[1:]}\n"
    assert (cache / PATH[1:]).read_bytes() == body


def test_the_waiting_process_begins_anew_what_another_found_corrupt(bucket, cache):
    body = random_bytes(500_000)
    bucket.blobs[PATH] = Blob(body, pace=0.02, hashes="md5=1B2M2Y8AsgTpgAmY7PhCfg==")
    with start("ViT-B_16") as first:
        while not bucket.sent:
            time.sleep(0.01)
        bucket.blobs[PATH] = Blob(body)
        with start("ViT-B_16") as second:
            assert "another process fetches" in second.stderr.readline()
            assert "is not what was published" in first.communicate(timeout=60)[1]
            out, _ = second.communicate(timeout=60)
    assert out == f"{cache / PATH[1:]}\n"
    assert (cache / PATH[1:]).read_bytes() == body
    assert files(cache) == [PATH[1:]]


def test_a_disk_that_is_full_is_one_line(bucket, cache):
    import resource

    body = random_bytes(2_000_000)
    bucket.blobs[PATH] = Blob(body)

    def limit():  # A file that may not grow fails like a disk without room.
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    with start("ViT-B_16", preexec_fn=limit) as process:
        _, error = process.communicate(timeout=60)
    last = error.splitlines()[-1]
    assert f"UserError: ViT-B_16 cannot be written to {cache / 'imagenet21k'} (File too" in last
    assert "VIT_JAX_CACHE" in last
    assert not (cache / PATH[1:]).exists()
    assert remote.fetch("ViT-B_16").read_bytes() == body


@pytest.mark.usefixtures("bucket")
def test_a_cache_that_is_no_directory_is_one_line(cache):
    cache.write_text("a file")
    with refused("ViT-B_16 cannot be written to", "VIT_JAX_CACHE"):
        remote.fetch("ViT-B_16")


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


# The Hugging Face hub.

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
