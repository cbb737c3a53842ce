"""Rules that make layers whole which converters take apart, for a graph that is simplified."""

import math

from onnxscript.rewriter.pattern import OrValue, RewriteRuleSet

from vit_jax.export.graph import known, shape_of
from vit_jax.export.patterns import (
    Rule,
    keeps_axes,
    permutation,
    reduced_axes,
    reduces_last,
    scalar,
    size,
)


class _LayerNorm(Rule):
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
            scalar(epsilon) is not None
            and reduces_last(x, mean, variance)
            and all(size(weight) == width for weight in (scale, bias))
        )

    def rewrite(self, op, x, scale, bias, epsilon, **_):
        flat = op.Constant(value_ints=[-1])
        return op.LayerNormalization(
            x, op.Reshape(scale, flat), op.Reshape(bias, flat), axis=-1, epsilon=scalar(epsilon)
        )


class _GroupNorm(Rule):
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
            scalar(epsilon) is not None
            and len(groups) == 4
            and groups[:2] == (batch, height * width)
            and all(reduced_axes(grouped, each) == [-3, -1] for each in (mean, variance))
            and keeps_axes(mean)
            and keeps_axes(variance)
            and all(size(weight) == channels for weight in (scale, bias))
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
            epsilon=scalar(epsilon),
        )
        y = op.Reshape(y, op.Constant(value_ints=[batch, channels, height, width]))
        column = op.Constant(value_ints=[channels, 1, 1])
        y = op.Add(op.Mul(y, op.Reshape(scale, column)), op.Reshape(bias, column))
        return op.Transpose(y, perm=[0, 2, 3, 1])


class _Softmax(Rule):
    """exp(x - max) / sum over the last axis."""

    def pattern(self, op, x):
        maximum = op.ReduceMax(x, _allow_other_inputs=True, _outputs=["maximum"])
        exponential = op.Exp(op.Sub(x, maximum))
        total = op.ReduceSum(exponential, _allow_other_inputs=True, _outputs=["total"])
        return op.Div(exponential, total)

    def matches(self, x, maximum, total, **_):
        return reduces_last(x, maximum, total)

    def rewrite(self, op, x, **_):
        return op.Softmax(x, axis=-1)


class _GeluErf(Rule):
    """GELU in the form that TensorRT and onnxruntime fuse: 0.5 * (x * (1 + erf(x / sqrt(2))))."""

    def pattern(self, op, x):
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0))

    def rewrite(self, op, x):
        inner = op.Erf(op.Div(x, op.Constant(value_float=math.sqrt(2))))
        inner = op.Mul(x, op.Add(inner, op.Constant(value_float=1.0)))
        return op.Mul(inner, op.Constant(value_float=0.5))


class _GeluTanh(Rule):
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


class _ZerosAroundMaxPool(Rule):
    """A maximum over zeros at the border, as BiT has it.

    onnxruntime (1.31) fuses the Pad into MaxPool, which pads with minus infinity, if it pads with
    exactly 0. The smallest number of fp16 is as good.
    """

    def pattern(self, op, x, pads, value):
        padded = op.Pad(x, pads, value, _outputs=["padded"])
        return op.MaxPool(padded, _outputs=["y"])

    def matches(self, value, **_):
        return scalar(value) == 0

    def rewrite(self, op, x, pads, padded, y, **_):
        tiny = op.Constant(value_float=2.0**-24)
        padded = op.Pad(x, pads, tiny, **padded.producer().attributes)
        return op.MaxPool(padded, **y.producer().attributes)


class _ReluAfterTranspose(Rule):
    def pattern(self, op, x):
        return op.Relu(op.Transpose(x, _outputs=["transposed"]))

    def rewrite(self, op, x, transposed):
        return op.Transpose(op.Relu(x), perm=permutation(transposed))


class _SumOfTransposes(Rule):
    def __init__(self):
        super().__init__(remove_nodes=False)  # A shortcut's transpose has other uses.

    def pattern(self, op, x, y):
        return op.Add(op.Transpose(x, _outputs=["first"]), op.Transpose(y, _outputs=["second"]))

    def matches(self, first, second, **_):
        return permutation(first) == permutation(second)

    def rewrite(self, op, x, y, first, **_):
        return op.Transpose(op.Add(x, y), perm=permutation(first))


class _TransposeAndBack(Rule):
    def __init__(self):
        super().__init__(remove_nodes=False)

    def pattern(self, op, x):
        return op.Transpose(op.Transpose(x, _outputs=["there"]), _outputs=["back"])

    def matches(self, there, back, **_):
        there, back = permutation(there), permutation(back)
        return [there[axis] for axis in back] == list(range(len(back)))

    def rewrite(self, op, x, **_):
        return op.Identity(x)


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
