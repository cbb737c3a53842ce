"""To one ONNX file, by either converter, in the form that deployment engines recognize.

The weights are inputs of the traced function and are bound to the graph afterwards: the converters
only ever see a graph of a few hundred small nodes, which is what makes them fast and lets models
above protobuf's limit of 2 GB through.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import onnx
import onnx_ir as ir

import vit_jax
from vit_jax.errors import UserError
from vit_jax.export import free_size, stages
from vit_jax.export.forward import Forward
from vit_jax.export.graph import known
from vit_jax.export.rewrite import rewrite, traced_sizes
from vit_jax.files import atomic_files, make_folder

OPSET = 17  # The first with LayerNormalization, and one that TensorRT 8.6 to 11 read.
_EXTERNAL_ABOVE = 2**31 - 2**20  # bytes; protobuf's limit is 2**31.


def to_model(forward: Forward, converter: str = "jax2tf") -> ir.Model:
    """Converts to the graph that is deployed, in float32.

    Args:
        forward: what is exported.
        converter: "jax2tf" (JAX 0.7.1) or "jax2onnx" (newer ones); the graphs are equal.

    Raises:
        UserError: the converter is unknown or not installed, or this JAX is none that it takes.
    """
    if converter not in CONVERTERS:
        raise UserError(f"converter {converter!r} is unknown: use {' or '.join(CONVERTERS)}")
    if forward.free_size:
        traced = traced_sizes(("batch", "tokens"), forward.sizes)
        of_tokens = free_size.on_tokens(forward, traced["tokens"])
        model = _convert(of_tokens, converter, "tokens_in", traced)
        free_size.add_stem(model, forward)
    else:
        model = _convert(forward, converter, "images", traced_sizes(("batch",), forward.sizes))
    model.graph.name = forward.metadata["architecture"]
    model.producer_name, model.producer_version = "vit_jax", vit_jax.__version__
    model.metadata_props.clear()
    model.metadata_props.update(forward.metadata, precision="fp32")
    return model


def _convert(forward: Forward, converter: str, name: str, traced: Mapping[str, int]) -> ir.Model:
    """The rewritten graph; its input gets a name."""
    model = ir.from_proto(CONVERTERS[converter](forward, traced["batch"]))
    names = (name, *forward.flat_params())
    for value, each in zip(model.graph.inputs, names, strict=True):
        value.name = each
    model.graph.outputs[0].name = forward.output_name
    rewrite(model, forward.flat_params(), traced)
    return model


def _by_jax2tf(forward: Forward, batch: int) -> onnx.ModelProto:
    from vit_jax.export.to_tf import tf_function

    function = tf_function(forward, free_batch=False)
    import tensorflow as tf
    import tf2onnx

    signature = [
        tf.TensorSpec((batch, *forward.image_shape), forward.image_dtype, name="images"),
        *(tf.TensorSpec(w.shape, w.dtype, name=n) for n, w in forward.flat_params().items()),
    ]
    model, _ = tf2onnx.convert.from_function(
        tf.function(function, autograph=False), input_signature=signature, opset=OPSET
    )
    return model


def _by_jax2onnx(forward: Forward, batch: int) -> onnx.ModelProto:
    try:
        import jax2onnx
    except ImportError as error:
        raise UserError(
            f"--converter jax2onnx needs jax2onnx ({error}): {stages.INSTALL_NEWEST}"
        ) from error
    shapes = [((batch, *forward.image_shape), np.dtype(forward.image_dtype))]
    shapes += [(weight.shape, weight.dtype) for weight in forward.flat_params().values()]
    return jax2onnx.to_onnx(
        forward.apply_flat,
        [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes],
        opset=OPSET,
    )


CONVERTERS: dict[str, Callable[[Forward, int], onnx.ModelProto]] = {
    "jax2tf": _by_jax2tf,
    "jax2onnx": _by_jax2onnx,
}


def save(model: ir.Model, directory: str | os.PathLike[str]) -> Path:
    """Checks a model and writes `directory/model.onnx`; a write that fails leaves no trace.

    Weights above protobuf's 2 GB go to one file beside it, whose name holds for this model only, so
    that the model that was there before stays whole until it is replaced.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = Path(directory)
    size = sum(known(value.const_value).nbytes for value in model.graph.initializers.values())
    before = set(directory.glob("model.*.data"))
    data = f"model.{secrets.token_hex(4)}.data" if size > _EXTERNAL_ABOVE else None
    make_folder(directory)
    with atomic_files(directory) as temporary:  # The weights move first: "model.onnx" comes last.
        ir.save(model, temporary / "model.onnx", external_data=data)
        onnx.checker.check_model(temporary / "model.onnx", full_check=True)
    for stale in before:
        stale.unlink(missing_ok=True)
    return directory / "model.onnx"
