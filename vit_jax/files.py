"""Files and folders that appear whole or not at all, and what is said of a disk that refuses."""

import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Container, Generator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vit_jax.errors import UserError, first_line
from vit_jax.printable import printable


def cache_dir() -> Path:
    """`$VIT_JAX_CACHE`, by default `~/.cache/vit_jax`.

    Raises:
        UserError: the system knows no home of this user's, as in a container with `--user`.
    """
    try:
        return Path(os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()
    except RuntimeError as error:
        raise UserError("this user has no home: set HOME to a folder") from error


def of_run(checkpoint: str, name: str) -> Path | None:
    """A file in the workdir of the run that a checkpoint belongs to, None if it is not there.

    Args:
        checkpoint: a run's workdir, its `checkpoints` or `best`, or a step in one of these.
        name: of the file.
    """
    path = Path(checkpoint).absolute()
    workdirs = [path]
    for above in (path, path.parent):
        if above.name in ("checkpoints", "best"):
            workdirs.append(above.parent)
    return next((workdir / name for workdir in workdirs if (workdir / name).is_file()), None)


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
    """Yields the path of an empty file, which takes the place of `path` if all goes well.

    It lies beside, in a folder of its own. What a killed writer of `path` has left there is removed
    first; what belongs to one that lives stays.

    Raises:
        UserError: the folder does not exist, or the disk refuses.
    """
    with _write_errors(path):
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: folder {path.parent} does not exist")
        with _temporary_folder(path) as folder:
            temporary = folder / _NEW
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            with _called(temporary, path):
                yield temporary
            temporary.chmod(mode)  # safetensors takes the file's place with one that is private
            _sync(temporary)
            temporary.replace(path)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Generator[Path]:
    """Yields an empty folder, which takes the name of `path` if all goes well.

    It has the mode that `mkdir` gives. If anything fails it is gone, and what was there stays.
    What a killed writer of `path` has left is removed first; if it was killed as it replaced what
    was there, its folder, which is whole, takes its place.

    Args:
        path: of the folder; the one that it lies in must exist.
        replace: take the place of what is there; otherwise nothing may be there.

    Raises:
        UserError: the disk refuses, or something is there.
    """
    with _write_errors(path), _temporary_folder(path) as folder:
        new, old = folder / _NEW, folder / _OLD
        new.mkdir()
        with _called(new, path):
            yield new
        _sync(new)
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

    They take the place of those of the same name, one after the other in the order of their names;
    other files stay. `folder` is made if it is not there. What a killed writer has left is removed
    first.

    Raises:
        UserError: the disk refuses.
    """
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(folder / "files") as temporary:
            new = temporary / _NEW
            new.mkdir()
            with _called(new, folder):
                yield new
            _sync(new)
            for file in sorted(new.iterdir()):
                file.replace(folder / file.name)


def _sync(path: Path) -> None:
    """Has a file, or the files below a folder, on the disk before they get their names."""
    for file in filter(Path.is_file, (path, *path.rglob("*"))):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


# What lies in a temporary folder: the lock of its writer, what is made, and what that replaces.
_LOCK, _NEW, _OLD = ".lock", "new", "old"


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Generator[Path]:
    """A folder beside `path`, so on the same file system, that only its owner can enter."""
    _remove_leftovers(path)
    folder, lock = _make_locked(path)
    try:
        with lock:
            try:
                yield folder
            finally:
                _empty(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_locked(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir(0o700)
        try:
            lock = (folder / _LOCK).open("xb")
        except FileNotFoundError:  # Another writer took it for a leftover.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = (folder / _LOCK).exists()
        except BlockingIOError:  # Likewise.
            is_ours = False
        except OSError:  # This file system has no locks: nobody takes it then.
            is_ours = True
        if is_ours:
            return folder, lock
        lock.close()


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary folders of `path` whose writers are gone, and with them their locks."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.tmp")
    found: list[Path] = []
    with contextlib.suppress(OSError):
        found += [x for x in path.parent.iterdir() if pattern.fullmatch(x.name)]
    for folder in found:
        with contextlib.suppress(OSError):
            folder.rmdir()  # Its writer was killed before it had a lock.
        # Otherwise BlockingIOError where the writer lives, another error where there are no locks.
        with contextlib.suppress(OSError), (folder / _LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new, old = folder / _NEW, folder / _OLD
            if new.exists() and old.exists() and not path.exists():
                new.rename(path)
            _empty(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Removes what is in a temporary folder but its lock, by which a later writer would find it."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != _LOCK:
                entry.unlink(missing_ok=True)


@contextlib.contextmanager
def _called(temporary: Path, path: Path) -> Generator[None]:
    """Has errors name a path by what was asked for, not by the folder in which it is made."""
    try:
        yield
    except UserError as error:
        here, there = printable(str(temporary)), printable(str(path))
        if here not in str(error):
            raise
        raise UserError(str(error).replace(here, there)) from error


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

    What `printable` would escape is escaped, so the file may be looked at, and read to the same.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    lines = (line if line.isprintable() else _escaped(line) for line in text.split("\n"))
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _escaped(line: str) -> str:
    return "".join(x if x == printable(x) else json.dumps(x)[1:-1] for x in line)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
