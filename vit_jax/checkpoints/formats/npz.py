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
    check_declared,
    check_names,
    checked_members,
    printable_shortlist,
    to_float32,
    to_writable,
)
from vit_jax.errors import UserError
from vit_jax.files import atomic_write

# np.lib.format writes no header longer than this, but would read one of 4 GiB.
_MAX_HEADER = 1 << 14


def read_npz(path: Path, size: int) -> dict[str, np.ndarray]:
    """Reads every array as float32, of a file of `size` bytes.

    Raises:
        UserError: it holds something else than arrays of numbers, or more than it can back.
        Exception: whatever the libraries that parse it raise on a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        members = checked_members(path, archive, size)
        if other := [name for name in members if not name.endswith(".npy")]:
            raise UserError(
                f"{path} holds {printable_shortlist(other)}, no .npy arrays: it is no .npz file"
            )
        members = {name.removesuffix(".npy"): info for name, info in members.items()}
        check_names(path, members)
        types = {name: _npy_type(path, archive, info) for name, info in members.items()}
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


def _npy_type(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[str, tuple[int, ...]]:
    with archive.open(info) as member:
        start = io.BytesIO(member.read(_MAX_HEADER))
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
