"""State dicts of `torch.save`, of which nothing is executed.

Files since version 1.6 are zip archives with a checksum of every tensor, which is verified; those
of before are pickles in a row and carry none.
"""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vit_jax.checkpoints.formats.checks import (
    MAX_ARRAYS,
    MAX_HEADER,
    check_declared,
    check_names,
    checked_members,
    open_archive,
    printable_shortlist,
    to_float32,
)
from vit_jax.errors import UserError
from vit_jax.printable import printable

# How every file of torch.save from before version 1.6 begins: its magic number, pickled.
LEGACY_START = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")

# A tensor takes some 30 opcodes, and an optimizer beside the model has two more for each. PyTorch
# and `_check_pickle` go through about a million in a second.
_MAX_OPCODES = 100 * MAX_ARRAYS

# What the pickle of a state dict calls.
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")
    ),
    "torch BoolStorage",
}

# Where training scripts put the state dict into their checkpoint; the average goes first, as in
# timm, for it is what such runs evaluate. DINO's teacher is the average of its student.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "model_state_dict")


def is_torch_archive(path: Path) -> bool:
    """Tells whether a zip archive is one of `torch.save`, by the name of its pickle."""
    with open_archive(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def read_torch(path: Path, size: int, *, is_legacy: bool = False) -> dict[str, np.ndarray]:
    """Reads every tensor as float32, of a file of `size` bytes.

    Args:
        path: of the file.
        size: of the file, in bytes.
        is_legacy: whether it is of before PyTorch 1.6 and begins with `LEGACY_START`.

    Raises:
        UserError: it holds code or objects, no state dict, or more than it can back; or PyTorch is
            not installed.
        Exception: whatever the libraries that parse it raise on a damaged file.
    """
    if is_legacy:
        _check_legacy_pickles(path)
    else:
        _check_archive(path, size)
    tensors = _state_dict(path, _load(path, mmap=not is_legacy))
    check_names(path, tensors)
    types = {
        name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in tensors.items()
    }
    check_declared(path, size, types)
    # A copy: the tensors are views of the file, which may change.
    return {name: to_float32(np.array(x.detach().float().numpy())) for name, x in tensors.items()}


def _load(path: Path, mmap: bool) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed: "
            "pip install -e '.[peers]', or convert the file to .safetensors"
        ) from error
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not what torch.load(weights_only=True) would load: save model.state_dict()"
        ) from error


def _state_dict(path: Path, loaded: Any) -> dict[Any, Any]:
    import torch

    _check_teacher(path, loaded)
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no state dict: save model.state_dict()")
    if other := [str(name) for name, x in loaded.items() if not isinstance(x, torch.Tensor)]:
        raise UserError(
            f"{path} has {printable_shortlist(other)}, no tensors: save model.state_dict()"
        )
    return loaded


def _check_teacher(path: Path, loaded: Any) -> None:
    """Refuses a checkpoint of distillation: its teacher may be any model, and not the average."""
    if not isinstance(loaded, dict):
        return
    found = [key for key in _WRAPPERS if isinstance(loaded.get(key), dict)]
    if "teacher" in found and len(found) > 1:
        raise UserError(
            f"{path} holds several models, named {', '.join(found)}: save the state dict of one of "
            "them alone"
        )


def _check_legacy_pickles(path: Path) -> None:
    with path.open("rb") as file:
        pickles = io.BytesIO(file.read(MAX_HEADER))
    # The magic number, the version, the system, the object and the order of its storages.
    for _ in range(5):
        _check_pickle(path, pickles)


def _check_archive(path: Path, size: int) -> None:
    with open_archive(path) as archive:
        members = checked_members(path, archive, size)
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise UserError(f"{path} was compressed, which PyTorch does not do: unpack it first")
        pickles = [info for name, info in members.items() if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER:
            raise ValueError("it does not hold one small data.pkl")
        if damaged := archive.testzip():  # torch.load ignores the checksums
            raise ValueError(f"{damaged} does not have its checksum")
        _check_pickle(path, io.BytesIO(archive.read(pickles[0])))


def _check_pickle(path: Path, file: BinaryIO) -> None:
    """Refuses what `torch.load(weights_only=True)` would not execute, yet allocate or hash.

    It calls `bytearray(n)` or `torch.Tensor(n)` for any n, and executes any number of opcodes.
    Tuples of tuples that are fetched from the memo take a few bytes per doubling, and a dict hashes
    them whole.
    """
    fetchable, top = set(), ""
    for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
        if count > _MAX_OPCODES:
            raise UserError(f"{path} has more than {_MAX_OPCODES} opcodes: that is no state dict")
        if opcode.name in {"GLOBAL", "STACK_GLOBAL", "INST"} and value not in _GLOBALS:
            name = printable(str(value or opcode.name).replace(" ", "."))
            raise UserError(
                f"{path} holds code or objects ({name}), which are never loaded: "
                "save model.state_dict() alone, or convert it to .safetensors where it was made"
            )
        if opcode.name in {"BINPUT", "LONG_BINPUT"}:
            (fetchable.discard if top.startswith("TUPLE") else fetchable.add)(value)
            continue
        if opcode.name in {"BINGET", "LONG_BINGET"} and value not in fetchable:
            raise UserError(
                f"{path} refers to one tuple twice, which no state dict does: "
                "save model.state_dict() alone"
            )
        top = opcode.name
