"""The checks of every file, whatever its format, before its arrays are allocated.

The memory that a file makes the reader allocate is bounded by its size: the arrays it declares may
take 256 MiB plus 8 times the size of the file, and never more than 16 GiB. Float16 doubles,
compressed trained weights shrink by a tenth, and a head or biases that are still zero compress to
nothing, which the 256 MiB allow for; a decompression bomb grows a thousandfold.

So is the time. There are at most `MAX_ARRAYS` arrays, and what describes them (the directory of an
archive, headers, an index, a pickle) is read up to `MAX_HEADER` bytes, whatever lengths and counts
the file declares; that takes some seconds at most. The rest is passed over a fixed number of times.
"""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError, shortlist
from vit_jax.printable import printable

MAX_BYTES = 16 << 30
MAX_ARRAYS = 10_000  # ViT-H/14 has 400
MAX_NAME = 250

# Names, shapes and offsets of MAX_ARRAYS arrays fit; parsing takes a few hundred bytes per byte.
MAX_HEADER = 4 << 20

# What the arrays of a file may take together, where it is small and what it holds compresses well.
_ALLOWANCE = 256 << 20
_EXPANSION = 8

# Bytes of one value while it is read: everything becomes float32.
_WIDTHS = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 8}


def check_names(path: Path, names: Iterable[Any]) -> None:
    """Checks that names of arrays make a tree.

    Raises:
        UserError: there are too many, one is no printable path, or one is also another's folder.
    """
    names = list(names)
    if len(names) > MAX_ARRAYS:
        raise UserError(f"{path} holds {len(names)} arrays: at most {MAX_ARRAYS} make a model")
    if bad := [str(name) for name in names if not is_name(name)]:
        raise UserError(
            f"{path} has arrays named {printable_shortlist(bad)}: a name is printable, of at most "
            f"{MAX_NAME} characters, its parts joined by single slashes"
        )
    arrays = set(names)
    folders = (name[:i] for name in names for i, character in enumerate(name) if character == "/")
    if both := sorted({folder for folder in folders if folder in arrays}):
        raise UserError(
            f"{path} has both an array and a folder named {printable_shortlist(both)}: rename one "
            "of them"
        )


def is_name(name: Any) -> bool:
    """Tells whether a value can be the name of an array."""
    return (
        isinstance(name, str)
        and len(name) <= MAX_NAME
        and name.isprintable()
        and not {"", ".", ".."} & set(name.split("/"))
    )


def check_declared(path: Path, size: int, types: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Checks what a file says of its arrays, before any of them is read.

    Args:
        path: of the file, for messages.
        size: of the file, in bytes.
        types: dtype and shape of every array, by name.

    Raises:
        UserError: an array is of no floating-point type that is read, or all take too much memory.
    """
    for name, (dtype, _) in types.items():
        if dtype not in _WIDTHS:
            raise UserError(
                f"{path} has {name} of type {printable(dtype[:100])}: "
                "parameters are float16, bfloat16, float32 or float64"
            )
    check_total(
        path, size, sum(_WIDTHS[dtype] * math.prod(shape) for dtype, shape in types.values())
    )


def check_total(path: Path, size: int, declared: int) -> None:
    """Checks that a file of `size` bytes may declare so many bytes of arrays.

    Raises:
        UserError: they are more than the file can back.
    """
    allowed = min(_ALLOWANCE + _EXPANSION * size, MAX_BYTES)
    if declared > allowed:
        raise UserError(
            f"{path} of {size} bytes declares {declared} bytes of arrays, and at most {allowed} "
            "are read from it: save it again uncompressed, or use a smaller model"
        )


class _Bounded(io.BufferedReader):
    """A file of which no more than so many bytes are read at once, until `largest` is None."""

    largest: int | None = MAX_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        if self.largest is not None:
            left = os.fstat(self.fileno()).st_size - self.tell()
            wanted = left if size is None or size < 0 else min(size, left)
            if wanted > self.largest:
                raise ValueError(f"its directory would take {wanted} bytes")
        return super().read(size)


@contextlib.contextmanager
def open_archive(path: Path) -> Generator[zipfile.ZipFile]:
    """Opens a zip archive whose directory takes no more than `MAX_HEADER` bytes.

    zipfile reads a directory of any size, and makes an object of 500 bytes of each 46 in it.

    Raises:
        ValueError: the directory is larger.
        Exception: whatever zipfile raises on a damaged file.
    """
    with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        file.largest = None
        yield archive


def checked_members(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the members of a zip archive by name, whose sizes the directory bounds.

    Raises:
        UserError: there are too many, two of one name, an encrypted one, one that zipfile would
            inflate without a bound, or all take too much memory.
    """
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    if len(members) < len(infos):
        raise UserError(f"{path} holds several members of one name: fetch it again")
    if len(members) > MAX_ARRAYS:
        raise UserError(f"{path} holds {len(members)} arrays: at most {MAX_ARRAYS} make a model")
    if any(info.flag_bits & 1 for info in infos):
        raise UserError(f"{path} is encrypted: unpack it and save it without a password")
    # zipfile inflates bzip2 and LZMA without a bound.
    if any(info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} for info in infos):
        raise UserError(f"{path} is compressed, but not by deflate: save it uncompressed")
    check_total(path, size, sum(info.file_size for info in infos))
    return members


def to_writable(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns arrays as float32, whose names `read_arrays` will take.

    Raises:
        UserError: a name is not one that can be read again.
    """
    check_names(Path(path), arrays)
    return {name: to_float32(np.asarray(x)) for name, x in arrays.items()}


def to_float32(array: np.ndarray) -> np.ndarray:
    """Converts an array to float32 in C order; a value beyond its range becomes infinite."""
    with np.errstate(over="ignore"):  # an infinity is refused afterwards, by name
        return np.asarray(array, np.float32, order="C")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of pairs, as a hook of a parser.

    Raises:
        ValueError: a key is there twice.
    """
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("it has one key twice")
    return unique


def printable_shortlist(names: list[str]) -> str:
    """Joins the first names that a file holds, cut and escaped; see `errors.shortlist`."""
    return shortlist([printable(name[:100]) or "''" for name in names])
