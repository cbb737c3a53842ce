"""Files and folders that appear whole or not at all, and what is said of a disk that refuses."""

import contextlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Container, Generator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, first_line


def cache_dir() -> Path:
    """`$VIT_JAX_CACHE`, by default `~/.cache/vit_jax`.

    Raises:
        UserError: the system knows no home of this user's, as in a container with `--user`.
    """
    try:
        return Path(os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()
    except RuntimeError as error:
        raise UserError("this user has no home: set HOME to a folder") from error


@contextlib.contextmanager
def storage_errors(
    message: Callable[[str], str], errnos: Container[int | None] | None = None
) -> Generator[None]:
    """Turns an OSError into a UserError.

    Args:
        message: makes the text of the UserError of what the system says ("Permission denied").
        errnos: the numbers of the errors to turn; others pass. None: all.
    """
    try:
        yield
    except OSError as error:
        if errnos is not None and error.errno not in errnos:
            raise
        raise UserError(message(error.strerror or first_line(error))) from error


def _write_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    return storage_errors(
        lambda reason: f"{path} cannot be written: {reason}; free the disk or name another folder"
    )


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[Path]:
    """Yields a temporary path beside, which takes the place of `path` if all goes well.

    Raises:
        UserError: the folder does not exist, or the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with _write_errors(path):
            if not path.parent.is_dir():
                raise UserError(f"{path} cannot be written: folder {path.parent} does not exist")
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors takes the file's place with one that is private
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Generator[Path]:
    """Yields an empty folder, which takes the name of `path` if all goes well.

    It has the mode that `mkdir` gives. If anything fails it is gone, and what was there stays.

    Args:
        path: of the folder; the one that it lies in must exist.
        replace: take the place of what is there; otherwise nothing may be there.

    Raises:
        UserError: the disk refuses, or something is there.
    """
    with _write_errors(path), _temporary_folder(path.parent, f".{path.name}-") as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if not replace or not path.exists():
            new.rename(path)
            return
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise


@contextlib.contextmanager
def atomic_files(folder: Path) -> Generator[Path]:
    """Yields an empty folder, whose files move to `folder` if all goes well.

    They take the place of those of the same name, one after the other; other files stay. `folder`
    is made if it is not there.

    Raises:
        UserError: the disk refuses.
    """
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(folder, ".new-") as temporary:
            yield temporary
            for file in sorted(temporary.iterdir()):
                file.replace(folder / file.name)


@contextlib.contextmanager
def _temporary_folder(parent: Path, prefix: str) -> Generator[Path]:
    """A folder that only its owner can enter, on the file system of what it will be moved to."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path, flag: str = "--output") -> None:
    """Makes a folder, and those that it lies in, unless it is there.

    Args:
        path: of the folder.
        flag: what named it, for the message.

    Raises:
        UserError: it cannot be made.
    """
    with storage_errors(lambda reason: f"{flag} {path} cannot be made: {reason}"):
        path.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, in which a number that is not finite is null.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
