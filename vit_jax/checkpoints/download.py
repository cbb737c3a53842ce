"""A file over HTTPS: resumed where a connection broke, verified, and moved to its place whole.

An unfinished download is `<file>.partial`. Beside it, `<file>.partial.json` records the server's
description of the file, so that the next call, in any process, resumes the same one.
"""

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
import urllib.parse
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vit_jax.errors import UserError
from vit_jax.files import storage_errors
from vit_jax.printable import printable

if TYPE_CHECKING:
    import requests

_ATTEMPTS = 4
_FIRST_PAUSE = 0.5  # seconds; doubled before each further attempt
_TIMEOUT = (10, 60)  # seconds to connect; between two pieces of the answer
_BLOCK = 1 << 16  # bytes; a connection that breaks takes less than one with it
_MAX_RECORD = 1 << 16  # bytes
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True)
class Source:
    """A file to be fetched.

    Attributes:
        name: what the user calls it, for messages.
        url: its address.
        path: where it goes.
        has_checksum: whether its server always gives one, as Google's buckets do.
    """

    name: str
    url: str
    path: Path
    has_checksum: bool = False


def fetch_file(source: Source) -> Path:
    """Fetches a file, unless it is there, and returns its path.

    Raises:
        UserError: it cannot be reached, does not exist, is not what was published, or does not fit
            on the disk.
    """
    path = source.path
    unwritable = storage_errors(
        lambda reason: (
            f"{source.name} cannot be written to {path.parent} ({reason}): "
            "make room there, or name another directory with VIT_JAX_CACHE"
        )
    )
    with unwritable:
        if path.exists():
            with contextlib.suppress(OSError):  # Of a process that was killed at its last step.
                path.with_name(f"{path.name}.partial.json").unlink(missing_ok=True)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(path.with_name(f"{path.name}.partial")) as file:
            if path.exists():  # Another process was faster.
                _discard(file)
                return path
            published = _download(source, file)
            _verify(source.name, file, published)
            os.replace(file.name, path)
            _record_path(file).unlink(missing_ok=True)
    return path


def root_reason(error: BaseException) -> str:
    """Returns the first line of what an error was first caused by."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]


@dataclasses.dataclass(frozen=True)
class _Published:
    """The server's description of a file: its ETag, size and checksums."""

    etag: str
    size: int | None
    md5: str | None
    crc32c: str | None


class _InterruptedError(Exception):
    """An attempt that failed in a way that another may not."""


@contextlib.contextmanager
def _held(partial: Path) -> Generator[BinaryIO]:
    """Opens an unfinished download for this process alone; waits for the one that has it."""
    while True:
        with open(partial, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"another process fetches {partial}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
            except FileNotFoundError:
                current = False
            if current:  # Not what another process has just moved to its place or deleted.
                yield file
                return


def _download(source: Source, file: BinaryIO) -> _Published:
    import requests

    pause, problem = _FIRST_PAUSE, ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(pause)
            pause *= 2
        try:
            return _attempt(source, file)
        except _InterruptedError as error:
            problem = str(error)
        except requests.RequestException as error:
            problem = f"cannot be reached ({root_reason(error)})"
            if isinstance(error, requests.ConnectTimeout):  # Patience was had already.
                break
    host = urllib.parse.urlsplit(source.url).hostname
    have = file.seek(0, os.SEEK_END)
    way_out = f"put {source.path.name} from {source.url} at {source.path}"
    if have:
        way_out = f"the next call goes on from the {have:,} bytes that are there; or {way_out}"
    else:
        _discard(file)
    raise UserError(f"{source.name} is not in the cache and {host} {problem}: {way_out}")


def _attempt(source: Source, file: BinaryIO) -> _Published:
    """Asks for what is missing and appends it."""
    import requests

    have = file.seek(0, os.SEEK_END)
    recorded = _read_record(file) if have else None
    if recorded and have == recorded.size:
        return recorded
    headers = {"Accept-Encoding": "identity"}
    if recorded and recorded.etag.startswith('"'):  # A weak one does not vouch for every byte.
        headers |= {"Range": f"bytes={have}-", "If-Range": recorded.etag}
    with requests.get(source.url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        published = _read_answer(source, file, response, recorded)
        from_byte = f", from byte {have:,} on" if file.tell() else ""
        _say(f"fetching {source.url} to {source.path}{from_byte}")
        _append(response, file, published.size, source.path.name)
    return published


def _read_answer(
    source: Source, file: BinaryIO, response: "requests.Response", recorded: _Published | None
) -> _Published:
    """Returns what the server says of the file; empties the download if it has to begin anew."""
    status = response.status_code
    if status == 200:
        _empty(file)
        if source.has_checksum and not response.headers.get("x-goog-hash"):
            _discard(file)
            raise UserError(
                f"{source.name} is not in the cache, and {source.url} was answered by something "
                "else than the bucket: mind the proxy or the login page, or put "
                f"{source.path.name} at {source.path}"
            )
        published = _published(response.headers)
        _record_path(file).write_text(json.dumps(dataclasses.asdict(published)))
        return published
    if status in (206, 416):
        content_range = response.headers.get("Content-Range", "")
        is_rest = content_range.startswith(f"bytes {file.tell()}-")
        if recorded and is_rest and response.headers.get("ETag") == recorded.etag:
            return recorded
        _empty(file)
        raise _InterruptedError("has another file now")
    if status in _TRANSIENT:
        raise _InterruptedError(f"answers with HTTP status {status}")
    _discard(file)
    raise UserError(
        f"{source.name} is not in the cache, and {source.url} answers with HTTP status "
        f"{status}: check the name, or put {source.path.name} at {source.path}"
    )


def _append(response: "requests.Response", file: BinaryIO, size: int | None, label: str) -> None:
    import requests
    import tqdm

    progress = tqdm.tqdm(
        total=size,
        initial=file.tell(),
        unit="B",
        unit_scale=True,
        desc=label,
        disable=None,  # where stderr is no terminal
    )
    with progress:
        try:
            for block in response.iter_content(_BLOCK):
                file.write(block)
                progress.update(len(block))
        except requests.RequestException as error:
            raise _InterruptedError(f"broke off ({root_reason(error)})") from error
        finally:
            file.flush()


def _published(headers: Mapping[str, str]) -> _Published:
    encodings = (headers.get(x) for x in ("x-goog-stored-content-encoding", "Content-Encoding"))
    if any(encoding not in (None, "identity") for encoding in encodings):
        # It is unpacked on the way: length and checksums are those of what was stored.
        return _Published("", None, None, None)
    # "crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==", or one header for each
    pairs = (item.strip().partition("=") for item in headers.get("x-goog-hash", "").split(","))
    hashes = {algorithm: value for algorithm, _, value in pairs}
    size = headers.get("x-goog-stored-content-length", headers.get("Content-Length"))
    return _Published(
        etag=headers.get("ETag", ""),
        size=int(size) if size and size.isdecimal() else None,
        md5=hashes.get("md5"),
        crc32c=hashes.get("crc32c"),
    )


def _verify(name: str, file: BinaryIO, published: _Published) -> None:
    file.flush()
    os.fsync(file.fileno())
    size = file.seek(0, os.SEEK_END)
    problem = None
    if published.size not in (None, size):
        problem = f"{size:,} bytes came, not {published.size:,}"
    elif published.md5:
        md5 = _checksum(file, hashlib.md5(usedforsecurity=False))
        if md5 != published.md5:
            problem = f"MD5 {md5}, not {published.md5}"
    elif published.crc32c:
        import google_crc32c

        crc32c = _checksum(file, google_crc32c.Checksum())
        if crc32c != published.crc32c:
            problem = f"CRC32C {crc32c}, not {published.crc32c}"
    else:
        _say(f"{name} could not be verified: the server gave no checksum")
    if problem:
        _discard(file)
        raise UserError(
            f"{name} is not what was published ({problem}): it was deleted, fetch it again"
        )


def _checksum(file: BinaryIO, checksum: Any) -> str:
    file.seek(0)
    while block := file.read(_BLOCK):
        checksum.update(block)
    return base64.b64encode(checksum.digest()).decode()


def _record_path(file: BinaryIO) -> Path:
    """Returns the path of what the server said of an unfinished download."""
    return Path(f"{file.name}.json")


def _read_record(file: BinaryIO) -> _Published | None:
    try:
        with _record_path(file).open("rb") as record:
            published = _Published(**json.loads(record.read(_MAX_RECORD)))
    # Without it the file is begun anew.
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    texts = (published.etag, published.md5 or "", published.crc32c or "")
    is_record = all(isinstance(x, str) and x.isascii() and x.isprintable() for x in texts)
    return published if is_record and isinstance(published.size, int | None) else None


def _empty(file: BinaryIO) -> None:
    file.truncate(0)
    file.seek(0)


def _discard(file: BinaryIO) -> None:
    _record_path(file).unlink(missing_ok=True)  # First: without the file another may begin.
    Path(file.name).unlink(missing_ok=True)


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
