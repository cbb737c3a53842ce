"""The contents of an ONNX file, read without `onnx`: its weights are skipped, not loaded.

A file may be a stranger's: whatever it holds, reading it gives its description or one `UserError`.
It takes memory of a few times what it says beside its weights, at most `_MAX_FIELDS` fields, some
microseconds each; and its bytes, and those of its external data, go through SHA-256 once. External
data lies in the folder of the file.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, first_line
from vit_jax.export.precisions import PRECISIONS, Precision, detect
from vit_jax.files import storage_errors

# Of all messages in a file: a node has some five that are looked at, and the values of a weight are
# one.
_MAX_FIELDS = 1_000_000
_MAX_DIMS = 64

# What the metadata call the input of a graph that prepares images itself, under "pixels".
RAW = "raw"

# TensorProto.DataType.
_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 10: "HALF", 16: "BF16"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or an output: its type in TensorRT's words ("FLOAT", "HALF"); -1 is a free size."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """The description of an ONNX file that the builder needs, read without `onnx`.

    Attributes:
        path: of the file.
        sha256: of every file that it consists of, by name: itself, and its external data.
        precision: a key of `PRECISIONS`, see `precisions.detect`.
        weight_types: the precisions whose type some of its weights have.
        softmaxes: the number of its Softmax nodes: one for each layer of attention, and
            those of attention pooling and of probabilities.
        inputs: of the graph.
        outputs: likewise.
        metadata: its metadata_props.
    """

    path: Path
    sha256: dict[str, str]
    precision: str
    weight_types: frozenset[str]
    softmaxes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    metadata: dict[str, str]

    @property
    def precisions(self) -> list[Precision]:
        """The rows of its own precision and of those of its weights, in the table's order."""
        names = {self.precision, *self.weight_types}
        return [row for name, row in PRECISIONS.items() if name in names]

    @property
    def is_raw(self) -> bool:
        """Tells whether the graph prepares images itself."""
        return self.metadata.get("pixels") == RAW

    def is_stale(self, description: Mapping[str, Any]) -> bool:
        """Tells whether an engine was built from another file than this.

        Args:
            description: the contents of its engine.json; of one without checksums nothing is told.
        """
        built_from = description.get("onnx")
        sums = built_from.get("sha256") if isinstance(built_from, dict) else None
        # By the bytes alone: a file may have been renamed.
        return isinstance(sums, dict) and set(map(str, sums.values())) != set(self.sha256.values())


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Reads types, metadata and checksums of an ONNX file.

    Args:
        path: of the file; its external data is looked for beside it.

    Raises:
        UserError: the file or its external data is missing, or lies elsewhere, or it is not ONNX.
    """
    path = Path(path)
    graph = _read(path)
    if bad := sorted(name for name in graph.external if not _is_inside(path.parent, name)):
        raise UserError(
            f"{path} has weights in {ascii(bad[0][:200])}: they must lie in its own folder, so "
            "export the model again"
        )
    sha256 = {path.name: _sha256(path)}
    for name in sorted(graph.external):
        with _external_errors(path, name):
            sha256[name] = _sha256(path.parent / name)
    return OnnxFile(
        path=path,
        sha256=sha256,
        precision=detect(graph.metadata.get("precision"), graph.weights, graph.operators),
        weight_types=frozenset(graph.weights),
        softmaxes=graph.operators.get("Softmax", 0),
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        metadata=graph.metadata,
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata_props of an ONNX file.

    Raises:
        UserError: the file is missing, or it is not ONNX.
    """
    return _read(Path(path)).metadata


def read_class_names(
    metadata: Mapping[str, str], entry: str = "class_names"
) -> tuple[str, ...] | None:
    """The class names in the metadata of a model, in the order of its outputs; None without them.

    Args:
        metadata: of the model.
        entry: "class_names", or "pixel_classes" of a model that gives logits of pixels.

    Raises:
        ValueError: the entry is no list of texts.
    """
    names = json.loads(metadata.get(entry, "null"))
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{entry} is no list of texts")
    return tuple(names)


def _is_inside(folder: Path, name: str) -> bool:
    """Tells whether a name is one of a file in a folder, or of none there; a device would not end.

    It may be a link, as in the cache of Hugging Face.
    """
    parts = name.removeprefix("./").split("/")
    if not name.isprintable() or {"", ".", ".."} & set(parts) or "\\" in name:
        return False
    path = folder / name
    return not path.exists() or path.is_file()


def _external_errors(path: Path, name: str) -> contextlib.AbstractContextManager[None]:
    return storage_errors(
        lambda reason: (
            f"{path.parent / name}, which holds weights of {path.name}, cannot be read "
            f"({reason}): keep the two side by side"
        )
    )


@dataclasses.dataclass
class _Data:
    """The bytes of a file, and how many more fields of them are read."""

    content: Any
    left: int = _MAX_FIELDS


@dataclasses.dataclass
class _Graph:
    """The contents of a file: elements of the weights by type, nodes by operator, and so on."""

    weights: dict[str, int] = dataclasses.field(default_factory=dict)
    operators: dict[str, int] = dataclasses.field(default_factory=dict)
    external: set[str] = dataclasses.field(default_factory=set)
    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def _read(path: Path) -> _Graph:
    with storage_errors(lambda reason: f"{path} cannot be read ({reason}): name an ONNX file"):
        if path.exists() and not path.is_file():  # To open a FIFO would wait for ever.
            raise UserError(f"{path} is a directory or a device: name an ONNX file")
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                return _scan(data)
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"{path} is not an ONNX file ({first_line(error)}): export the model again"
            ) from error


def _scan(data: Any) -> _Graph:
    """Goes over a ModelProto; the numbers are those of the fields in onnx.proto."""
    data = _Data(data)
    found = _Graph()
    graphs = 0
    for field, span in _fields(data, 0, len(data.content)):
        if field == 14:  # ModelProto.metadata_props
            key, value = _entry(data, span)
            found.metadata[key] = value
        elif field == 7:  # ModelProto.graph
            graphs += 1
            for kind, inner in _fields(data, *span):
                if kind == 1:  # GraphProto.node
                    name = _text(data, _get(data, inner, 4))  # NodeProto.op_type
                    found.operators[name] = found.operators.get(name, 0) + 1
                elif kind == 5:  # GraphProto.initializer
                    _scan_tensor(data, inner, found.weights, found.external)
                elif kind in (11, 12):  # GraphProto.input, GraphProto.output
                    (found.inputs if kind == 11 else found.outputs).append(_value(data, inner))
    if not graphs:
        raise ValueError("it has no graph")
    return found


def _value(data: _Data, span: tuple[int, int]) -> Tensor:
    """A ValueInfoProto of a tensor."""
    name = _text(data, _get(data, span, 1))
    tensor = _get(data, _get(data, span, 2), 1)  # ValueInfoProto.type, TypeProto.tensor_type
    data_type = _get(data, tensor, 1)
    shape = []
    for field, dim in _fields(data, *_get(data, tensor, 2)):
        if field == 1:  # TensorShapeProto.dim
            # Dimension.dim_value; a named dimension has none.
            size = next((value for kind, value in _fields(data, *dim) if kind == 1), -1)
            shape.append(_number(size) if size != -1 else -1)
    if len(shape) > _MAX_DIMS or not isinstance(data_type, int):
        raise ValueError("an input or output has no type and shape")
    return Tensor(name, _TYPES.get(data_type, str(data_type)), tuple(shape))


def _text(data: _Data, span: tuple[int, int]) -> str:
    return data.content[slice(*span)].decode()


def _number(value: Any) -> int:
    """A size, of which the format has 64 bits with a sign."""
    if not isinstance(value, int) or value >= 1 << 63:
        raise ValueError("a size is no number, or below 0")
    return value


def _get(data: _Data, span: tuple[int, int], wanted: int) -> Any:
    """The value of a field that may stand once in a message."""
    for field, value in _fields(data, *span):
        if field == wanted:
            return value
    raise ValueError(f"field {wanted} is missing at byte {span[0]}")


def _scan_tensor(
    data: _Data, span: tuple[int, int], weights: dict[str, int], external: set[str]
) -> None:
    sizes, data_type = [], 0
    for field, value in _fields(data, *span):
        if field == 1:  # TensorProto.dims, packed or one by one
            packed = value if isinstance(value, tuple) else None
            sizes += itertools.islice(_varints(data, *packed), _MAX_DIMS) if packed else [value]
            if len(sizes) >= _MAX_DIMS:  # Their product would have as many digits.
                raise ValueError(f"a weight has {_MAX_DIMS} dimensions or more")
        elif field == 2:  # TensorProto.data_type
            data_type = value
        elif field == 13:  # TensorProto.external_data
            key, text = _entry(data, value)
            if key == "location":
                external.add(text)
    for row in PRECISIONS.values():
        if row.onnx_type == data_type:
            weights[row.name] = weights.get(row.name, 0) + math.prod(map(_number, sizes))


def _entry(data: _Data, span: tuple[int, int]) -> tuple[str, str]:
    """A StringStringEntryProto."""
    texts = {field: _text(data, text) for field, text in _fields(data, *span)}
    return texts.get(1, ""), texts.get(2, "")


def _fields(data: _Data, start: int, end: int) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: a number, or the span of what has a length."""
    while start < end:
        data.left -= 1
        if data.left < 0:
            raise ValueError(f"it has more than {_MAX_FIELDS} fields")
        key, start = _varint(data, start)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, start = _varint(data, start)
        elif wire == 2:
            size, start = _varint(data, start)
            value, start = (start, start + size), start + size
        elif wire in (1, 5):
            value, start = None, start + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"no protocol buffer at byte {start}")
        if start > end:
            raise ValueError("it ends too early")
        yield field, value


def _varints(data: _Data, start: int, end: int) -> Iterator[int]:
    while start < end:
        value, start = _varint(data, start)
        yield value


def _varint(data: _Data, start: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # 10 bytes for 64 bits; a longer one would have no end.
        byte = data.content[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
    raise ValueError(f"no protocol buffer at byte {start}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
