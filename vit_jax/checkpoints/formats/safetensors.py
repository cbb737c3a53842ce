"""The `.safetensors` format: a JSON header and the arrays, without checksums."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from vit_jax.checkpoints.formats.checks import (
    MAX_HEADER,
    check_declared,
    check_names,
    to_float32,
    to_writable,
    unique_keys,
)
from vit_jax.errors import first_line
from vit_jax.files import atomic_write

# The dtypes of the format and NumPy's names of them.
_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def read_safetensors(path: Path, size: int) -> dict[str, np.ndarray]:
    """Reads every array as float32, of a file of `size` bytes.

    Raises:
        UserError: it holds arrays of other numbers, or more than it can back.
        Exception: whatever the libraries that parse it raise on a damaged file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"its header would take {length} bytes")
        # The safetensors library keeps the last of several values of one name.
        json.loads(file.read(length), object_pairs_hook=unique_keys)
    with safetensors.safe_open(path, framework="np") as file:
        names = list(file.keys())
        check_names(path, names)
        slices = {name: file.get_slice(name) for name in names}
        types = {
            name: (_TYPES.get(x.get_dtype(), x.get_dtype()), tuple(x.get_shape()))
            for name, x in slices.items()
        }
        check_declared(path, size, types)
        return {name: to_float32(file.get_tensor(name)) for name in names}


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], **metadata: str
) -> None:
    """Writes arrays as float32 into a `.safetensors` file, and texts into its header.

    The file appears whole or not at all.

    Raises:
        UserError: the file cannot be written, or `read_arrays` would refuse the names.
    """
    arrays = to_writable(path, arrays)
    with atomic_write(Path(path)) as temporary:
        # transformers refuses a file that does not name the framework of its layouts.
        try:
            safetensors.numpy.save_file(arrays, temporary, metadata={"format": "pt", **metadata})
        except safetensors.SafetensorError as error:
            raise OSError(first_line(error)) from error
