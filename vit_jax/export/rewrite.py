"""Turns the graph that a converter emits into the one that a deployment engine recognizes.

The converters trace the model at a fixed batch size, so every shape is known here; the batch
becomes symbolic at the end. In between, LayerNormalization, Softmax and GELU, which the converters
emit as sums and products, are made whole again by the rules of `fusions`.
"""

import hashlib
import itertools
import math
import sys
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.pattern import RewriteRuleSet

from vit_jax.export.fusions import FUSIONS
from vit_jax.export.graph import array_of, known, shape_of
from vit_jax.export.simplifications import SIMPLIFICATIONS

_SMALLEST_TRACED = 97


def traced_sizes(names: Sequence[str], sizes: Collection[int]) -> dict[str, int]:
    """Sizes to trace a graph at that tell themselves from all others: primes, by their names.

    Args:
        names: of the sizes that become symbolic.
        sizes: the positive ones that stay as they are; no prime divides any of them.
    """
    primes = (
        n
        for n in itertools.count(_SMALLEST_TRACED)
        if all(n % i for i in range(2, math.isqrt(n) + 1)) and all(size % n for size in sizes)
    )
    return dict(zip(names, primes, strict=False))


def rewrite(model: ir.Model, weights: Mapping[str, np.ndarray], traced: Mapping[str, int]) -> None:
    """Rewrites a traced graph in place.

    Args:
        model: opset 17, every shape fixed. Its first input is the images, the others are the
            weights.
        weights: their values by the names of those inputs; they become initializers.
        traced: the sizes that become symbolic, by their names, see `traced_sizes`.

    Raises:
        ValueError: a node is left that ties the graph to a traced size.
    """
    _bind(model.graph, weights)
    for rules in (SIMPLIFICATIONS, FUSIONS):
        while _apply(model, rules):
            pass
    _free_sizes(model, traced)
    _share_weights(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    _name_nodes(model, weights)
    passes.ShapeInferencePass()(model)


def _bind(graph: ir.Graph, weights: Mapping[str, np.ndarray]) -> None:
    for value in list(graph.inputs):
        name = known(value.name)
        if name in weights:
            graph.inputs.remove(value)
            if value.uses():
                value.const_value = ir.Tensor(np.asarray(weights[name]), name=name)
                graph.register_initializer(value)


def _apply(model: ir.Model, rules: RewriteRuleSet) -> bool:
    """Runs one round of folding and rewriting; returns whether a rule matched."""
    optimizer.fold_constants(
        model,
        input_size_limit=sys.maxsize,
        output_size_limit=sys.maxsize,
        # A weight that is broadcast to the batch would be stored once for every image of it.
        should_fold=lambda node: False if node.op_type == "Expand" else None,
    )
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _order_operands(model.graph)
    passes.ShapeInferencePass()(model)
    matched = RewritePass(rules)(model).modified
    passes.IdentityEliminationPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    return matched


def _order_operands(graph: ir.Graph) -> None:
    """Puts the shallower operand first and a constant last, as the patterns do."""
    depth: dict[ir.Value | None, float] = dict.fromkeys(graph.inputs, 0)
    for node in graph:
        inputs = [depth.get(value, math.inf) for value in node.inputs]
        if node.op_type in ("Add", "Mul", "Max") and inputs[0] > inputs[1]:
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
        finite = [value for value in inputs if value < math.inf]
        depth.update(dict.fromkeys(node.outputs, max(finite) + 1 if finite else math.inf))


def _free_sizes(model: ir.Model, traced: Mapping[str, int]) -> None:
    """Replaces the traced sizes by symbolic dimensions."""
    graph, names = model.graph, {size: name for name, size in traced.items()}
    reshapes = [node for node in graph if node.op_type == "Reshape"]
    for i, node in enumerate(reshapes):
        _free_reshape(graph, node, f"free_shape_{i}", set(names))
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape([names.get(size, size) for size in known(shape_of(value))])
    for value in (output for node in graph for output in node.outputs):
        if value not in graph.outputs:
            value.shape = None
    passes.ShapeInferencePass()(model)
    for node in graph:
        for value in node.outputs:
            if not _has_free_size(value.shape, traced):
                raise ValueError(
                    f"{node.op_type} {value.name} of shape {value.shape} has a traced size of "
                    f"{dict(traced)}"
                )


def _has_free_size(shape: ir.Shape | None, traced: Mapping[str, int]) -> bool:
    """Tells whether a shape depends on the batch size and has nothing of the traced ones."""
    fixed = [size for size in shape or () if isinstance(size, int)]
    return (
        shape is not None
        and len(fixed) < len(shape)
        and all(size == 0 or size % each for size in fixed for each in traced.values())
    )


def _free_reshape(graph: ir.Graph, node: ir.Node, name: str, traced: set[int]) -> None:
    target = known(array_of(node.inputs[1])).tolist()
    source = known(shape_of(node.inputs[0]))
    for axis, size in enumerate(target):
        if size in traced and source[axis : axis + 1] == (size,):
            target[axis] = 0  # Copies the dimension of the input.
        elif size > 0 and any(size % each == 0 for each in traced) and -1 not in target:
            target[axis] = -1
    shape = ir.Value(name=name, const_value=ir.tensor(target, dtype=ir.DataType.INT64, name=name))
    graph.register_initializer(shape)
    node.replace_input_with(1, shape)


def _share_weights(graph: ir.Graph) -> None:
    """Keeps one of the weights that are equal, and stores it row by row."""
    first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for value in list(graph.initializers.values()):
        array = known(array_of(value))
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (str(array.dtype), array.shape, hashlib.sha256(array).digest())
        if key in first:
            value.replace_all_uses_with(first[key])
            del graph.initializers[known(value.name)]
        else:
            first[key] = value
            value.const_value = ir.Tensor(array, name=value.name)


def _name_nodes(model: ir.Model, weights: Collection[str]) -> None:
    """Names weights by the parameters in them, nodes and their outputs by their module."""
    graph = model.graph
    taken = {known(value.name) for value in (*graph.inputs, *graph.outputs)}
    scopes: dict[ir.Value, str] = {}
    for value in list(graph.initializers.values()):
        sources = value.meta.get(optimizer.FOLDED_FROM_KEY, {value.name}).intersection(weights)
        name = _common_name(sorted(sources)) if sources else _constant_name(value)
        if sources:
            scopes[value] = name.rpartition("/")[0]
        value.name = _unique(name, taken)
        value.metadata_props.clear()
    for node in graph:
        # The weight's module, or else the one whose output comes in.
        scope = next((scopes[x] for x in reversed(node.inputs) if x in scopes), "")
        node.name = _unique(f"{scope}/{node.op_type}".lstrip("/"), taken)
        node.metadata_props.clear()
        for i, value in enumerate(node.outputs):
            scopes[value] = scope
            if value not in graph.outputs:
                value.name = f"{node.name}:{i}"
            value.metadata_props.clear()


def _common_name(sources: Sequence[str]) -> str:
    """`a/query/kernel` and `a/key/kernel` give `a/query+key/kernel`."""
    paths = [source.split("/") for source in sources]
    if len({len(path) for path in paths}) > 1:
        return "+".join(sources)
    return "/".join("+".join(dict.fromkeys(part)) for part in zip(*paths, strict=True))


def _constant_name(value: ir.Value) -> str:
    array = known(array_of(value))
    values = "_".join(str(x) for x in array.ravel()[:8])
    return f"constant_{array.dtype}_{values}"


def _unique(name: str, taken: set[str]) -> str:
    candidates = (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2)))
    name = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(name)
    return name
