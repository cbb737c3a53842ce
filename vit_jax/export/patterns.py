"""Parts of rules of rewriting: questions about values of a graph, and the rules' base.

Every rule holds for graphs whose shapes are all known; a rule that is not sure does not match.
"""

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleClassBase

from vit_jax.export.graph import array_of, known, producer_of, shape_of


def scalar(value: ir.Value | None) -> float | None:
    """Returns a constant of one value, None for what is none."""
    array = array_of(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def attribute(node: ir.Node, name: str, default: int) -> int:
    """Returns an integer attribute of a node."""
    return node.attributes[name].as_int() if name in node.attributes else default


def reduced_axes(x: ir.Value, y: ir.Value) -> list[int] | None:
    """Axes counted from the end over which the node that makes y reduces x."""
    node = producer_of(y)
    if "axes" in node.attributes:
        axes = node.attributes["axes"].as_ints()
    elif len(node.inputs) > 1 and (array := array_of(node.inputs[1])) is not None:
        axes = array.tolist()
    else:
        return None
    rank = len(known(shape_of(x)))
    return sorted(axis % rank - rank for axis in axes)


def permutation(value: ir.Value) -> list[int]:
    """Returns the axes of the Transpose that makes a value."""
    return list(producer_of(value).attributes["perm"].as_ints())


def keeps_axes(value: ir.Value) -> bool:
    """Tells whether the reduction that makes a value leaves its axes with size 1."""
    return bool(attribute(producer_of(value), "keepdims", 1))


def reduces_last(x: ir.Value, *reduced: ir.Value) -> bool:
    """Tells whether the values are reductions of x over its last axis, which they keep."""
    return all(reduced_axes(x, y) == [-1] and keeps_axes(y) for y in reduced)


def size(value: ir.Value) -> int:
    """Returns the number of elements."""
    return math.prod(known(shape_of(value)))


class Rule(RewriteRuleClassBase):
    """A rule whose `matches` says of the values that the pattern names whether they are meant."""

    def matches(self, *_: Any, **_values: Any) -> bool:
        """Tells whether the values of a match are meant."""
        return True

    def check(self, *_context: Any, **values: Any) -> Any:
        """Calls `matches` with the values alone."""
        return self.matches(**values)


class RootRule(Rule):
    """A rule that holds for a pattern with either of several operators at its end."""

    def __init__(self, op_type: str):
        super().__init__()
        self.op_type = op_type
