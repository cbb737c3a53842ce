"""Accessors to the contents of an ONNX graph, for code that knows them to be present."""

from typing import TypeVar

import numpy as np
import onnx_ir as ir

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
