"""Pretrained weights from a file or a run, as a plain tree of NumPy arrays."""

import dataclasses
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.integrity import (
    DamagedError,
    first_line,
    read_document,
    read_subtree,
    shortlist,
)
from vit_jax.checkpoints.training import saved_steps
from vit_jax.errors import UserError

_ACCEPTED = "an .npz file in the official format, a run's workdir, or one checkpoint in it"

# What NumPy and zipfile raise for a damaged or hostile archive.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights and where they came from.

    Attributes:
        params: nested dicts of float32 arrays, in the tree of the file.
        source: the file or checkpoint directory that was read.
        metadata: what the run saved beside them; empty for an .npz file.
    """

    params: dict[str, Any]
    source: str
    metadata: dict[str, Any]


def load_pretrained(path: str | os.PathLike[str]) -> Pretrained:
    """Reads weights from an official `.npz` file or from a run of this project.

    Args:
        path: an `.npz` whose keys are parameter names joined by "/"; or a run's workdir or its
            `checkpoints` or `best` directory, of which the newest step is read; or one step. Of a
            run that averaged its parameters the average is read.

    Raises:
        UserError: the path is none of these, or what it holds is damaged, empty or not finite.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give {_ACCEPTED}")
    pretrained = _read_run(path) if path.is_dir() else _read_npz(path)
    flat = flatten_dict(pretrained.params, sep="/")
    if not flat:
        raise UserError(f"{path} holds no parameters: give {_ACCEPTED}")
    if bad := [name for name, x in flat.items() if not np.isfinite(x).all()]:
        raise UserError(f"{path} has NaN or infinite values in {shortlist(bad)}: use another file")
    return pretrained


def _read_npz(path: Path) -> Pretrained:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not an .npz file: fetch it again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            flat = {name: _float32(archive[name], name, path) for name in archive.files}
            params = unflatten_dict(flat, sep="/")
    except UserError:
        raise
    except _UNREADABLE as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds pickled Python objects, which are never loaded: "
                "save it again with plain arrays"
            ) from error
        raise UserError(f"{path} is damaged ({first_line(error)}): fetch it again") from error
    return Pretrained(params, str(path), {})


def _read_run(path: Path) -> Pretrained:
    step_dir = _step_directory(path)
    try:
        document = read_document(step_dir)
        averaged = any(name.startswith("ema_params/") for name in document["arrays"])
        params = read_subtree(step_dir, "ema_params" if averaged else "params")
    except DamagedError as error:
        raise UserError(
            f"checkpoint {step_dir} is damaged: {error}; name another step of the run"
        ) from error
    flat = flatten_dict(params, sep="/")
    params = unflatten_dict({name: _float32(x, name, path) for name, x in flat.items()}, sep="/")
    return Pretrained(params, str(step_dir), document["metadata"])


def _step_directory(path: Path) -> Path:
    if (path / "metadata").is_dir() and (path / "state").is_dir():
        return path
    for directory in (path, path / "checkpoints"):
        if steps := saved_steps(directory):
            return directory / str(steps[0])
    raise UserError(f"{path} holds no checkpoint: give {_ACCEPTED}")


def _float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # how NumPy stores bfloat16
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype != ml_dtypes.bfloat16 and not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{path} has {name} of type {array.dtype}: parameters are floating point")
    return array.astype(np.float32)
