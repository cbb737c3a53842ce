"""Published weights by their names: over the network into a cache, verified, once.

Google's weights lie in the public bucket `vit_models`, whose directories are listed in the README
of github.com/google-research/vision_transformer. They are read over HTTPS into
`$VIT_JAX_CACHE/<directory>/<file>`. The Hugging Face hub has its own client and its own cache.
"""

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vit_jax.checkpoints import augreg
from vit_jax.errors import UserError
from vit_jax.files import storage_errors

DIRECTORIES = ("imagenet21k", "imagenet21k+imagenet2012", "augreg", "sam", "gsam")
AUGREG_MODELS = (
    *("Ti_16", "S_32", "S_16", "B_32", "B_16", "B_8", "L_16"),
    *("R_Ti_16", "R26_S_32", "R50_L_32"),
)

# Weights without a pickle in them, and what says how to use them.
_HUB_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
_BUCKET = "vit_models"
_BUCKET_URL = f"https://storage.googleapis.com/{_BUCKET}"
_ACCEPTED = (
    "ViT-B_16, imagenet21k+imagenet2012/ViT-B_16, augreg/FILE, gs://vit_models/DIRECTORY/FILE, "
    f"an AugReg model ({', '.join(AUGREG_MODELS)}) or hf:OWNER/NAME[@REVISION]"
)

_ATTEMPTS = 4
_FIRST_PAUSE = 0.5  # seconds; doubled before each further attempt
_TIMEOUT = (10, 60)  # seconds to connect; between two pieces of the answer
_BLOCK = 1 << 16  # bytes; a connection that breaks takes less than one with it
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)

_PART = r"\w[\w.+-]*"  # of a path in the bucket: nothing that could leave the cache
_BUCKET_NAME = re.compile(r"(R\d+\+)?ViT-[A-Z][a-z]?_\d+(-224)?", re.ASCII)
_HUB_NAME = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)


def is_remote_name(name: str) -> bool:
    """Whether `name` is one that `fetch` knows, and neither exists on disk nor looks like a path.

    Of names with a directory, those in `DIRECTORIES` count. `ViT-B_16.npz` is a path.
    """
    if os.path.exists(name):
        return False
    if name.startswith(("hf:", "gs://", f"{_BUCKET_URL}/")):
        return True
    directory, slash, _ = name.partition("/")
    if slash:
        return directory in DIRECTORIES
    return bool(_BUCKET_NAME.fullmatch(name)) or name in AUGREG_MODELS


def cache_dir() -> Path:
    """`$VIT_JAX_CACHE`, by default `~/.cache/vit_jax`."""
    return Path(os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()


def locate(name: str) -> tuple[str, Path]:
    """The address of a file of Google's bucket and its place in the cache.

    Args:
        name: as `fetch`, but neither an AugReg model nor on the Hugging Face hub. `.npz` may be
            left out. `$VIT_JAX_BUCKET_URL` takes the place of the bucket's address.

    Raises:
        UserError: the name is not of this form.
    """
    path = name.removeprefix(f"gs://{_BUCKET}/").removeprefix(f"{_BUCKET_URL}/")
    if path == name and _BUCKET_NAME.fullmatch(stem := name.removesuffix(".npz")):
        # Those trained at 224 px are the fine-tuned ones; there is no other of that name.
        directory = "imagenet21k+imagenet2012" if stem.endswith("-224") else "imagenet21k"
        path = f"{directory}/{stem}"
    if path == name and path.split("/")[0] not in DIRECTORIES:
        raise UserError(f"{name!r} is no name of published weights: give {_ACCEPTED}")
    if not re.fullmatch(rf"{_PART}(/{_PART})+", path, re.ASCII):
        raise UserError(f"{name!r} is no path in the bucket {_BUCKET}: give {_ACCEPTED}")
    if not path.endswith((".npz", ".csv")):
        path += ".npz"
    base = os.environ.get("VIT_JAX_BUCKET_URL") or _BUCKET_URL
    return f"{base}/{urllib.parse.quote(path)}", cache_dir() / path


def split_hub_name(name: str) -> tuple[str, str | None]:
    """Splits `hf:owner/name@revision` into `owner/name` and the revision, if it has one.

    Raises:
        UserError: the name is not of this form.
    """
    match = _HUB_NAME.fullmatch(name)
    if not match or ".." in name:
        raise UserError(
            f"{name!r} is no name on the Hugging Face hub: give hf:OWNER/NAME[@REVISION]"
        )
    return match[1], match[2]


def fetch(name: str) -> Path:
    """Fetches published weights, once; what is in the cache is used without the network.

    Args:
        name: a file of Google's bucket: `ViT-B_16` (of `imagenet21k`), `imagenet21k/ViT-B_16`,
            `imagenet21k+imagenet2012/ViT-B_16`, `augreg/B_16-i21k-300ep-...`, with or without
            `gs://vit_models/` and `.npz`; or an AugReg model, `R26_S_32`, of which the recommended
            pre-trained file is taken; or `hf:owner/name[@revision]`.

    Returns:
        The file, or the folder of a repository of the Hugging Face hub.

    Raises:
        UserError: the name is none of these; or the file is not in the cache, and cannot be
            reached, does not exist, is not what was published, or does not fit on the disk.
    """
    if name.startswith("hf:"):
        return _fetch_hub(name)
    if name in AUGREG_MODELS:
        name = f"augreg/{augreg.recommended(augreg.read_index(fetch_index()), name)}"
    url, path = locate(name)
    return _fetch_file(name, url, path)


def fetch_index() -> Path:
    """Fetches the index of AugReg, `augreg/index.csv`: see `augreg.read_index`."""
    return _fetch_file("the index of AugReg", *locate("augreg/index.csv"))


@dataclasses.dataclass(frozen=True)
class _Published:
    """What the server said of a file: kept beside an unfinished download."""

    etag: str
    size: int | None
    md5: str | None
    crc32c: str | None


class _InterruptedError(Exception):
    """An attempt that failed in a way that another may not."""


def _fetch_file(name: str, url: str, path: Path) -> Path:
    unwritable = storage_errors(
        lambda reason: (
            f"{name} cannot be written to {path.parent} ({reason}): "
            "make room there, or name another directory with VIT_JAX_CACHE"
        )
    )
    with unwritable:
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(path.with_name(f"{path.name}.partial")) as file:
            if path.exists():  # Another process was faster.
                _discard(file)
                return path
            published = _download(name, url, path, file)
            _verify(name, file, published)
            os.replace(file.name, path)
            _sidecar(file).unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[BinaryIO]:
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


def _download(name: str, url: str, path: Path, file: BinaryIO) -> _Published:
    import requests

    pause = _FIRST_PAUSE
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(pause)
            pause *= 2
        try:
            return _continue(name, url, path, file)
        except _InterruptedError as error:
            problem = str(error)
        except requests.RequestException as error:
            problem = f"cannot be reached ({_root_reason(error)})"
            if isinstance(error, requests.ConnectTimeout):  # Patience was had already.
                break
    host = urllib.parse.urlsplit(url).hostname
    have = file.seek(0, os.SEEK_END)
    way_out = f"put {path.name} from {url} at {path}"
    if have:
        way_out = f"the next call goes on from the {have:,} bytes that are there; or {way_out}"
    else:
        _discard(file)
    raise UserError(f"{name} is not in the cache and {host} {problem}: {way_out}")


def _continue(name: str, url: str, path: Path, file: BinaryIO) -> _Published:
    """One attempt: asks for what is missing and appends it."""
    import requests
    import tqdm

    have = file.seek(0, os.SEEK_END)
    known = _read_sidecar(file) if have else None
    if known and have == known.size:
        return known
    headers = {"Accept-Encoding": "identity"}
    if known and known.etag.startswith('"'):  # A weak one does not vouch for every byte.
        headers |= {"Range": f"bytes={have}-", "If-Range": known.etag}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 200:
            _forget(file)
            known = _published(response.headers)
            if url.startswith(_BUCKET_URL) and not response.headers.get("x-goog-hash"):
                _discard(file)
                raise UserError(
                    f"{name} is not in the cache, and {url} was answered by something else than "
                    f"the bucket: mind the proxy or the login page, or put {path.name} at {path}"
                )
            _sidecar(file).write_text(json.dumps(dataclasses.asdict(known)))
        elif response.status_code in (206, 416):
            content_range = response.headers.get("Content-Range", "")
            etag = response.headers.get("ETag")
            if not (known and etag == known.etag and content_range.startswith(f"bytes {have}-")):
                _forget(file)
                raise _InterruptedError("has another file now")
        elif response.status_code in _TRANSIENT:
            raise _InterruptedError(f"answers with HTTP status {response.status_code}")
        else:
            _discard(file)
            raise UserError(
                f"{name} is not in the cache, and {url} answers with HTTP status "
                f"{response.status_code}: check the name, or put {path.name} at {path}"
            )
        _say(f"fetching {url} to {path}" + (f", from byte {have:,} on" if file.tell() else ""))
        progress = tqdm.tqdm(
            total=known.size,
            initial=file.tell(),
            unit="B",
            unit_scale=True,
            desc=path.name,
            disable=None,  # where stderr is no terminal
        )
        with progress:
            try:
                for block in response.iter_content(_BLOCK):
                    file.write(block)
                    progress.update(len(block))
            except requests.RequestException as error:
                raise _InterruptedError(f"broke off ({_root_reason(error)})") from error
            finally:
                file.flush()
    return known


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


def _sidecar(file: BinaryIO) -> Path:
    return Path(f"{file.name}.json")


def _read_sidecar(file: BinaryIO) -> _Published | None:
    try:
        return _Published(**json.loads(_sidecar(file).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # Without it the file is begun anew.
        return None


def _forget(file: BinaryIO) -> None:
    """Empties an unfinished download."""
    file.truncate(0)
    file.seek(0)


def _discard(file: BinaryIO) -> None:
    _sidecar(file).unlink(missing_ok=True)  # First: without the file another process may begin.
    Path(file.name).unlink(missing_ok=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _root_reason(error: BaseException) -> str:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]


def _fetch_hub(name: str) -> Path:
    repository, revision = split_hub_name(name)
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{name} needs huggingface_hub: pip install huggingface_hub") from error
    by_hand = (
        "put config.json, preprocessor_config.json and model.safetensors from "
        f"{constants.ENDPOINT}/{repository}/tree/{revision or 'main'} "
        "into a folder and give that folder"
    )
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(_HUB_FILES)
        )
    except LocalEntryNotFoundError as error:
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
        raise UserError(
            f"{name} is not in the cache and {host} cannot be reached ({_root_reason(error)}): "
            f"{by_hand}"
        ) from error
    except Exception as error:  # Its transport changes with its version, and so do the classes.
        raise UserError(
            f"{name} cannot be fetched ({_root_reason(error)}): check the name, or {by_hand}"
        ) from error
    folder = Path(folder)
    if missing := _missing_weights(folder):
        raise UserError(
            f"{name} has no {missing}: only safetensors are read, so convert it, "
            "or name another revision"
        )
    return folder


def _missing_weights(folder: Path) -> str | None:
    """The first file of the weights that is not there."""
    if (folder / "model.safetensors").exists():
        return None
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        shards = sorted(set(index["weight_map"].values()))
        return next((shard for shard in shards if not (folder / shard).exists()), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "model.safetensors"
