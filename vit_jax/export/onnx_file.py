"""The contents of an ONNX file, read without `onnx`: its weights are skipped, not loaded."""

import contextlib
import dataclasses
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.export.precisions import PRECISIONS, Precision, detect
from vit_jax.files import storage_errors

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
        softmaxes: the number of its Softmax nodes: one for each layer of attention.
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


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Reads types, metadata and checksums of an ONNX file.

    Args:
        path: of the file; its external data is looked for beside it.

    Raises:
        UserError: the file or its external data is missing, or it is not ONNX.
    """
    path = Path(path)
    graph = _read(path)
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


def _external_errors(path: Path, name: str) -> contextlib.AbstractContextManager[None]:
    return storage_errors(
        lambda reason: (
            f"{path.parent / name}, which holds weights of {path.name}, cannot be read "
            f"({reason}): keep the two side by side"
        )
    )


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
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                return _scan(data)
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"{path} is not an ONNX file ({error}): export the model again"
            ) from error


def _scan(data: Any) -> _Graph:
    """Goes over a ModelProto; the numbers are those of the fields in onnx.proto."""
    found = _Graph()
    graphs = 0
    for field, span in _fields(data, 0, len(data)):
        if field == 14:  # ModelProto.metadata_props
            key, value = _entry(data, span)
            found.metadata[key] = value
        elif field == 7:  # ModelProto.graph
            graphs += 1
            for kind, inner in _fields(data, *span):
                if kind == 1:  # GraphProto.node
                    operator = _get(data, inner, 4)  # NodeProto.op_type
                    name = data[slice(*operator)].decode()
                    found.operators[name] = found.operators.get(name, 0) + 1
                elif kind == 5:  # GraphProto.initializer
                    _scan_tensor(data, inner, found.weights, found.external)
                elif kind in (11, 12):  # GraphProto.input, GraphProto.output
                    (found.inputs if kind == 11 else found.outputs).append(_value(data, inner))
    if not graphs:
        raise ValueError("it has no graph")
    return found


def _value(data: Any, span: tuple[int, int]) -> Tensor:
    """A ValueInfoProto of a tensor."""
    name = data[slice(*_get(data, span, 1))].decode()
    tensor = _get(data, _get(data, span, 2), 1)  # ValueInfoProto.type, TypeProto.tensor_type
    data_type = _get(data, tensor, 1)
    shape = []
    for field, dim in _fields(data, *_get(data, tensor, 2)):
        if field == 1:  # TensorShapeProto.dim
            # Dimension.dim_value; a named dimension has none.
            shape.append(next((value for kind, value in _fields(data, *dim) if kind == 1), -1))
    return Tensor(name, _TYPES.get(data_type, str(data_type)), tuple(shape))


def _get(data: Any, span: tuple[int, int], wanted: int) -> Any:
    """The value of a field that may stand once in a message."""
    for field, value in _fields(data, *span):
        if field == wanted:
            return value
    raise ValueError(f"field {wanted} is missing at byte {span[0]}")


def _scan_tensor(
    data: Any, span: tuple[int, int], weights: dict[str, int], external: set[str]
) -> None:
    size, data_type = 1, 0
    for field, value in _fields(data, *span):
        if field == 1:  # TensorProto.dims, packed or one by one
            packed = value if isinstance(value, tuple) else None
            for dim in _varints(data, *packed) if packed else [value]:
                size *= dim
        elif field == 2:  # TensorProto.data_type
            data_type = value
        elif field == 13:  # TensorProto.external_data
            key, text = _entry(data, value)
            if key == "location":
                external.add(text)
    for row in PRECISIONS.values():
        if row.onnx_type == data_type:
            weights[row.name] = weights.get(row.name, 0) + size


def _entry(data: Any, span: tuple[int, int]) -> tuple[str, str]:
    """A StringStringEntryProto."""
    texts = {field: data[slice(*text)].decode() for field, text in _fields(data, *span)}
    return texts.get(1, ""), texts.get(2, "")


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: a number, or the span of what has a length."""
    while start < end:
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


def _varints(data: Any, start: int, end: int) -> Iterator[int]:
    while start < end:
        value, start = _varint(data, start)
        yield value


def _varint(data: Any, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[start]
        start += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, start


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
