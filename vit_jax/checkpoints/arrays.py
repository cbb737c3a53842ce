"""Arrays in files: .npz, .safetensors, PyTorch and Flax, read as if every file were hostile.

Whatever a file holds, reading it gives float32 arrays or one `UserError`. Nothing in it is
executed, and what it makes the reader allocate is bounded by its own size: the arrays that it
declares may take 256 MiB plus 8 times the size of the file, and never more than 16 GiB. Float16
doubles, compressed trained weights shrink by a tenth, and a head or biases that are still zero
compress to nothing, which the 256 MiB allow for; a decompression bomb grows a thousandfold.

NumPy's archives and PyTorch's carry a checksum of every array, which is verified. Safetensors,
Flax's msgpack and the PyTorch files of before version 1.6 carry none: only their structure can be
checked.
"""

import contextlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError, first_line, shortlist
from vit_jax.files import atomic_write, storage_errors

MAX_BYTES = 16 << 30
MAX_ARRAYS = 10_000  # ViT-H/14 has 400
_MAX_NAME = 250

# What the arrays of a file may take together, where it is small and what it holds compresses well.
_ALLOWANCE = 256 << 20
_EXPANSION = 8

# Names, shapes and offsets of MAX_ARRAYS arrays fit; parsing takes a few hundred bytes per byte.
_MAX_HEADER = 4 << 20
# np.lib.format writes no header longer than this, but would read one of 4 GiB.
_MAX_NPY_HEADER = 1 << 14

# How every file of torch.save from before version 1.6 begins: its magic number, pickled.
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")

_TORCH_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")
    ),
    "torch BoolStorage",
}

# Bytes of one value while it is read: everything becomes float32.
_WIDTHS = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 8}

# Of the safetensors format.
_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

# How a map of msgpack begins, of up to 15 entries and of 16 or 32 bits, and then its first name.
_MSGPACK_MAP = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", re.DOTALL)
# How files begin that are often in the place of weights, and the way out.
_MISTAKEN = {
    b"version https://git-lfs": "a Git LFS pointer to the weights: run `git lfs pull` there",
    b"<": "a web page: fetch the file itself",
    b"\x89HDF": "an HDF5 file, as Keras writes it: save it as .safetensors where it was made",
    b"GGUF": "a GGUF file: use the .safetensors that it was made of",
}

# The extension types of arrays and scalars in `flax.serialization`; the key of what is over 1 GiB.
_FLAX_ARRAYS, _FLAX_CHUNKS = (1, 3), "__msgpack_chunked_array__"
_MAX_DIMENSIONS = 32

# Where training scripts put the state dict into their checkpoint; the average goes first, as in
# timm, for it is what such runs evaluate.
_TORCH_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")

Kind = Literal["npz", "safetensors", "torch", "legacy torch", "flax"]


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
        kind = _kind(path)
        readers = {"npz": _read_npz, "safetensors": _read_safetensors, "flax": _read_flax}
        arrays = readers[kind](path, size) if kind in readers else _read_torch(path, size, kind)
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

    Args:
        path: a `model.safetensors.index.json`, or that of other shards, whose `weight_map` gives
            the shard of every array: a file in the same folder.

    Raises:
        UserError: the index is damaged, a shard is missing or lies elsewhere, the shards do not
            hold what the index says, or one of them cannot be read by `read_arrays`.
    """
    path = Path(path)
    with _reading(path):
        if _file_size(path) > _MAX_HEADER:
            raise UserError(f"{path} is larger than {_MAX_HEADER >> 20} MiB: it is no index")
        index = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(
                f'{path} has no "weight_map": use the index that lies beside the shards'
            )
        if bad := [str(name) for name in weight_map.values() if not _is_file_name(name)]:
            raise UserError(
                f"{path} names the shards {_shortlist(bad)}: they must lie in its own folder"
            )
        shards = [path.with_name(name) for name in sorted({*weight_map.values()})]
        if missing := [shard.name for shard in shards if not shard.exists()]:
            raise UserError(f"{path} names shards that are missing: put {shortlist(missing)} there")
        if sum(map(_file_size, shards)) > MAX_BYTES:
            raise UserError(
                f"{path} has shards of more than {MAX_BYTES >> 30} GiB: use another model"
            )
    arrays, found = {}, {}
    for shard in shards:
        read = read_arrays(shard)
        if twice := sorted(arrays.keys() & read.keys()):
            raise UserError(f"{shard} repeats {_shortlist(twice)} of another shard: fetch it again")
        arrays |= read
        found |= dict.fromkeys(read, shard.name)
    if found != weight_map:
        wrong = sorted({name for name, _ in found.items() ^ weight_map.items()})
        raise UserError(
            f"{path} does not agree with its shards about {_shortlist(wrong)}: fetch all again"
        )
    return arrays


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays as float32 into an uncompressed `.npz`, whose bytes depend on nothing else.

    The file appears whole or not at all.

    Raises:
        UserError: the file cannot be written, or `read_arrays` would refuse the names.
    """
    arrays = _writable(path, arrays)
    with atomic_write(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_safetensors(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays as float32 into a `.safetensors` file.

    The file appears whole or not at all.

    Raises:
        UserError: the file cannot be written, or `read_arrays` would refuse the names.
    """
    arrays = _writable(path, arrays)
    with atomic_write(Path(path)) as temporary:
        # transformers refuses a file that does not name the framework of its layouts.
        try:
            safetensors.numpy.save_file(arrays, temporary, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(first_line(error)) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} does not fit in memory: use a smaller file") from error
    except Exception as error:  # parsers of other projects have no class for hostile bytes
        reason = _printable(first_line(error))
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


def _kind(path: Path) -> Kind:
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith("/data.pkl") for name in archive.namelist())
        kind = "torch" if pickled else "npz"
    elif start.startswith(_LEGACY_TORCH):
        kind = "legacy torch"
    elif start[8:9] == b"{":
        kind = "safetensors"
    elif _MSGPACK_MAP.match(start) and path.suffix not in {".npz", ".safetensors"}:
        kind = "flax"
    elif start[257:262] == b"ustar" or start[:1] == b"\x80":
        raise UserError(
            f"{path} is a pickle, which may hold code and is never loaded: "
            "save it as .safetensors where it was made"
        )
    elif mistaken := [what for how, what in _MISTAKEN.items() if start.startswith(how)]:
        raise UserError(f"{path} is {mistaken[0]}")
    else:
        expected = {".npz": "an .npz", ".safetensors": "a .safetensors"}
        name = expected.get(path.suffix, "an .npz, .safetensors, PyTorch or Flax")
        raise UserError(f"{path} is truncated or not {name} file: fetch it again")
    if "torch" in kind and path.suffix in {".npz", ".safetensors"}:
        raise UserError(
            f"{path} is a PyTorch pickle and no {path.suffix} file: "
            "name it .pth if that is what it should be"
        )
    return kind


def _read_npz(path: Path, size: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = _checked_members(path, archive, size)
        if other := [name for name in members if not name.endswith(".npy")]:
            raise UserError(f"{path} holds {_shortlist(other)}, no .npy arrays: it is no .npz file")
        members = {name.removesuffix(".npy"): info for name, info in members.items()}
        _check_names(path, members)
        types = {name: _npy_type(path, archive, info) for name, info in members.items()}
        _check_declared(path, size, types)
        return {name: _read_npy(archive, info) for name, info in members.items()}


def _npy_type(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[str, tuple[int, ...]]:
    with archive.open(info) as member:
        start = io.BytesIO(member.read(_MAX_NPY_HEADER))
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
    return _float32(array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array)


def _read_safetensors(path: Path, size: int) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"its header would take {length} bytes")
        # The safetensors library keeps the last of several values of one name.
        json.loads(file.read(length), object_pairs_hook=_unique_keys)
    with safetensors.safe_open(path, framework="np") as file:
        names = list(file.keys())
        _check_names(path, names)
        slices = {name: file.get_slice(name) for name in names}
        types = {
            name: (_TYPES.get(x.get_dtype(), x.get_dtype()), tuple(x.get_shape()))
            for name, x in slices.items()
        }
        _check_declared(path, size, types)
        return {name: _float32(file.get_tensor(name)) for name in names}


def _read_torch(path: Path, size: int, kind: Kind) -> dict[str, np.ndarray]:
    if kind == "torch":
        _check_torch_archive(path, size)
    else:
        with path.open("rb") as file:
            pickles = io.BytesIO(file.read(_MAX_HEADER))
        # The magic number, the version, the system, the object and the order of its storages.
        for _ in range(5):
            _check_pickle(path, pickles)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed: "
            "pip install -e '.[peers]', or convert the file to .safetensors"
        ) from error
    try:
        loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=kind == "torch")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not what torch.load(weights_only=True) would load: save model.state_dict()"
        ) from error
    for key in _TORCH_WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no state dict: save model.state_dict()")
    if other := [str(name) for name, x in loaded.items() if not isinstance(x, torch.Tensor)]:
        raise UserError(f"{path} has {_shortlist(other)}, no tensors: save model.state_dict()")
    _check_names(path, loaded)
    types = {
        name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in loaded.items()
    }
    _check_declared(path, size, types)
    # A copy: the tensors are views of the file, which may change.
    return {name: _float32(np.array(x.detach().float().numpy())) for name, x in loaded.items()}


def _read_flax(path: Path, size: int) -> dict[str, np.ndarray]:
    import msgpack

    _check_total(path, size, size)
    entries = 0

    def count(container: list[Any]) -> list[Any]:
        # An empty map or list takes a byte in the file and a hundred in memory.
        nonlocal entries
        entries += 1 + len(container)
        if entries > 4 * MAX_ARRAYS:
            raise UserError(f"{path} holds more than {4 * MAX_ARRAYS} entries: that is no model")
        return container

    limits = {"max_array_len": _MAX_DIMENSIONS, "max_map_len": MAX_ARRAYS}
    tree = msgpack.unpackb(
        path.read_bytes(),
        object_pairs_hook=lambda pairs: _unique_keys(count(pairs)),
        list_hook=count,
        ext_hook=lambda code, data: _flax_array(path, data) if code in _FLAX_ARRAYS else None,
        max_str_len=_MAX_NAME,
        **limits,
    )
    # Of a train state, or what `init` returns; `target` is that of Flax's first optimizers.
    while inner := [tree[key] for key in ("params", "target") if isinstance(tree.get(key), dict)]:
        tree = inner[0]
    arrays = _unique_keys([("/".join(name), x) for name, x in flatten_dict(tree).items()])
    _check_names(path, arrays)
    if other := [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]:
        way_out = "write an .npz"
        if any(_FLAX_CHUNKS in name for name in other):
            way_out = "arrays above 1 GiB are not read, write an .npz"
        raise UserError(f"{path} has {_shortlist(other)}, no arrays: {way_out}")
    types = {name: (str(x.dtype), x.shape) for name, x in arrays.items()}
    _check_declared(path, size, types)
    return {name: _float32(np.array(x)) for name, x in arrays.items()}


def _flax_array(path: Path, data: bytes) -> np.ndarray:
    import msgpack

    shape, dtype, values = msgpack.unpackb(
        data, max_array_len=_MAX_DIMENSIONS, max_map_len=0, max_ext_len=0, max_str_len=_MAX_NAME
    )
    dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
    numpy_type = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if numpy_type.hasobject:
        raise UserError(f"{path} holds pickled Python objects, which are never loaded")
    return np.frombuffer(values, numpy_type).reshape(shape)


def _check_torch_archive(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        members = _checked_members(path, archive, size)
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise UserError(f"{path} was compressed, which PyTorch does not do: unpack it first")
        pickles = [info for name, info in members.items() if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_HEADER:
            raise ValueError("it does not hold one small data.pkl")
        if damaged := archive.testzip():  # torch.load ignores the checksums
            raise ValueError(f"{damaged} does not have its checksum")
        _check_pickle(path, io.BytesIO(archive.read(pickles[0])))


def _check_pickle(path: Path, file: BinaryIO) -> None:
    """Refuses what `torch.load(weights_only=True)` would not execute, yet allocate or hash.

    It calls `bytearray(n)` or `torch.Tensor(n)` for any n. Tuples of tuples that are fetched from
    the memo take a few bytes per doubling, and a dict hashes them whole.
    """
    fetchable, top = set(), ""
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name in {"GLOBAL", "STACK_GLOBAL", "INST"} and value not in _TORCH_GLOBALS:
            name = _printable(str(value or opcode.name).replace(" ", "."))
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


def _checked_members(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
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
    _check_total(path, size, sum(info.file_size for info in infos))
    return members


def _check_names(path: Path, names: Any) -> None:
    names = list(names)
    if len(names) > MAX_ARRAYS:
        raise UserError(f"{path} holds {len(names)} arrays: at most {MAX_ARRAYS} make a model")
    if bad := [str(name) for name in names if not _is_name(name)]:
        raise UserError(
            f"{path} has arrays named {_shortlist(bad)}: a name is printable, of at most "
            f"{_MAX_NAME} characters, its parts joined by single slashes"
        )
    arrays = set(names)
    folders = (name[:i] for name in names for i, character in enumerate(name) if character == "/")
    if both := sorted({folder for folder in folders if folder in arrays}):
        raise UserError(
            f"{path} has both an array and a folder named {_shortlist(both)}: rename one of them"
        )


def _is_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and len(name) <= _MAX_NAME
        and name.isprintable()
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _check_declared(path: Path, size: int, types: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, (dtype, _) in types.items():
        if dtype not in _WIDTHS:
            raise UserError(
                f"{path} has {name} of type {_printable(dtype[:100])}: "
                "parameters are float16, bfloat16, float32 or float64"
            )
    _check_total(
        path, size, sum(_WIDTHS[dtype] * math.prod(shape) for dtype, shape in types.values())
    )


def _check_total(path: Path, size: int, declared: int) -> None:
    allowed = min(_ALLOWANCE + _EXPANSION * size, MAX_BYTES)
    if declared > allowed:
        raise UserError(
            f"{path} of {size} bytes declares {declared} bytes of arrays, and at most {allowed} "
            "are read from it: save it again uncompressed, or use a smaller model"
        )


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an infinity is refused afterwards, by name
        return np.asarray(array, np.float32, order="C")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("it has one key twice")
    return unique


def _is_file_name(value: Any) -> bool:
    return _is_name(value) and not {"/", "\\"} & set(value)


def _writable(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    _check_names(Path(path), arrays)
    return {name: _float32(np.asarray(x)) for name, x in arrays.items()}


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def _shortlist(names: list[str]) -> str:
    return shortlist([_printable(name[:100]) or "''" for name in names])
