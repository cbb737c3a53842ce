"""Arrays in files: .npz, .safetensors, PyTorch and Flax, read as if every file were hostile.

Whatever a file holds, reading it gives float32 arrays or one `UserError`. Nothing in it is
executed, and the memory and the time that it takes are bounded by its own size: see
`formats.checks`.

NumPy's archives and PyTorch's carry a checksum of every array, which is verified. Safetensors,
Flax's msgpack and the PyTorch files of before version 1.6 carry none: only their structure can be
checked.
"""

import contextlib
import json
import os
import stat
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vit_jax.checkpoints.formats import checks, flax_msgpack, npz, safetensors, torch_pickle
from vit_jax.errors import UserError, first_line, shortlist
from vit_jax.files import storage_errors
from vit_jax.printable import printable

FileFormat = Literal["npz", "safetensors", "torch", "legacy torch", "flax"]

_READERS: dict[FileFormat, Callable[[Path, int], dict[str, np.ndarray]]] = {
    "npz": npz.read_npz,
    "safetensors": safetensors.read_safetensors,
    "torch": torch_pickle.read_torch,
    "legacy torch": lambda path, size: torch_pickle.read_torch(path, size, is_legacy=True),
    "flax": flax_msgpack.read_flax,
}

# Of 16 GiB in all; Hugging Face cuts at 5 GB.
MAX_SHARDS = 1000

# How files begin that are often in the place of weights, and the way out.
_MISTAKEN = {
    b"version https://git-lfs": "a Git LFS pointer to the weights: run `git lfs pull` there",
    b"<": "a web page: fetch the file itself",
    b"\x89HDF": "an HDF5 file, as Keras writes it: save it as .safetensors where it was made",
    b"GGUF": "a GGUF file: use the .safetensors that it was made of",
}


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads every array of a file, whose format is recognized from its content.

    Args:
        path: NumPy's `.npz`, `.safetensors`, or a state dict saved by `torch.save`, which needs
            PyTorch (`torch.load` with `weights_only=True`) and may be wrapped in a dict as `model`
            or `state_dict`, or what `flax.serialization.to_bytes` wrote, of which `params` is read
            where it has that. A file named `.npz` or `.safetensors` is never read as one of these.

    Returns:
        Float32 arrays in C order, independent of the file, by their names in it. Float16,
        bfloat16 and float64, big-endian and Fortran order are converted.

    Raises:
        UserError: the file is missing, no regular file, damaged, of another format, empty; it holds
            pickled objects or code, arrays that are not floating point, NaN or infinite values,
            names that do not make a tree, or declares more than it can back.
    """
    path = Path(path)
    with _reading(path):
        size = _file_size(path)
        arrays = _READERS[_detect_format(path)](path, size)
        if not arrays:
            raise UserError(f"{path} holds no parameters: use another file")
        if bad := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
            raise UserError(
                f"{path} has NaN or infinite values in {shortlist(bad)} (as float32): "
                "use another file"
            )
    return arrays


def read_sharded(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the arrays of all shards that a Hugging Face index names.

    Together they may take what one file of their size may.

    Args:
        path: a `model.safetensors.index.json`, or that of other shards, whose `weight_map` gives
            the shard of every array: a file in the same folder.

    Raises:
        UserError: the index is damaged, a shard is missing or lies elsewhere, the shards do not
            hold what the index says, or one of them cannot be read by `read_arrays`.
    """
    path = Path(path)
    with _reading(path):
        weight_map = _read_weight_map(path)
        shards = _find_shards(path, weight_map)
    size = sum(map(_file_size, shards))
    arrays, found = {}, {}
    for shard in shards:
        read = read_arrays(shard)
        checks.check_total(path, size, sum(x.nbytes for x in [*arrays.values(), *read.values()]))
        if repeated := sorted(arrays.keys() & read.keys()):
            raise UserError(
                f"{shard} repeats {checks.printable_shortlist(repeated)} of another shard: "
                "fetch it again"
            )
        arrays |= read
        found |= dict.fromkeys(read, shard.name)
    if found != weight_map:
        wrong = sorted({name for name, _ in found.items() ^ weight_map.items()})
        raise UserError(
            f"{path} does not agree with its shards about {checks.printable_shortlist(wrong)}: "
            "fetch all again"
        )
    return arrays


def _read_weight_map(path: Path) -> dict[str, str]:
    if _file_size(path) > checks.MAX_HEADER:
        raise UserError(f"{path} is larger than {checks.MAX_HEADER >> 20} MiB: it is no index")
    index = json.loads(path.read_bytes(), object_pairs_hook=checks.unique_keys)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f'{path} has no "weight_map": use the index that lies beside the shards')
    if bad := [str(name) for name in weight_map.values() if not _is_file_name(name)]:
        raise UserError(
            f"{path} names the shards {checks.printable_shortlist(bad)}: they must lie in its own "
            "folder"
        )
    return weight_map


def _is_file_name(value: Any) -> bool:
    return checks.is_name(value) and not {"/", "\\"} & set(value)


def _find_shards(path: Path, weight_map: dict[str, str]) -> list[Path]:
    shards = [path.with_name(name) for name in sorted({*weight_map.values()})]
    if len(shards) > MAX_SHARDS:
        raise UserError(f"{path} names {len(shards)} shards: at most {MAX_SHARDS} are read")
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise UserError(f"{path} names shards that are missing: put {shortlist(missing)} there")
    if sum(map(_file_size, shards)) > checks.MAX_BYTES:
        raise UserError(
            f"{path} has shards of more than {checks.MAX_BYTES >> 30} GiB: use another model"
        )
    return shards


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} does not fit in memory: use a smaller file") from error
    except Exception as error:  # parsers of other projects have no class for hostile bytes
        reason = printable(first_line(error))
        raise UserError(f"{path} is damaged ({reason}): fetch it again") from error


def _file_size(path: Path) -> int:
    with storage_errors(lambda reason: f"{path} cannot be read: {reason}; give another file"):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"{path} does not exist: give an existing file") from error
        if not stat.S_ISREG(mode):  # to open a FIFO would wait for ever
            raise UserError(f"{path} is a directory or a device: give a file")
        with path.open("rb") as file:
            return file.seek(0, os.SEEK_END)


def _detect_format(path: Path) -> FileFormat:
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        file_format = "torch" if torch_pickle.is_torch_archive(path) else "npz"
    elif start.startswith(torch_pickle.LEGACY_START):
        file_format = "legacy torch"
    elif start[8:9] == b"{":
        file_format = "safetensors"
    elif flax_msgpack.is_flax(start) and path.suffix not in {".npz", ".safetensors"}:
        file_format = "flax"
    else:
        raise _unknown_format(path, start)
    if "torch" in file_format and path.suffix in {".npz", ".safetensors"}:
        raise UserError(
            f"{path} is a PyTorch pickle and no {path.suffix} file: "
            "name it .pth if that is what it should be"
        )
    return file_format


def _unknown_format(path: Path, start: bytes) -> UserError:
    if start[257:262] == b"ustar" or start[:1] == b"\x80":
        return UserError(
            f"{path} is a pickle, which may hold code and is never loaded: "
            "save it as .safetensors where it was made"
        )
    for mark, what in _MISTAKEN.items():
        if start.startswith(mark):
            return UserError(f"{path} is {what}")
    expected = {".npz": "an .npz", ".safetensors": "a .safetensors"}
    name = expected.get(path.suffix, "an .npz, .safetensors, PyTorch or Flax")
    return UserError(f"{path} is truncated or not {name} file: fetch it again")
