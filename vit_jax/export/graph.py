"""Accessors to an ONNX graph, for code that knows its contents, and a writer of nodes for one."""

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

T = TypeVar("T")


def known(x: T | None) -> T:
    """Returns a value that `onnx_ir` allows to be None and these graphs always have.

    Raises:
        ValueError: it is None.
    """
    if x is None:
        raise ValueError("the graph lacks a name, a shape, a value or a node")
    return x


def producer_of(value: ir.Value | None) -> ir.Node:
    """The node that makes a value which is neither an input nor a weight."""
    return known(known(value).producer())


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """Returns the array of a constant or a weight; None for anything else."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value, where every size is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()


class Writer:
    """Writes nodes that are put in front of a graph.

    Attributes:
        nodes: those that were written, in their order.
        weights: their constants.
    """

    def __init__(self, scope: str):
        """Takes the name that those of nodes and constants begin with."""
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self._scope = scope
        self._names: set[str] = set()

    def op(self, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Writes a node; returns its output."""
        recorder = tape.Tape()
        value = recorder.op(kind, inputs, attributes)
        (node,) = recorder.nodes
        node.name = self._unique(f"{self._scope}/{kind}")
        value.name = f"{node.name}:0"
        self.nodes.append(node)
        return value

    def ints(self, *values: list[int]) -> list[ir.Value]:
        """Constants of int64, [length] each."""
        return [self.constant("sizes", np.array(x, np.int64)) for x in values]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant; a name that has no scope gets that of the nodes."""
        name = self._unique(name if "/" in name else f"{self._scope}/{name}")
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )
        self.weights.append(value)
        return value

    def put_in_front(self, graph: ir.Graph) -> None:
        """Moves all that was written to the beginning of a graph, in place."""
        for node in reversed(self.nodes):
            graph.insert_before(graph[0], node)
        for value in self.weights:
            graph.register_initializer(value)
        self.nodes.clear()
        self.weights.clear()

    def _unique(self, name: str) -> str:
        found = next(
            x for n in itertools.count() if (x := f"{name}_{n}" if n else name) not in self._names
        )
        self._names.add(found)
        return found
