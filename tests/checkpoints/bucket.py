"""A server that answers as Google's bucket does, and misbehaves when it is told to."""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

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
