"""16-bit and 8-bit versions of an exported graph: the file says what is computed in which type.

In fp16 and bf16 all products and the attention, its softmax included, are in 16 bits. In float32
are the norms, whose squares leave the range of fp16, the residual sums that they read, what comes
after the last norm, and the normalization of pixels. Inputs and outputs keep their types, so
whoever runs the model need not know.
"""

import logging
import os
import tempfile

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from vit_jax.errors import UserError
from vit_jax.export.graph import array_of, known, producer_of

_FLOAT = ir.DataType.FLOAT
_NORMS = ("LayerNormalization", "InstanceNormalization")


def to_half(model: ir.Model, onnx_type: int, overflow: str | None = None) -> ir.Model:
    """Gives a float32 graph the types of a 16-bit one, in place.

    Args:
        model: from `to_onnx.to_model`.
        onnx_type: the number of a type of 16 bits in TensorProto.DataType.
        overflow: what is said of a weight that is infinite in this type; None lets it be.

    Returns:
        The model.

    Raises:
        UserError: a weight is too large for the type.
    """
    half = ir.DataType(onnx_type)
    graph = model.graph
    types: dict[ir.Node | None, ir.DataType] = dict.fromkeys(graph, half)
    types |= dict.fromkeys(_float32_nodes(graph), _FLOAT)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, half):
                continue
            # Inputs and weights are float32 so far.
            if types.get(value.producer(), _FLOAT) != types[node]:
                key = (value, types[node])
                if key not in casts:
                    casts[key] = _cast(graph, node, value, types[node], overflow)
                node.replace_input_with(i, casts[key])
        for value in node.outputs:
            if value.dtype == _FLOAT:
                value.dtype = types[node]
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    return model


def _float32_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Norms, the sums they read, what comes after the last one, and what is done to pixels."""
    found: set[ir.Node] = set()
    after_norm: set[ir.Node] = set()
    for node in graph:
        if node.op_type in _NORMS:
            after_norm = {node}
            found.add(node)
            source = producer_of(node.inputs[0])
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


def _cast(
    graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType, overflow: str | None
) -> ir.Value:
    """The value in another type: of a weight by rounding it, of anything else by a Cast before."""
    name = f"{value.name}/{dtype.short_name()}"
    if value.const_value is not None:
        array = value.const_value.numpy()
        with np.errstate(over="ignore"):
            rounded = array.astype(dtype.numpy())
        beyond = np.isfinite(array).all() and not np.isfinite(rounded.astype(np.float32)).all()
        if overflow and beyond:
            raise UserError(f"{value.name} has {np.abs(array).max():.3g}, {overflow}")
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
        and "/encoderblock_" in known(node.name)
        and "/Dense_1/" not in known(node.name)
        and array_of(node.inputs[1]) is not None
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
    quantized.metadata_props.update(model.metadata_props)
    return quantized
