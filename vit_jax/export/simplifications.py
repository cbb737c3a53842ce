"""Rules that take away what converters write and a graph of known shapes does not need."""

import math

from onnxscript.rewriter.pattern import OrValue, RewriteRuleSet
from onnxscript.rewriter.rules.common import (
    expand_before_binary_op_rules,
    reshape_reshape_rule,
    transpose_transpose_rule,
)

from vit_jax.export.graph import array_of, known, shape_of
from vit_jax.export.patterns import (
    RootRule,
    Rule,
    attribute,
    keeps_axes,
    permutation,
    reduced_axes,
    scalar,
    size,
)


class _Dropout(Rule):
    def pattern(self, op, x):
        return op.Dropout(x, _allow_other_inputs=True, _outputs=["y", "mask"])

    def matches(self, mask, **_):
        return not mask.uses()

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _SameShape(RootRule):
    """A Reshape or an Expand to the shape that its input has."""

    def pattern(self, op, x, shape):
        return getattr(op, self.op_type)(x, shape, _outputs=["y"])

    def matches(self, x, y, **_):
        return shape_of(x) is not None and shape_of(x) == shape_of(y)

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _SliceOfAll(Rule):
    def pattern(self, op, x):
        return op.Slice(x, _allow_other_inputs=True, _outputs=["y"])

    def matches(self, x, y, **_):
        return shape_of(x) is not None and shape_of(x) == shape_of(y)

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _TransposeOfOnes(Rule):
    """A Transpose that only moves axes of size 1."""

    def pattern(self, op, x):
        return op.Transpose(x, _outputs=["y"])

    def matches(self, x, y, **_):
        shape = shape_of(x)
        if shape is None:
            return False
        moved = [axis for axis in permutation(y) if shape[axis] != 1]
        return moved == sorted(moved)

    def rewrite(self, op, x, y, **_):
        return op.Reshape(x, op.Constant(value_ints=shape_of(y)))


class _MaxOfNothing(Rule):
    """max(-inf, x), which guards a maximum over no elements."""

    def pattern(self, op, x, infinity):
        return op.Max(x, infinity)

    def matches(self, infinity, **_):
        return scalar(infinity) == -math.inf

    def rewrite(self, op, x, **_):
        return op.Identity(x)


class _Relu(Rule):
    def pattern(self, op, x):
        return op.Max(x, 0.0)

    def rewrite(self, op, x):
        return op.Relu(x)


class _OneOver(Rule):
    def pattern(self, op, x):
        return op.Div(1.0, x)

    def rewrite(self, op, x):
        return op.Reciprocal(x)


class _MeanBySum(RootRule):
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
        number = scalar(factor)
        if number is None or shape_of(x) is None or shape_of(total) is None:
            return False
        number = number if self.op_type == "Mul" else 1.0 / number
        count = size(x) / size(total)
        return reduced_axes(x, total) is not None and math.isclose(number * count, 1, rel_tol=1e-6)

    def rewrite(self, op, x, total, **_):
        node = total.producer()
        square = op.Mul(x, x) if node.op_type == "ReduceSumSquare" else x
        keepdims = attribute(node, "keepdims", 1)
        return op.ReduceMean(square, axes=reduced_axes(x, total), keepdims=keepdims)


class _KeepReducedAxes(Rule):
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
        axes = None if shape is None else reduced_axes(x, reduced)
        if shape is None or axes is None:
            return False
        kept = list(shape)
        for axis in axes:
            kept[axis] = 1
        return not keeps_axes(reduced) and shape_of(y) == tuple(kept)

    def rewrite(self, op, x, reduced, **_):
        node, axes = reduced.producer(), reduced_axes(x, reduced)
        if node.op_type == "ReduceSum":  # Since opset 13 its axes are an input.
            return op.ReduceSum(x, op.Constant(value_ints=axes), keepdims=1)
        return getattr(op, node.op_type)(x, axes=axes, keepdims=1)


class _EinsumMatMul(Rule):
    """x [..., k] times a matrix [k, n]."""

    def pattern(self, op, x, y):
        return op.Einsum(x, y, _outputs=["product"])

    def matches(self, product, **_):
        terms, result = product.producer().attributes["equation"].as_string().split("->")
        left, right = terms.split(",")
        return len(right) == 2 and left[-1] == right[0] and result == left[:-1] + right[1]

    def rewrite(self, op, x, y, **_):
        return op.MatMul(x, y)


class _GemmOfRows(Rule):
    """Reshape to rows, Gemm, Reshape back."""

    def pattern(self, op, x, rows, kernel, bias, shape):
        flat = op.Reshape(x, rows)
        return op.Reshape(op.Gemm(flat, kernel, bias, _outputs=["product"]), shape, _outputs=["y"])

    def matches(self, x, kernel, product, y, **_):
        node = product.producer()
        plain = not any(attribute(node, name, 0) for name in ("transA", "transB"))
        plain &= all(
            name not in node.attributes or node.attributes[name].as_float() == 1.0
            for name in ("alpha", "beta")
        )
        x, kernel = known(shape_of(x)), known(shape_of(kernel))
        return plain and shape_of(y) == (*x[:-1], kernel[1])

    def rewrite(self, op, x, kernel, bias, **_):
        return op.Add(op.MatMul(x, kernel), bias)


class _TwoConstants(Rule):
    """(x + a) + b: the class token and the position embeddings."""

    def pattern(self, op, x, a, b):
        return op.Add(op.Add(x, a), b)

    def matches(self, x, a, b, **_):
        return array_of(x) is None and array_of(a) is not None and array_of(b) is not None

    def rewrite(self, op, x, a, b):
        return op.Add(x, op.Add(a, b))


class _OneIndex(RootRule):
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


# Applied until none matches; then, on what is left, `fusions.FUSIONS`.
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
