"""Flax to TensorFlow: jax2tf graph serialization, and a SavedModel with a serving signature."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vit_jax.errors import UserError, first_line
from vit_jax.export import stages
from vit_jax.export.forward import Forward
from vit_jax.files import atomic_folder, make_folder


def can_serialize_graphs() -> bool:
    """Tells whether this JAX can emit a TensorFlow graph.

    From 0.7.2 on it emits one opaque operation; jax2tf.convert still has the argument
    `native_serialization`, but ignores it.
    """
    return jax.__version_info__ < (0, 7, 2)


def check_graph_serialization() -> None:
    """Raises a UserError where this JAX cannot emit a TensorFlow graph."""
    if not can_serialize_graphs():
        raise UserError(
            f"JAX {jax.__version__} emits no TensorFlow graph: {stages.INSTALL_PINNED} "
            "(jax==0.7.1), or use --converter jax2onnx --stages onnx"
        )


def tf_function(forward: Forward, *, free_batch: bool) -> Callable[..., Any]:
    """The TensorFlow function of images and weights, traced as ordinary TensorFlow operations.

    Args:
        forward: what is exported.
        free_batch: whether any batch size can be traced; a fixed one gives a smaller graph.

    Raises:
        UserError: this JAX has no graph serialization.
    """
    check_graph_serialization()
    from jax.experimental import jax2tf

    shapes = ["(batch, _, _, _)", *[None] * len(forward.flat_params())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # enable_xla=True would leave XlaConvV2 in the graph, and with_gradient=False
        # PreventGradient; TensorRT and ONNX know neither.
        return jax2tf.convert(
            forward.apply_flat,
            polymorphic_shapes=shapes if free_batch else None,
            native_serialization=False,
            enable_xla=False,
            with_gradient=True,
        )


def to_tf(forward: Forward, directory: str | os.PathLike[str]) -> Path:
    """Writes `directory/saved_model`, replacing one that is there.

    Its signature `serving_default` maps `images` [batch, height, width, 3] to a dict of the output
    by its name; the batch dimension is free. The weights are its variables.

    Raises:
        UserError: this JAX has no graph serialization, or the directory cannot be written.
    """
    function = tf_function(forward, free_batch=True)
    import tensorflow as tf

    weights = [
        tf.Variable(weight, trainable=False, name=name)
        for name, weight in forward.flat_params().items()
    ]
    images = tf.TensorSpec((None, *forward.image_shape), forward.image_dtype, name="images")

    @tf.function(input_signature=[images], autograph=False)
    def serve(images: Any) -> dict[str, Any]:
        return {forward.output_name: function(images, *weights)}

    module: Any = tf.Module()
    module.weights, module.serve = weights, serve
    path = Path(directory) / "saved_model"
    make_folder(path.parent)
    with atomic_folder(path, replace=True) as new:
        try:
            tf.saved_model.save(module, str(new), signatures={"serving_default": serve})
        except tf.errors.OpError as error:  # What it makes of a disk that refuses.
            raise UserError(
                f"{path} cannot be written: {first_line(error)}; free the disk or name another "
                "folder"
            ) from error
    return path
