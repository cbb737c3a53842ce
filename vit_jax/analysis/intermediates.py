"""Intermediate results of a model on its way to the logits, layer by layer.

The functions here run the model as it is: what they return is sown by it, or captured by Flax, and
is no part of the program that anybody else compiles. Each is compiled once for a model and a shape.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.axial import AxialVisionTransformer
from vit_jax.models.encoder import EncoderBlock
from vit_jax.models.positions import PositionEmbedding

Array = jax.Array


@functools.partial(jax.jit, static_argnums=0)
def attention_weights(model: nn.Module, params: Mapping[str, Any], images: Array) -> Array:
    """Returns the attention weights A of Eq. 6, [batch, layers, heads, tokens, tokens] in float32.

    A row is what one token looks at and sums to 1. Where there is a class token, it is token 0.

    Args:
        model: a Vision Transformer or a hybrid, with or without `scan_layers`. Of an axial one the
            layers are those along the rows and along the columns in turn, their weights 0 between
            any others.
        params: its parameters.
        images: [batch, height, width, 3], as the model takes them.

    Raises:
        UserError: the model has no attention between all its patches, or images are no batch.
    """
    return logits_and_attention(model, params, images)[1]


@functools.partial(jax.jit, static_argnums=0)
def logits_and_attention(
    model: nn.Module, params: Mapping[str, Any], images: Array
) -> tuple[Array, Array]:
    """Returns the logits, [batch, classes], and the attention weights, of one forward pass.

    For arguments, the weights and what it raises, see `attention_weights`.
    """
    _check_batch(images)
    logits, state = model.apply({"params": params}, images, mutable="intermediates")

    def sown(block: Mapping[str, Any]) -> tuple:
        return block["MultiHeadDotProductAttention_1"]["attention_weights"]

    if not isinstance(model, AxialVisionTransformer):
        return logits, _of_layers(state, sown).astype(jnp.float32)
    along = (_of_layers(state, lambda block, a=a: sown(block[a])) for a in ("row", "column"))
    return logits, _between_all(*along).astype(jnp.float32)


def _between_all(along_rows: Array, along_columns: Array) -> Array:
    """Attention weights of an axial model between all patches.

    Args:
        along_rows: [batch, layers, rows, heads, columns, columns].
        along_columns: [batch, layers, columns, heads, rows, rows].
    """
    batch, layers, rows, heads, columns, _ = along_rows.shape
    patches = rows * columns
    both = (
        jnp.einsum("blrhij,rs->blhrisj", along_rows, jnp.eye(rows)),
        jnp.einsum("blchij,cd->blhicjd", along_columns, jnp.eye(columns)),
    )
    both = [weights.reshape(batch, layers, heads, patches, patches) for weights in both]
    return jnp.stack(both, axis=2).reshape(batch, 2 * layers, heads, patches, patches)


@functools.partial(jax.jit, static_argnums=0)
def layer_tokens(model: nn.Module, params: Mapping[str, Any], images: Array) -> Array:
    """Returns z_l of Eq. 3 after every layer, [batch, layers, tokens, hidden_size] in float32.

    For arguments and what it raises, see `attention_weights`.
    """
    _check_batch(images)
    _, state = model.apply(
        {"params": params},
        images,
        capture_intermediates=lambda module, _: isinstance(module, EncoderBlock),
        mutable="intermediates",
    )
    return _of_layers(state, lambda block: block["__call__"]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def position_embedding(model: nn.Module, params: Mapping[str, Any], images: Array) -> Array:
    """Returns E_pos of Eq. 1, [tokens, hidden_size] in float32, of any kind that is added.

    Args:
        model: a Vision Transformer or a hybrid.
        params: its parameters.
        images: [batch, height, width, 3]; only the size matters.

    Raises:
        UserError: the model has none, none that is added, or another one in every layer.
    """
    _, state = model.apply(
        {"params": params},
        images,
        capture_intermediates=lambda module, _: isinstance(module, PositionEmbedding),
        mutable="intermediates",
    )
    encoder = state.get("intermediates", {}).get("Transformer", {})
    if "posembed_input" not in encoder:
        raise UserError("this model has no position embedding that all its layers share")
    (embedding,) = encoder["posembed_input"]["__call__"]
    return embedding[0].astype(jnp.float32)


def _check_batch(images: Array) -> None:
    if images.ndim != 4:
        raise UserError(
            f"images are {list(images.shape)}: give [batch, height, width, 3], of a single image "
            "images[None]"
        )


def _of_layers(state: Mapping[str, Any], choose: Callable[[Mapping[str, Any]], tuple]) -> Array:
    """Stacks what one value of every encoder block, [batch, ...], to [batch, layers, ...]."""
    encoder = state.get("intermediates", {}).get("Transformer", {})
    if "encoderblock" in encoder:  # scan_layers has stacked them already.
        (stacked,) = choose(encoder["encoderblock"])
        return stacked.swapaxes(0, 1)
    layers = []
    while block := encoder.get(f"encoderblock_{len(layers)}"):
        (value,) = choose(block)
        layers.append(value)
    if not layers:
        raise UserError(
            "this model has no attention between all patches: give a Vision Transformer or a hybrid"
        )
    return jnp.stack(layers, axis=1)
