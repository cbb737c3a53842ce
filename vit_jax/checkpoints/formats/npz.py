"""NumPy's `.npz`: a zip archive with a checksum of every array, which is verified."""

import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vit_jax.checkpoints.formats.checks import (
    MAX_ARRAYS,
    check_declared,
    check_names,
    checked_members,
    open_archive,
    printable_shortlist,
    to_float32,
    to_writable,
)
from vit_jax.errors import UserError
from vit_jax.files import atomic_write

# np.lib.format writes no header longer than this, but would read one of 4 GiB. What all headers may
# take together, a multiple of their usual 128 bytes: they are parsed at some MB a second.
_MAX_HEADER = 1 << 14
_MAX_HEADERS = 256 * MAX_ARRAYS


def read_npz(path: Path, size: int) -> dict[str, np.ndarray]:
    """Reads every array as float32, of a file of `size` bytes.

    Raises:
        UserError: it holds something else than arrays of numbers, or more than it can back.
        Exception: whatever the libraries that parse it raise on a damaged file.
    """
    with open_archive(path) as archive:
        members = checked_members(path, archive, size)
        if other := [name for name in members if not name.endswith(".npy")]:
            raise UserError(
                f"{path} holds {printable_shortlist(other)}, no .npy arrays: it is no .npz file"
            )
        members = {name.removesuffix(".npy"): info for name, info in members.items()}
        check_names(path, members)
        headers = _read_headers(archive, members)
        types = {name: _npy_type(path, info, headers[name]) for name, info in members.items()}
        check_declared(path, size, types)
        return {name: _read_npy(archive, info) for name, info in members.items()}


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays as float32 into an uncompressed `.npz`, whose bytes depend on nothing else.

    The file appears whole or not at all.

    Raises:
        UserError: the file cannot be written, or `read_arrays` would refuse the names.
    """
    arrays = to_writable(path, arrays)
    with atomic_write(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _read_headers(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]
) -> dict[str, bytes]:
    """Returns the header of every array, or what stands in its place, up to `_MAX_HEADER` bytes."""
    headers, length = {}, 0
    for name, info in members.items():
        with archive.open(info) as member:
            start = member.read(_MAX_HEADER)
        # The length of what follows, of 2 bytes or, from version 2 of the format on, of 4.
        at = 10 if start[6:7] == b"\x01" else 12
        headers[name] = start[: at + int.from_bytes(start[8:at], "little")]
        length += len(headers[name])
        if length > _MAX_HEADERS:
            raise ValueError(f"the headers of its arrays take more than {_MAX_HEADERS} bytes")
    return headers


def _npy_type(path: Path, info: zipfile.ZipInfo, header: bytes) -> tuple[str, tuple[int, ...]]:
    start = io.BytesIO(header)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(start))
    if read_header is None:
        raise ValueError(f"{info.filename} has an unknown version of the .npy format")
    shape, _, dtype = read_header(start)
    if dtype.hasobject:
        raise UserError(
            f"{path} holds pickled Python objects, which are never loaded: "
            "save it again with plain arrays"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if start.tell() + nbytes != info.file_size:
        raise ValueError(f"{info.filename} is not as long as its shape {shape} says")
    return "bfloat16" if dtype == np.dtype("V2") else str(dtype.newbyteorder("=")), shape


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    # NumPy stores bfloat16 as two bytes without a meaning.
    return to_float32(array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array)
