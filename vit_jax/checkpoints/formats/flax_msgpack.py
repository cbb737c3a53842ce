"""The format that `flax.serialization.to_bytes` writes: msgpack without checksums."""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.formats.checks import (
    MAX_ARRAYS,
    MAX_NAME,
    check_declared,
    check_names,
    check_total,
    printable_shortlist,
    to_float32,
    unique_keys,
)
from vit_jax.errors import UserError

# How a map of msgpack begins, of up to 15 entries and of 16 or 32 bits, and then its first name.
_MAP_START = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", re.DOTALL)

# The extension types of arrays and scalars in `flax.serialization`; the key of what is over 1 GiB.
_ARRAYS, _CHUNKS = (1, 3), "__msgpack_chunked_array__"
_MAX_DIMENSIONS = 32


def is_flax(start: bytes) -> bool:
    """Tells whether a file that begins so may be one of Flax: a map whose first key is a string."""
    return _MAP_START.match(start) is not None


def read_flax(path: Path, size: int) -> dict[str, np.ndarray]:
    """Reads every array as float32, of a file of `size` bytes; of a train state, its parameters.

    Raises:
        UserError: it holds something else than arrays of numbers, or more than it can back.
        Exception: whatever the libraries that parse it raise on a damaged file.
    """
    check_total(path, size, size)
    tree = _unpack(path)
    # Of a train state, or what `init` returns; `target` is that of Flax's first optimizers.
    while inner := [tree[key] for key in ("params", "target") if isinstance(tree.get(key), dict)]:
        tree = inner[0]
    arrays = unique_keys([("/".join(name), x) for name, x in flatten_dict(tree).items()])
    check_names(path, arrays)
    if other := [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]:
        way_out = "write an .npz"
        if any(_CHUNKS in name for name in other):
            way_out = "arrays above 1 GiB are not read, write an .npz"
        raise UserError(f"{path} has {printable_shortlist(other)}, no arrays: {way_out}")
    check_declared(path, size, {name: (str(x.dtype), x.shape) for name, x in arrays.items()})
    return {name: to_float32(np.array(x)) for name, x in arrays.items()}


def _unpack(path: Path) -> dict[str, Any]:
    import msgpack

    entries = 0

    def count(container: list[Any]) -> list[Any]:
        # An empty map or list takes a byte in the file and a hundred in memory.
        nonlocal entries
        entries += 1 + len(container)
        if entries > 4 * MAX_ARRAYS:
            raise UserError(f"{path} holds more than {4 * MAX_ARRAYS} entries: that is no model")
        return container

    return msgpack.unpackb(
        path.read_bytes(),
        object_pairs_hook=lambda pairs: unique_keys(count(pairs)),
        list_hook=count,
        ext_hook=lambda code, data: _array(path, data) if code in _ARRAYS else None,
        max_array_len=_MAX_DIMENSIONS,
        max_map_len=MAX_ARRAYS,
        max_str_len=MAX_NAME,
    )


def _array(path: Path, data: bytes) -> np.ndarray:
    import msgpack

    shape, dtype, values = msgpack.unpackb(
        data, max_array_len=_MAX_DIMENSIONS, max_map_len=0, max_ext_len=0, max_str_len=MAX_NAME
    )
    dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
    numpy_type = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if numpy_type.hasobject:
        raise UserError(f"{path} holds pickled Python objects, which are never loaded")
    return np.frombuffer(values, numpy_type).reshape(shape)
