"""A 16-bit graph on a CPU, every result rounded, which onnxruntime does not do there."""

import os
import tempfile
from typing import Any

import numpy as np
import onnx_ir as ir

from vit_jax.export.graph import array_of, known, producer_of
from vit_jax.export.precisions import PRECISIONS, Precision

_FLOAT = ir.DataType.FLOAT


class Emulation:
    """A graph run as `emulate` rounds it, by onnxruntime on the CPU, and how large its numbers get.

    Attributes:
        largest: of a precision that has a `largest`, the largest magnitude of every value so far,
            before it is rounded, by the name of the node that it comes from, in the order of the
            graph. What only reaches a tanh or an erf is left out: they take infinity as they take
            any large number.
    """

    def __init__(self, path: str | os.PathLike[str], precision: Precision):
        import onnxruntime

        model = emulate(ir.load(path))
        self._dtype = np.dtype(precision.dtype)
        # A Split has its name once for each of its results.
        self._names = _watch(model.graph, _type(precision)) if precision.largest else []
        self.largest = dict.fromkeys(self._names, 0.0)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as directory:
            copy = os.path.join(directory, "model.onnx")
            ir.save(model, copy, external_data="model.data")
            self._session = onnxruntime.InferenceSession(
                copy, options, providers=["CPUExecutionProvider"]
            )

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Maps images [batch, height, width, 3] to outputs [batch, outputs]."""
        results: Any = self._session.run(None, {"images": images})  # Arrays, of tensors.
        outputs, *largest = results
        for name, value in zip(self._names, largest, strict=True):
            self.largest[name] = np.fmax(self.largest[name], value).item()
        return outputs

    def range(self) -> dict[str, Any]:
        """The `largest` of all, `largest_at` which node, and the first that rounds to infinity.

        The last is `overflow_at` a node, or None. Empty where none is watched.
        """
        if not self.largest:
            return {}
        with np.errstate(over="ignore"):
            beyond = [name for name, x in self.largest.items() if np.isinf(self._round(x))]
        where = max(self.largest, key=self.largest.__getitem__)
        overflow = beyond[0] if beyond else None
        return {"largest": self.largest[where], "largest_at": where, "overflow_at": overflow}

    def _round(self, x: float) -> np.ndarray:
        return np.asarray(x).astype(self._dtype)


def _type(precision: Precision) -> ir.DataType:
    return ir.DataType(known(precision.onnx_type))


def _watch(graph: ir.Graph, dtype: ir.DataType) -> list[str]:
    """Adds the largest magnitude of every value that becomes `dtype` to the outputs."""
    saturating = _saturating(graph)
    names = []
    for node in list(graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != dtype:
            continue
        value = known(node.inputs[0])
        if value in saturating:
            continue
        magnitude = ir.Node("", "Abs", [value])
        largest = ir.Node("", "ReduceMax", magnitude.outputs, [ir.AttrInt64("keepdims", 0)])
        graph.insert_after(node, [magnitude, largest])
        largest.outputs[0].name = f"{value.name}/largest"
        largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(_FLOAT), ir.Shape([])
        graph.outputs.append(largest.outputs[0])
        names.append(known(producer_of(value).name))
    return names


def _saturating(graph: ir.Graph) -> set[ir.Value]:
    """Values of which only a tanh or an erf is used, such as the cube in GELU."""
    found: set[ir.Value] = set()

    def saturates(user: ir.Node) -> bool:
        passed_on = user.op_type in ("Cast", "Mul", "Div", "Add", "Pow")
        return user.op_type in ("Tanh", "Erf") or (passed_on and user.outputs[0] in found)

    for node in reversed(list(graph)):
        users = [use.node for use in node.outputs[0].uses()]
        if users and all(map(saturates, users)):
            found.add(node.outputs[0])
    return found


def emulate(model: ir.Model) -> ir.Model:
    """A float32 graph that rounds to 16 bits wherever the given graph does.

    For checking a graph on a machine without 16-bit arithmetic, where onnxruntime computes fp16 in
    float32 and rounds at the end of what it has fused. Here every 16-bit result of every node is
    rounded, and what leaves the range becomes infinite. Within a node all is float32: a product is
    summed in it and rounded once, as tensor cores do, and so are a Softmax, a Tanh and an Erf. An
    engine that fuses nodes rounds less often. To be run without graph optimizations, which would
    take the rounding out.
    """
    model = model.clone()
    graph = model.graph
    half = {_type(row) for row in PRECISIONS.values() if row.emulated}
    for value in graph.initializers.values():
        if value.dtype in half:
            array = known(array_of(value)).astype(np.float32)
            value.const_value = ir.Tensor(array, name=value.name)
            value.dtype = _FLOAT
    for node in list(graph):
        for value in node.outputs:
            if value.dtype not in half:
                continue
            dtype, value.dtype = value.dtype, _FLOAT
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", _FLOAT)
            uses = list(value.uses())
            down = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)])
            up = ir.Node("", "Cast", down.outputs, [ir.AttrInt64("to", _FLOAT)])
            down.outputs[0].name, up.outputs[0].name = f"{value.name}/16", f"{value.name}/32"
            graph.insert_after(node, [down, up])
            for use in uses:
                use.node.replace_input_with(use.idx, up.outputs[0])
    return model
