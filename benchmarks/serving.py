"""A server under load, `vit-jax serve`, beside bare onnxruntime.

    python benchmarks/serving.py --model deploy/ti16 --images photos --seconds 600 --bad 0.05

Starts a server of the model on a free port, or takes the one at --url, and sends it images over a
number of connections, each of which waits for its answer before the next. Every answer is compared
with the first that the same image had; of bad requests, a share of all, the status is. What is not
as it should be counts as an error. Before the load and after it, bare onnxruntime runs batches of 8
of the same images, while the server waits. The last line has the ratio of the two rates.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paired
from PIL import Image

from vit_jax.data.image_files import find_images, read_view
from vit_jax.export import runtime

ROOT = Path(__file__).parents[1]
BATCH = 8
MOST_IMAGES = 64
# Answers of other batches differ in the last digits.
CLOSE = 1e-3


class Sent(NamedTuple):
    """A request: its bytes, the statuses that are right (0: none), and which image it has."""

    data: bytes
    statuses: tuple[int, ...]
    image: int | None = None


def request(body: bytes, kind: str = "image/jpeg", line: str = "POST /predict", **headers: str):
    """The bytes of a request."""
    given = {"Host": "benchmark", "Content-Type": kind, "Content-Length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def bad_requests(image: bytes) -> list[Sent]:
    """Requests that a client should not send; one is cut off."""
    form = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
    return [
        Sent(request(b"hello"), (422,)),
        Sent(request(image[: len(image) // 2]), (422,)),
        Sent(request(b""), (400,)),
        Sent(request(image, "text/html"), (415,)),
        Sent(request(form, "multipart/form-data; boundary=x"), (400,)),
        Sent(request(image, line="POST /predict?top_k=abc"), (400,)),
        Sent(request(image, line="POST /predict?topk=1"), (400,)),
        Sent(request(b"", line="GET /../../etc/passwd"), (404,)),
        Sent(request(image, line="PUT /predict"), (405,)),
        Sent(request(b"x", Content_Length="100000000"), (413,)),
        Sent(b"\x16\x03\x01\r\n\r\n", (400,)),
        Sent(request(image)[:-100], (0,)),
    ]


class Load:
    """Connections that ask and wait, and what became of it.

    Attributes:
        seconds: from each good request to its answer.
        errors: how often something was wrong, by what it was.
        refused: bad requests that were answered as they should be.
    """

    def __init__(self, host: str, port: int, images: list[bytes], bad: float):
        self._address = host, port
        good = [Sent(request(image), (200,), index) for index, image in enumerate(images)]
        self._good = itertools.cycle(good)
        self._bad = itertools.cycle(bad_requests(images[0]))
        self._share = bad
        self._first: dict[int, np.ndarray] = {}
        self._owed = 0.0
        self.seconds: list[float] = []
        self.errors: dict[str, int] = {}
        self.refused = 0

    async def run(self, connections: int, seconds: float) -> float:
        """Sends for so long; returns how long it took until all had their answers."""
        start = time.perf_counter()
        self._end = start + seconds
        await asyncio.gather(*(self._connection() for _ in range(connections)))
        return time.perf_counter() - start

    def _next(self) -> Sent:
        self._owed += self._share
        if self._owed < 1:
            return next(self._good)
        self._owed -= 1
        return next(self._bad)

    async def _connection(self) -> None:
        while time.perf_counter() < self._end:
            try:
                reader, writer = await asyncio.open_connection(*self._address)
            except OSError as error:
                self._fail(f"no connection: {error}")
                await asyncio.sleep(0.1)
                continue
            with contextlib.closing(writer):
                while time.perf_counter() < self._end and await self._ask(reader, writer):
                    pass

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Sends one request; returns whether the connection can be used again."""
        sent = self._next()
        start = time.perf_counter()
        writer.write(sent.data)
        if sent.statuses == (0,):
            self.refused += 1
            return False
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, TypeError) as error:
            self._fail(f"no answer: {type(error).__name__}")
            return False
        status = int(head.split(None, 2)[1])
        if status not in sent.statuses:
            self._fail(f"{status} in place of {sent.statuses[0]}: {body[:100].decode()}")
        elif sent.image is None:
            self.refused += 1
        else:
            self.seconds.append(time.perf_counter() - start)
            self._compare(sent.image, json.loads(body)["results"][0]["predictions"])
        return b"connection: close" not in head

    def _compare(self, image: int, predictions: list[dict[str, Any]]) -> None:
        found = np.zeros(1 + max(each["index"] for each in predictions))
        for each in predictions:
            found[each["index"]] = each["probability"]
        first = self._first.setdefault(image, found)
        if len(first) != len(found) or not np.allclose(first, found, atol=CLOSE):
            self._fail("another answer to the same image")

    def _fail(self, reason: str) -> None:
        self.errors[reason] = self.errors.get(reason, 0) + 1


def read_images(folder: str | None) -> list[bytes]:
    """Images as files; without a folder, noise that is smooth as photographs are."""
    if folder:
        return [Path(path).read_bytes() for path in find_images([folder])[:MOST_IMAGES]]
    generator = np.random.default_rng(0)
    images = []
    for _ in range(16):
        image = Image.fromarray(generator.integers(0, 256, (14, 14, 3), np.uint8))
        data = io.BytesIO()
        image.resize((224, 224), Image.Resampling.BICUBIC).save(data, "JPEG")
        images.append(data.getvalue())
    return images


def bare(model: str, images: list[bytes], seconds: float) -> float:
    """Images a second of onnxruntime alone, in batches of 8 that were prepared before."""
    import onnxruntime

    path = Path(model, "model.onnx")
    with runtime.load(path) as loaded:
        preprocessing = loaded.preprocessing
    views = [read_view("the image", preprocessing, image) for image in images[:BATCH]]
    batch = np.stack([views[i % len(views)] for i in range(BATCH)])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (inputs,) = session.get_inputs()
    session.run(None, {inputs.name: batch})
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        session.run(None, {inputs.name: batch})
        count += BATCH
    return count / (time.perf_counter() - start)


@contextlib.contextmanager
def started(model: str, flags: list[str]) -> Iterator[str]:
    """Starts a server; yields its address, and at the end expects it to end in peace."""
    words = [sys.executable, "-m", "vit_jax", "serve", "--model", model, "--port", "0", *flags]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.match(r"listening on (\S+)", line):
                    yield match[1]
                    break
            else:
                raise RuntimeError(f"{' '.join(words)} has ended")
        finally:
            process.terminate()
            process.communicate()
    if process.returncode:
        raise RuntimeError(f"the server ended with exit code {process.returncode}")


def resident(url: str) -> float:
    """Memory of the server in MiB, as its metrics say."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    (size,) = re.findall(r"^process_resident_memory_bytes (\S+)", text, re.M)
    return float(size) / 2**20


def measure(url: str, images: list[bytes], args: argparse.Namespace) -> dict[str, Any]:
    """Puts a server under load, after a while of the same."""
    address = urllib.parse.urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    asyncio.run(Load(host, port, images, args.bad).run(args.connections, args.warm_up))
    before = resident(url)
    load = Load(host, port, images, args.bad)
    seconds = asyncio.run(load.run(args.connections, args.seconds))
    return {
        "images": len(load.seconds),
        "images_per_second": len(load.seconds) / seconds,
        "p50_ms": 1000 * float(np.quantile(load.seconds, 0.5)) if load.seconds else None,
        "p99_ms": 1000 * float(np.quantile(load.seconds, 0.99)) if load.seconds else None,
        "refused": load.refused,
        "errors": load.errors,
        "resident_mib": [before, resident(url)],
    }


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns 1 if there were errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the folder of an export")
    parser.add_argument("--url", help="of a server of this model that runs, as http://HOST:PORT")
    parser.add_argument("--images", help="a folder of photographs [smooth noise of 224 pixels]")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30, help="of load")
    parser.add_argument("--warm_up", type=float, default=2, help="seconds of load before")
    parser.add_argument("--bare_seconds", type=float, default=10, help="of bare onnxruntime, twice")
    parser.add_argument("--bad", type=float, default=0, help="share of bad requests [0]")
    parser.add_argument("--output", help="a file for the numbers as JSON")
    parser.add_argument("flags", nargs="*", help="of the server, after --")
    args = parser.parse_args(argv)
    images = read_images(args.images)
    context = contextlib.nullcontext(args.url) if args.url else started(args.model, args.flags)
    with context as url:
        rates = [bare(args.model, images, args.bare_seconds)]
        found = measure(url.rstrip("/"), images, args)
        rates.append(bare(args.model, images, args.bare_seconds))
    paired.write(args.output, paired.report(benchmark="serving", bare=rates, **found))
    before, after = found["resident_mib"]
    rows = [
        [f"vit-jax serve, {args.connections} connections", f"{found['images_per_second']:.1f}"],
        [f"bare onnxruntime, batch {BATCH}, before and after", f"{rates[0]:.1f}, {rates[1]:.1f}"],
    ]
    print(paired.markdown(["", "images/s"], rows))
    if found["images"]:
        print(f"latency: p50 {found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms")
    print(f"memory: {before:.1f} MiB, then {after:.1f} MiB")
    print(f"{found['images']:,} images, {found['refused']:,} bad requests answered as they should")
    for reason, count in found["errors"].items():
        print(f"{count} x {reason}")
    print(f"errors {sum(found['errors'].values())}")
    print(f"served/bare {found['images_per_second'] / (sum(rates) / 2):.3f}")
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
