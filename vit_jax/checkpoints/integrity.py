"""A checkpoint directory: the items in it, and the proof that they are what was saved.

A step holds two orbax items. `state` is the tree of arrays. `metadata` is a JSON document with the
caller's own metadata, the shape, dtype and fingerprint of every array, and its own checksum.
"""

import contextlib
import gc
import io
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax import lax

from vit_jax.errors import UserError, first_line, shortlist


class DamagedError(Exception):
    """A checkpoint that does not hold, or no longer holds, what was saved."""


def item_handlers() -> dict[str, ocp.CheckpointHandler]:
    """The orbax handlers of the items of a checkpoint."""
    # Trained float32 weights compress by a tenth, which takes four times as long to write.
    return {
        "state": ocp.PyTreeCheckpointHandler(use_compression=False),
        "metadata": ocp.JsonCheckpointHandler(),
    }


def items(state: Any, metadata: dict[str, Any]) -> ocp.args.Composite:
    """The orbax items of a checkpoint of `state`, a tree of arrays, with JSON-like `metadata`."""
    document = {
        "metadata": metadata,
        "arrays": describe(state),
        "fingerprints": fingerprints(state),
    }
    document = json.loads(json.dumps(document))
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        metadata=ocp.args.JsonSave(document | {"checksum": _checksum(document)}),
    )


def read_document(step_dir: Path) -> dict[str, Any]:
    """Reads the JSON document of a checkpoint: `metadata`, `arrays` and `fingerprints`.

    Raises:
        DamagedError: it is missing or altered.
    """
    try:
        document = json.loads((step_dir / "metadata" / "metadata").read_bytes())
        checksum = document.pop("checksum")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"its metadata cannot be read: {first_line(error)}") from error
    if checksum != _checksum(document):
        raise DamagedError("its metadata differs from what was saved")
    return document


def read_state(step_dir: Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Restores a state onto the shardings of `abstract_state` and verifies it.

    Returns:
        The state, whose arrays are safe to donate, and the caller's metadata.

    Raises:
        DamagedError: arrays are missing, unreadable or altered.
        UserError: the checkpoint is sound, but of another tree.
    """
    document = read_document(step_dir)
    now = describe(abstract_state)
    if differences := mapping_differences(document["arrays"], now):
        raise UserError(
            f"checkpoint {step_dir} is of another model or optimizer: {shortlist(differences)}; "
            "use the config that it was made with, or another --workdir"
        )
    to_sharding = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    state = _restore(step_dir, ocp.args.PyTreeRestore(abstract_state, to_sharding))
    _verify(state, document["arrays"], document["fingerprints"])
    # On a CPU a restored array may share the memory of a NumPy array, which must not be donated.
    if jax.default_backend() == "cpu":
        state = jax.tree.map(jnp.copy, state)
    return state, document["metadata"]


def read_subtree(step_dir: Path, name: str) -> dict[str, Any]:
    """Reads one field of a saved state (`params`) as nested dicts of NumPy arrays, and verifies it.

    Neither the model nor the devices of the run are needed.

    Raises:
        DamagedError: arrays are missing, unreadable or altered.
    """
    document = read_document(step_dir)
    saved = {k: v for k, v in document["fingerprints"].items() if k.startswith(f"{name}/")}
    tree = unflatten_dict(dict.fromkeys(saved, 0), sep="/")
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = _restore(step_dir, ocp.args.PyTreeRestore(tree, to_numpy, partial_restore=True))
    _verify(state, document["arrays"], saved)
    return state.get(name, {})


def describe(tree: Any) -> dict[str, str]:
    """Maps the name of every array, concrete or abstract, to its type: `float32[768, 10]`."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in _named_leaves(tree).items()}


def fingerprints(tree: Any) -> dict[str, int]:
    """Maps the name of every array to 32 bits that depend on each value and its position.

    Any single altered value changes them for certain, any other alteration but for one in 2**32.
    They depend on neither sharding nor device.
    """
    sums = jax.device_get(_fingerprints(_named_leaves(tree)))
    return {name: int(x) for name, x in sums.items()}


def mapping_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Lists the differing values, one line a key: `base_lr: 0.03 in the checkpoint, 0.01 now`."""
    absent = object()

    def show(value: Any) -> str:
        return "absent" if value is absent else str(value)

    pairs = {
        key: (saved.get(key, absent), current.get(key, absent))
        for key in sorted({*saved, *current})
    }
    return [
        f"{key}: {show(old)} in the checkpoint, {show(new)} now"
        for key, (old, new) in pairs.items()
        if old != new
    ]


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@jax.jit
def _fingerprints(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _fingerprint(x) for name, x in arrays.items()}


def _fingerprint(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64-bit values become pairs of 32-bit words.
    bits = min(x.dtype.itemsize * 8, 32)
    words = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    stride = 0x9E3779B9  # 2**32 over the golden ratio: neighbors get unrelated offsets
    for axis in reversed(range(words.ndim)):
        position = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        words += position * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The finaliser of MurmurHash3, a bijection, makes a swap of two values as visible as a change.
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


def _checksum(document: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _restore(step_dir: Path, args: ocp.args.PyTreeRestore) -> Any:
    # Where a read fails, orbax abandons the others, which write tracebacks to stderr as they end.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                return checkpointer.restore((step_dir / "state").absolute(), args=args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and tensorstore have no class for what is unreadable
            reason = first_line(_root_cause(error))
        gc.collect()
    raise DamagedError(f"its arrays cannot be read: {reason}")


def _root_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root_cause(error.__cause__)


def _verify(state: Any, types: dict[str, str], saved: dict[str, int]) -> None:
    found_types, found = describe(state), fingerprints(state)
    altered = [
        name
        for name in saved
        if (found_types.get(name), found.get(name)) != (types[name], saved[name])
    ]
    if altered:
        raise DamagedError(f"not what was saved: {shortlist(altered)}")
