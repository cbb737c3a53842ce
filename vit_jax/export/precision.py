"""16-bit and 8-bit versions of an exported graph: the file says what is computed in which type.

In fp16 and bf16 all products and the attention, its softmax included, are in 16 bits. In float32
are the norms, whose squares leave the range of fp16, the residual sums that they read, what comes
after the last norm, and the normalization of pixels. Inputs and outputs keep their types, so
whoever runs the model need not know.
"""

import logging
import os
import tempfile
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from vit_jax.errors import UserError

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOAT = ir.DataType.FLOAT
_NORMS = ("LayerNormalization", "InstanceNormalization")


def to_half(model: ir.Model, precision: str) -> None:
    """Gives a float32 graph the types of a 16-bit one, in place.

    Args:
        model: from `to_onnx.to_model`.
        precision: "fp16" or "bf16".

    Raises:
        UserError: a weight is too large for fp16.
    """
    half = HALF[precision]
    graph = model.graph
    types = dict.fromkeys(graph, half) | dict.fromkeys(_float32_nodes(graph), _FLOAT)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, half):
                continue
            # Inputs and weights are float32 so far.
            if types.get(value.producer(), _FLOAT) != types[node]:
                key = (value, types[node])
                if key not in casts:
                    casts[key] = _cast(graph, node, *key)
                node.replace_input_with(i, casts[key])
        for value in node.outputs:
            if value.dtype == _FLOAT:
                value.dtype = types[node]
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    model.metadata_props["precision"] = precision


def _float32_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Norms, the sums they read, what comes after the last one, and what is done to pixels."""
    found: set[ir.Node] = set()
    after_norm: set[ir.Node] = set()
    for node in graph:
        if node.op_type in _NORMS:
            after_norm = {node}
            found.add(node)
            source = node.inputs[0].producer()
            if source.op_type == "Add":
                found.add(source)
            continue
        producers = {value.producer() for value in node.inputs if value is not None}
        if producers & after_norm:
            after_norm.add(node)
    found |= after_norm
    pixels = {value for value in graph.inputs if value.dtype == ir.DataType.UINT8}
    for node in graph:
        if pixels.intersection(node.inputs) and node.op_type in ("Cast", "Mul", "Sub"):
            found.add(node)
            pixels.update(node.outputs)
    return found


def _cast(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The value in another type: of a weight by rounding it, of anything else by a Cast before."""
    name = f"{value.name}/{dtype.short_name()}"
    if value.const_value is not None:
        array = value.const_value.numpy()
        with np.errstate(over="ignore"):
            rounded = array.astype(dtype.numpy())
        if np.isfinite(array).all() and not np.isfinite(rounded.astype(np.float32)).all():
            raise UserError(
                f"{value.name} has {np.abs(array).max():.3g}, above 65504, the largest number of "
                "fp16: use --precision bf16"
            )
        tensor = ir.Tensor(rounded, name=name)
        result = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor
        )
        graph.register_initializer(result)
        return result
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], name=name)
    cast.outputs[0].name = f"{name}:0"
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    graph.insert_before(node, cast)
    return cast.outputs[0]


class Emulation:
    """A graph run as `emulate` rounds it, by onnxruntime on the CPU, and how large its numbers get.

    Attributes:
        largest: the largest magnitude of every fp16 value so far, before it is rounded, by the name
            of the node that it comes from, in the order of the graph. What only reaches a tanh or
            an erf is left out: they take infinity as they take any large number.
    """

    def __init__(self, path: str | os.PathLike[str]):
        import onnxruntime

        model = emulate(ir.load(path))
        self._names = _watch(model.graph)  # That of a Split once for each of its results.
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
        outputs, *largest = self._session.run(None, {"images": images})
        for name, value in zip(self._names, largest, strict=True):
            self.largest[name] = np.fmax(self.largest[name], value).item()
        return outputs

    def range(self) -> dict[str, Any]:
        """The `largest` of all, `largest_at` which node, and the first that fp16 makes infinite.

        The last is `overflow_at` a node, or None. Empty without values in fp16.
        """
        if not self.largest:
            return {}
        with np.errstate(over="ignore"):
            beyond = [name for name, x in self.largest.items() if np.isinf(np.float16(x))]
        where = max(self.largest, key=self.largest.__getitem__)
        overflow = beyond[0] if beyond else None
        return {"largest": self.largest[where], "largest_at": where, "overflow_at": overflow}


def _watch(graph: ir.Graph) -> list[str]:
    """Adds the largest magnitude of every value that becomes fp16 to the outputs."""
    saturating = _saturating(graph)
    names = []
    for node in list(graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != HALF["fp16"]:
            continue
        value = node.inputs[0]
        if value in saturating:
            continue
        magnitude = ir.Node("", "Abs", [value])
        largest = ir.Node("", "ReduceMax", magnitude.outputs, [ir.AttrInt64("keepdims", 0)])
        graph.insert_after(node, [magnitude, largest])
        largest.outputs[0].name = f"{value.name}/largest"
        largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(_FLOAT), ir.Shape([])
        graph.outputs.append(largest.outputs[0])
        names.append(value.producer().name)
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
    half = set(HALF.values())
    for value in graph.initializers.values():
        if value.dtype in half:
            array = value.const_value.numpy().astype(np.float32)
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


def to_int8(model: ir.Model, images: np.ndarray) -> ir.Model:
    """Quantizes products of the encoder's layers to 8 bits, with scales from a calibration set.

    QuantizeLinear and DequantizeLinear stand before the inputs of the products for q, k and v, of
    the heads' outputs, and of the first layer of each MLP, where engines fuse them. Scales are
    symmetric, one for each tensor and one for each output channel of a weight; weights are stored
    in 8 bits. All else stays in float32, the second layer of the MLPs too: what comes out of GELU
    has outliers which one scale does not fit (ViT-Ti/16 agrees with itself on 93% of the flowers
    without it and on 68% with it).

    Args:
        model: a float32 graph from `to_onnx.to_model`.
        images: the calibration set, as the model takes them; 64 photographs are enough.

    Raises:
        UserError: the model has no encoder layer.
    """
    from onnxruntime import quantization

    class Batches(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(np.array_split(images, -(-len(images) // 8)))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    products = [
        node.name
        for node in model.graph
        if node.op_type == "MatMul"
        and "/encoderblock_" in node.name
        and "/Dense_1/" not in node.name
        and node.inputs[1].const_value is not None
    ]
    if not products:
        raise UserError("int8 is for Transformer layers, of which this model has none: use fp16")
    with tempfile.TemporaryDirectory() as directory:
        before, after = (os.path.join(directory, name) for name in ("float.onnx", "int8.onnx"))
        ir.save(model, before, external_data="float.data")
        logging.disable(logging.WARNING)  # It asks for a preparation that the graph had.
        quantization.quantize_static(
            before,
            after,
            Batches(),
            quant_format=quantization.QuantFormat.QDQ,
            nodes_to_quantize=products,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=True,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
        logging.disable(logging.NOTSET)
        quantized = ir.load(after)
        ir.external_data.load_to_model(quantized)
    quantized.metadata_props.clear()
    quantized.metadata_props.update(model.metadata_props, precision="int8")
    return quantized
