"""TFRecord files, record by record: an index of offsets, made once, and reading by it.

A file is a row of records: the length (8 bytes), its checksum (4), the data, its checksum (4).
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Generator
from pathlib import Path

import google_crc32c
import numpy as np

from vit_jax.errors import UserError, first_line
from vit_jax.files import atomic_write, cache_dir

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_BETWEEN = _HEADER.size + _CHECKSUM.size  # bytes of a record that are not its data
_INDEX = ".offsets"  # the folder beside the files that takes the indices


@contextlib.contextmanager
def unreadable(path: str | os.PathLike[str]) -> Generator[None]:
    """Tells in one line that data which was there when it was opened cannot be read."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise damaged(path, reason) from error


def damaged(path: str | os.PathLike[str], reason: str) -> UserError:
    """The error for a file that is there but is not what it was."""
    return UserError(
        f"the data cannot be read: {path}: {reason}; restore the file or prepare the data set again"
    )


def record_offsets(path: str) -> np.ndarray:
    """Returns where each record of a file begins, and where the last one ends, int64 [records + 1].

    The first call for a file goes from header to header and checks the checksums of the lengths.
    What it finds is kept beside the file, in `.offsets/`, or where that cannot be written in
    `$VIT_JAX_CACHE`, by default `~/.cache/vit_jax`; it counts while the file keeps its size and its
    time of change.

    Raises:
        UserError: the file is missing or damaged.
    """
    with unreadable(path):
        status = os.stat(path)
    stamp = [status.st_size, status.st_mtime_ns]
    places = _index_paths(path)
    for place in places:
        with contextlib.suppress(Exception):  # Whatever is wrong with one, it is made anew.
            saved = np.load(place)
            if saved[:2].tolist() == stamp and _is_index(saved[2:], status.st_size):
                return saved[2:]
    offsets = _scan(path, status.st_size)
    for place in places:
        with contextlib.suppress(OSError, UserError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(place) as temporary, temporary.open("wb") as file:
                np.save(file, np.array(stamp + offsets, np.int64))
            break
    return np.array(offsets, np.int64)


def _is_index(offsets: np.ndarray, size: int) -> bool:
    """Tells whether offsets can be those of a file of a size: it may be anybody's."""
    return (
        offsets.dtype == np.int64
        and offsets[0] == 0
        and offsets[-1] == size
        and bool((np.diff(offsets) >= _BETWEEN).all())
    )


def _index_paths(path: str) -> list[Path]:
    """The places where the index of a file is looked for; the first that can be takes it."""
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()
    file = Path(path)
    places = [file.parent / _INDEX / f"{file.name}.npy"]
    with contextlib.suppress(UserError):
        places.append(cache_dir() / "offsets" / f"{name}.npy")
    return places


def _scan(path: str, size: int) -> list[int]:
    offsets = [0]
    with unreadable(path), open(path, "rb") as file:
        while header := file.read(_HEADER.size):
            begin = offsets[-1]
            if len(header) < _HEADER.size:
                raise damaged(path, f"it is cut off at byte {begin}")
            length, checksum = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != checksum:
                raise damaged(path, f"the header at byte {begin} is damaged")
            offsets.append(begin + length + _BETWEEN)
            if offsets[-1] > size:
                raise damaged(path, f"it is cut off at byte {begin}")
            file.seek(length + _CHECKSUM.size, os.SEEK_CUR)
    return offsets


def read_record(path: str, begin: int, end: int) -> bytes:
    """Reads the data of a record and checks it.

    Args:
        path: of the file.
        begin: of the record, in bytes, from `record_offsets`.
        end: likewise.

    Raises:
        UserError: the file is missing, or the record damaged.
    """
    with unreadable(path), open(path, "rb", buffering=0) as file:
        file.seek(begin)
        record = file.read(end - begin)
    data = record[_HEADER.size : -_CHECKSUM.size]
    checksum = record[-_CHECKSUM.size :]
    if len(record) != end - begin or _CHECKSUM.pack(_masked_crc(data)) != checksum:
        raise damaged(path, f"the record at byte {begin} is damaged")
    return data


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
