"""Patterns of nodes that converters make of a layer, and their replacements.

Every rule holds for graphs whose shapes are all known; a rule that is not sure does not match.
"""

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import OrValue, RewriteRuleClassBase, RewriteRuleSet
from onnxscript.rewriter.rules.common import (
    expand_before_binary_op_rules,
    reshape_reshape_rule,
    transpose_transpose_rule,
)

from vit_jax.export.graph import array_of, known, producer_of, shape_of


def _scalar(value: ir.Value | None) -> float | None:
    array = array_of(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _reduced_axes(x: ir.Value, y: ir.Value) -> list[int] | None:
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


def _permutation(value: ir.Value) -> list[int]:
    return list(producer_of(value).attributes["perm"].as_ints())


def _keeps_axes(value: ir.Value) -> bool:
    """Tells whether the reduction that makes a value leaves its axes with size 1."""
    return bool(_attribute(producer_of(value), "keepdims", 1))


def _reduces_last(x: ir.Value, *reduced: ir.Value) -> bool:
    return all(_reduced_axes(x, y) == [-1] and _keeps_axes(y) for y in reduced)


def _size(value: ir.Value) -> int:
    return math.prod(known(shape_of(value)))


class _Rule(RewriteRuleClassBase):
    """A rule whose `matches` says of the values that the pattern names whether they are meant."""

    def matches(self, *_: Any, **_values: Any) -> bool:
        return True

    def check(self, *_context: Any, **values: Any) -> Any:
        return self.matches(**values)


class _RootRule(_Rule):
    """A rule that holds for a pattern with either of several operators at its end."""

    def __init__(self, op_type: str):
        super().__init__()
        self.op_type = op_type


class _Dropout(_Rule):
    def pattern(self, op, x):
        return op.Dropout(x, _allow_other_inputs=True, _outputs=["y", "mask"])

    def matches(self, mask, **_):
        return not mask.uses()

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _SameShape(_RootRule):
    """A Reshape or an Expand to the shape that its input has."""

    def pattern(self, op, x, shape):
        return getattr(op, self.op_type)(x, shape, _outputs=["y"])

    def matches(self, x, y, **_):
        return shape_of(x) is not None and shape_of(x) == shape_of(y)

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _SliceOfAll(_Rule):
    def pattern(self, op, x):
        return op.Slice(x, _allow_other_inputs=True, _outputs=["y"])

    def matches(self, x, y, **_):
        return shape_of(x) is not None and shape_of(x) == shape_of(y)

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _TransposeOfOnes(_Rule):
    """A Transpose that only moves axes of size 1."""

    def pattern(self, op, x):
        return op.Transpose(x, _outputs=["y"])

    def matches(self, x, y, **_):
        shape = shape_of(x)
        if shape is None:
            return False
        moved = [axis for axis in _permutation(y) if shape[axis] != 1]
        return moved == sorted(moved)

    def rewrite(self, op, x, y, **_):
        return op.Reshape(x, op.Constant(value_ints=shape_of(y)))


class _MaxOfNothing(_Rule):
    """max(-inf, x), which guards a maximum over no elements."""

    def pattern(self, op, x, infinity):
        return op.Max(x, infinity)

    def matches(self, infinity, **_):
        return _scalar(infinity) == -math.inf

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _Relu(_Rule):
    def pattern(self, op, x):
        return op.Max(x, 0.0)

    def rewrite(self, op, x):
        return op.Relu(x)


class _OneOver(_Rule):
    def pattern(self, op, x):
        return op.Div(1.0, x)

    def rewrite(self, op, x):
        return op.Reciprocal(x)


class _MeanBySum(_RootRule):
    """A sum of x or of its squares, times 1 / n or divided by n."""

    def pattern(self, op, x, factor):
        total = OrValue(
            [
                op.ReduceSum(x, _allow_other_inputs=True),
                op.ReduceSumSquare(x, _allow_other_inputs=True),
            ],
            name="total",
        )
        return getattr(op, self.op_type)(total, factor)

    def matches(self, x, factor, total, **_):
        number = _scalar(factor)
        if number is None or shape_of(x) is None or shape_of(total) is None:
            return False
        number = number if self.op_type == "Mul" else 1.0 / number
        count = _size(x) / _size(total)
        return _reduced_axes(x, total) is not None and math.isclose(number * count, 1, rel_tol=1e-6)

    def rewrite(self, op, x, total, **_):
        node = total.producer()
        square = op.Mul(x, x) if node.op_type == "ReduceSumSquare" else x
        keepdims = _attribute(node, "keepdims", 1)
        return op.ReduceMean(square, axes=_reduced_axes(x, total), keepdims=keepdims)


class _KeepReducedAxes(_Rule):
    """A reduction whose axes come back in a Reshape."""

    def pattern(self, op, x, shape):
        reduced = OrValue(
            [
                op.ReduceMean(x, _allow_other_inputs=True),
                op.ReduceSum(x, _allow_other_inputs=True),
                op.ReduceMax(x, _allow_other_inputs=True),
                op.ReduceSumSquare(x, _allow_other_inputs=True),
            ],
            name="reduced",
        )
        return op.Reshape(reduced, shape, _outputs=["y"])

    def matches(self, x, reduced, y, **_):
        shape = shape_of(x)
        axes = None if shape is None else _reduced_axes(x, reduced)
        if shape is None or axes is None:
            return False
        kept = list(shape)
        for axis in axes:
            kept[axis] = 1
        return not _keeps_axes(reduced) and shape_of(y) == tuple(kept)

    def rewrite(self, op, x, reduced, **_):
        node, axes = reduced.producer(), _reduced_axes(x, reduced)
        if node.op_type == "ReduceSum":  # Since opset 13 its axes are an input.
            return op.ReduceSum(x, op.Constant(value_ints=axes), keepdims=1)
        return getattr(op, node.op_type)(x, axes=axes, keepdims=1)


class _EinsumMatMul(_Rule):
    """x [..., k] times a matrix [k, n]."""

    def pattern(self, op, x, y):
        return op.Einsum(x, y, _outputs=["product"])

    def matches(self, product, **_):
        terms, result = product.producer().attributes["equation"].as_string().split("->")
        left, right = terms.split(",")
        return len(right) == 2 and left[-1] == right[0] and result == left[:-1] + right[1]

    def rewrite(self, op, x, y, **_):
        return op.MatMul(x, y)


class _GemmOfRows(_Rule):
    """Reshape to rows, Gemm, Reshape back."""

    def pattern(self, op, x, rows, kernel, bias, shape):
        flat = op.Reshape(x, rows)
        return op.Reshape(op.Gemm(flat, kernel, bias, _outputs=["product"]), shape, _outputs=["y"])

    def matches(self, x, kernel, product, y, **_):
        node = product.producer()
        plain = not any(_attribute(node, name, 0) for name in ("transA", "transB"))
        plain &= all(
            name not in node.attributes or node.attributes[name].as_float() == 1.0
            for name in ("alpha", "beta")
        )
        x, kernel = known(shape_of(x)), known(shape_of(kernel))
        return plain and shape_of(y) == (*x[:-1], kernel[1])

    def rewrite(self, op, x, kernel, bias, **_):
        return op.Add(op.MatMul(x, kernel), bias)


class _TwoConstants(_Rule):
    """(x + a) + b: the class token and the position embeddings."""

    def pattern(self, op, x, a, b):
        return op.Add(op.Add(x, a), b)

    def matches(self, x, a, b, **_):
        return array_of(x) is None and array_of(a) is not None and array_of(b) is not None

    def rewrite(self, op, x, a, b):
        return op.Add(x, op.Add(a, b))


class _OneIndex(_RootRule):
    """A rule for one index of axis 1 by Slice: the class token."""

    def pattern(self, op, x, starts, ends, axes, shape):
        part = op.Slice(x, starts, ends, axes, _allow_other_inputs=True, _outputs=["part"])
        return getattr(op, self.op_type)(part, shape, _outputs=["y"])

    def matches(self, x, part, y, **_):
        shape = shape_of(x)
        if shape is None:
            return False
        batch, _, *rest = shape
        return shape_of(part) == (batch, 1, *rest) and shape_of(y) == (batch, *rest)

    def rewrite(self, op, x, starts, axes, **_):
        index = known(array_of(starts))[known(array_of(axes)).tolist().index(1)]
        return op.Gather(x, op.Constant(value_int=int(index)), axis=1)


class _LayerNorm(_Rule):
    """scale * (x - mean) / sqrt(variance + epsilon) + bias over the last axis."""

    def pattern(self, op, x, scale, bias, epsilon):
        centered = op.Sub(x, op.ReduceMean(x, _outputs=["mean"]))
        variance = op.ReduceMean(op.Mul(centered, centered), _outputs=["variance"])
        inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
        scaled = OrValue(
            [
                op.Mul(centered, op.Mul(inverse, scale)),
                op.Mul(op.Mul(centered, inverse), scale),
            ]
        )
        return op.Add(scaled, bias)

    def matches(self, x, scale, bias, epsilon, mean, variance, **_):
        width = known(shape_of(x))[-1]
        return (
            _scalar(epsilon) is not None
            and _reduces_last(x, mean, variance)
            and all(_size(weight) == width for weight in (scale, bias))
        )

    def rewrite(self, op, x, scale, bias, epsilon, **_):
        flat = op.Constant(value_ints=[-1])
        return op.LayerNormalization(
            x, op.Reshape(scale, flat), op.Reshape(bias, flat), axis=-1, epsilon=_scalar(epsilon)
        )


class _GroupNorm(_Rule):
    """GroupNorm of an image [batch, height, width, channels], as `models.resnet` writes it.

    Opset 17 has no GroupNormalization; InstanceNormalization of [batch, groups, all else] it has.
    """

    def pattern(self, op, x, grouping, ungrouping, scale, bias, epsilon):
        grouped = op.Reshape(x, grouping, _outputs=["grouped"])
        centered = op.Sub(grouped, op.ReduceMean(grouped, _outputs=["mean"]))
        variance = op.ReduceMean(op.Mul(centered, centered), _outputs=["variance"])
        inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
        y = op.Reshape(op.Mul(centered, inverse), ungrouping, _outputs=["y"])
        return op.Add(op.Mul(y, scale), bias)

    def matches(self, x, grouped, y, scale, bias, epsilon, mean, variance, **_):
        shape, groups = shape_of(x), known(shape_of(grouped))
        if shape is None or len(shape) != 4 or shape != shape_of(y):
            return False
        batch, height, width, channels = shape
        return (
            _scalar(epsilon) is not None
            and len(groups) == 4
            and groups[:2] == (batch, height * width)
            and all(_reduced_axes(grouped, each) == [-3, -1] for each in (mean, variance))
            and _keeps_axes(mean)
            and _keeps_axes(variance)
            and all(_size(weight) == channels for weight in (scale, bias))
        )

    def rewrite(self, op, x, grouped, scale, bias, epsilon, **_):
        batch, height, width, channels = known(shape_of(x))
        groups = known(shape_of(grouped))[2]
        y = op.Transpose(x, perm=[0, 3, 1, 2])
        y = op.Reshape(y, op.Constant(value_ints=[batch, groups, -1]))
        y = op.InstanceNormalization(
            y,
            op.Constant(value_floats=[1.0] * groups),
            op.Constant(value_floats=[0.0] * groups),
            epsilon=_scalar(epsilon),
        )
        y = op.Reshape(y, op.Constant(value_ints=[batch, channels, height, width]))
        column = op.Constant(value_ints=[channels, 1, 1])
        y = op.Add(op.Mul(y, op.Reshape(scale, column)), op.Reshape(bias, column))
        return op.Transpose(y, perm=[0, 2, 3, 1])


class _ZerosAroundMaxPool(_Rule):
    """A maximum over zeros at the border, as BiT has it.

    onnxruntime (1.31) fuses the Pad into MaxPool, which pads with minus infinity, if it pads with
    exactly 0. The smallest number of fp16 is as good.
    """

    def pattern(self, op, x, pads, value):
        padded = op.Pad(x, pads, value, _outputs=["padded"])
        return op.MaxPool(padded, _outputs=["y"])

    def matches(self, value, **_):
        return _scalar(value) == 0

    def rewrite(self, op, x, pads, padded, y, **_):
        tiny = op.Constant(value_float=2.0**-24)
        padded = op.Pad(x, pads, tiny, **padded.producer().attributes)
        return op.MaxPool(padded, **y.producer().attributes)


class _ReluAfterTranspose(_Rule):
    def pattern(self, op, x):
        return op.Relu(op.Transpose(x, _outputs=["transposed"]))

    def rewrite(self, op, x, transposed):
        return op.Transpose(op.Relu(x), perm=_permutation(transposed))


class _SumOfTransposes(_Rule):
    def __init__(self):
        super().__init__(remove_nodes=False)  # A shortcut's transpose has other uses.

    def pattern(self, op, x, y):
        return op.Add(op.Transpose(x, _outputs=["first"]), op.Transpose(y, _outputs=["second"]))

    def matches(self, first, second, **_):
        return _permutation(first) == _permutation(second)

    def rewrite(self, op, x, y, first, **_):
        return op.Transpose(op.Add(x, y), perm=_permutation(first))


class _TransposeAndBack(_Rule):
    def __init__(self):
        super().__init__(remove_nodes=False)

    def pattern(self, op, x):
        return op.Transpose(op.Transpose(x, _outputs=["there"]), _outputs=["back"])

    def matches(self, there, back, **_):
        there, back = _permutation(there), _permutation(back)
        return [there[axis] for axis in back] == list(range(len(back)))

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _Softmax(_Rule):
    """exp(x - max) / sum over the last axis."""

    def pattern(self, op, x):
        maximum = op.ReduceMax(x, _allow_other_inputs=True, _outputs=["maximum"])
        exponential = op.Exp(op.Sub(x, maximum))
        total = op.ReduceSum(exponential, _allow_other_inputs=True, _outputs=["total"])
        return op.Div(exponential, total)

    def matches(self, x, maximum, total, **_):
        return _reduces_last(x, maximum, total)

    def rewrite(self, op, x, **_):
        return op.Softmax(x, axis=-1)


class _GeluErf(_Rule):
    """GELU in the form that TensorRT and onnxruntime fuse: 0.5 * (x * (1 + erf(x / sqrt(2))))."""

    def pattern(self, op, x):
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0))

    def rewrite(self, op, x):
        inner = op.Erf(op.Div(x, op.Constant(value_float=math.sqrt(2))))
        inner = op.Mul(x, op.Add(inner, op.Constant(value_float=1.0)))
        return op.Mul(inner, op.Constant(value_float=0.5))


class _GeluTanh(_Rule):
    """GELU by tanh: 0.5 * (x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))))."""

    def pattern(self, op, x):
        cubic = OrValue(
            [
                op.Mul(x, op.Mul(x, op.Mul(x, 0.044715))),
                op.Mul(op.Mul(x, op.Mul(x, x)), 0.044715),
                op.Mul(op.Pow(x, 3.0), 0.044715),
            ]
        )
        inner = op.Mul(op.Add(x, cubic), math.sqrt(2 / math.pi))
        return op.Mul(x, op.Mul(op.Add(op.Tanh(inner), 1.0), 0.5))

    def rewrite(self, op, x):
        inner = op.Mul(op.Pow(x, op.Constant(value_float=3.0)), op.Constant(value_float=0.044715))
        inner = op.Mul(op.Add(x, inner), op.Constant(value_float=math.sqrt(2 / math.pi)))
        # Twice x, before it is halved: in fp16 an engine that does not fuse GELU overflows here at
        # hidden units of 32,752, half the largest number.
        inner = op.Mul(x, op.Add(op.Tanh(inner), op.Constant(value_float=1.0)))
        return op.Mul(inner, op.Constant(value_float=0.5))


# Applied until none matches; then, on what is left, the fusions.
SIMPLIFICATIONS = RewriteRuleSet(
    [
        _Dropout.rule(),
        _SameShape.rule("Reshape"),
        _SameShape.rule("Expand"),
        _SliceOfAll.rule(),
        _TransposeOfOnes.rule(),
        _MaxOfNothing.rule(),
        _Relu.rule(),
        _OneOver.rule(),
        _MeanBySum.rule("Mul"),
        _MeanBySum.rule("Div"),
        _KeepReducedAxes.rule(),
        _EinsumMatMul.rule(),
        _GemmOfRows.rule(),
        _TwoConstants.rule(),
        _OneIndex.rule("Reshape"),
        _OneIndex.rule("Squeeze"),
        *expand_before_binary_op_rules,
        reshape_reshape_rule,
        transpose_transpose_rule,
    ]
)
FUSIONS = RewriteRuleSet(
    [
        _LayerNorm.rule(),
        _GroupNorm.rule(),
        _Softmax.rule(),
        _GeluErf.rule(),
        _GeluTanh.rule(),
        _ZerosAroundMaxPool.rule(),
        _ReluAfterTranspose.rule(),
        _SumOfTransposes.rule(),
        _TransposeAndBack.rule(),
    ]
)
