"""Features of every patch beside those that are pooled, from one forward pass.

The modules' results are picked up as they are made: the model runs as it is, with the attention
that it has in every other use.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.base import Grid, ModelConfig
from vit_jax.models.encoder import Encoder
from vit_jax.models.vit import VisionTransformer, ViTConfig

Array = jax.Array


def dense_features(
    model: VisionTransformer, params: Mapping[str, Any], images: Array, layers: Sequence[int] = ()
) -> tuple[Array, Array, list[Array]]:
    """Computes pooled features and the tokens that they are made of.

    Args:
        model: without its head, and without `scan_layers` and `remat`.
        params: its parameters.
        images: [batch, height, width, channels], as the model takes them, but for their sides: what
            is left of them beyond whole patches, at the right and below, is not looked at, as the
            official code's convolution without padding does not.
        layers: numbers of layers, from 1 on.

    Returns:
        What the head is applied to, [batch, features]; the tokens after the last LayerNorm (Eq. 4
        before its choice of one), [batch, tokens, hidden_size], those of `prefix_names` first, then
        the patches, row by row; and z_l of Eq. 3 for every l of `layers`, likewise, to which no
        LayerNorm has been applied.
    """
    found: dict[str | None, Array] = {}

    def keep(function: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        result = function(*args, **kwargs)
        if context.method_name == "__call__":
            parent = context.module.parent
            if isinstance(context.module, Encoder) or isinstance(parent, Encoder):
                found[context.module.name] = result
        return result

    rows, columns = whole_patches(model.config, *images.shape[1:3])
    step = model.downsampling
    images = images[:, : rows * step, : columns * step]
    with nn.intercept_methods(keep):
        pooled: Any = model.apply({"params": params}, images)
    return pooled, found["Transformer"], [found[f"encoderblock_{n - 1}"] for n in layers]


def whole_patches(config: ViTConfig, height: int, width: int) -> Grid:
    """The rows and columns of whole patches of an image whose sides need be no multiples.

    Raises:
        UserError: there is none.
    """
    step = config.downsampling
    if min(height, width) < step:
        raise UserError(f"image_size {height}x{width} is less than a patch: use {step} or more")
    return height // step, width // step


def prefix_names(config: ViTConfig) -> tuple[str, ...]:
    """The names of the tokens before the patches: `class`, `distillation`, `register_1` and on."""
    if not config.has_class:
        return ()
    registers = (f"register_{n + 1}" for n in range(config.num_registers))
    return ("class", *["distillation"] * config.distillation_token, *registers)


def check_dense(config: ModelConfig, layers: Sequence[int] = ()) -> ViTConfig:
    """Returns a description after it was checked that its model has tokens, and those layers.

    Raises:
        UserError: it is a ResNet, has not so many, or one is no whole number.
    """
    if not isinstance(config, ViTConfig):
        raise UserError(
            f"this {config.noun} has no tokens: features of every patch are those of a Vision "
            "Transformer or a hybrid"
        )
    numbers = range(1, config.num_layers + 1)
    if bad := [n for n in layers if not _is_whole(n) or n not in numbers]:
        raise UserError(f"layer {bad[0]!r} does not exist: name one from 1 to {config.num_layers}")
    return config


def _is_whole(n: object) -> bool:
    return isinstance(n, int | np.integer) and not isinstance(n, bool)
