"""Policies of what the backward pass computes again (Chen et al., 2016, arXiv 1604.06174).

By what a policy computes again, from the least to the most:

- "nothing": all that the backward pass reads is kept.
- "dots": all but dot products, convolutions and fused attention, which are kept; norms, activations
  and dropout take hardly any time, but most of the memory.
- "block": every residual block (an attention, an MLP, a ResNet's unit) from its input.
- "everything": every layer, which is an attention and an MLP, from its input; or a ResNet's unit.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

POLICIES = ("nothing", "dots", "block", "everything")
_BLOCK = "residual_block"
_PRODUCT = "product"


def rematerialize(
    module: type[nn.Module], policy: str, *, static_argnums: tuple[int, ...] = (), loops: bool
) -> type[nn.Module]:
    """The class of a layer, or unit, that keeps for the backward pass what a policy says.

    Args:
        module: the class.
        policy: one of `POLICIES`.
        static_argnums: those of its arguments that are no arrays, counted from self.
        loops: whether a scan applies it: only elsewhere the compiler must be kept from finding that
            what is computed again was there before.
    """
    if policy == "nothing":
        return module
    keeps: Callable[..., bool] | None = {
        "dots": _is_product,
        "block": jax.checkpoint_policies.save_only_these_names(_BLOCK),
    }.get(policy)
    return nn.remat(module, policy=keeps, static_argnums=static_argnums, prevent_cse=not loops)


def end_of_block(x: jax.Array) -> jax.Array:
    """Returns x, marked as what the policy "block" keeps."""
    return checkpoint_name(x, _BLOCK)


def product(x: jax.Array) -> jax.Array:
    """Returns x, marked as what the policy "dots" keeps in place of the product that it is made of.

    Products with weights need no mark, but where a bias or a layout is what is to be kept too.
    """
    return checkpoint_name(x, _PRODUCT)


def _is_product(primitive: Any, *_: Any, **params: Any) -> bool:
    match primitive.name:
        case "dot_general":
            _, (batch, _) = params["dimension_numbers"]
            return not batch  # The others are attention's logits, as large as its weights.
        case "name":
            return params["name"] in (_PRODUCT, _BLOCK)
        case other:
            # cuDNN's gives what its backward pass reads beside its result.
            return other == "conv_general_dilated" or other.startswith("dot_product_attention_fwd")
