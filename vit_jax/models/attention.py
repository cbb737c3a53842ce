"""Softmax attention (Eqs. 6 and 7), as its equations are or by a GPU's fused kernel."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from vit_jax.models.rematerialization import product

Array = jax.Array

# Of NVIDIA's GPUs the first with the kernel has compute capability 8.0 (A100).
_FIRST_CAPABILITY = 8.0


def scores(q: Array, k: Array) -> Array:
    """The logits of Eq. 6, [batch, ..., heads, tokens, tokens].

    Args:
        q: queries, scaled, [batch, ..., heads, tokens, head_dim].
        k: keys, likewise.
    """
    return jnp.matmul(q, k.swapaxes(-1, -2))


@jax.custom_vjp
def softmax(logits: Array) -> Array:
    """Softmax over the last axis, in float32, to the dtype of the logits.

    The backward pass reads the weights as they are handed on: autodiff would keep them in float32
    beside those, and no other array is as large.
    """
    return nn.softmax(logits.astype(jnp.float32)).astype(logits.dtype)


def _softmax_forward(logits: Array) -> tuple[Array, Array]:
    weights = softmax(logits)
    return weights, weights


def _softmax_backward(weights: Array, d_weights: Array) -> tuple[Array]:
    dtype = weights.dtype
    weights, d_weights = weights.astype(jnp.float32), d_weights.astype(jnp.float32)
    mean = (weights * d_weights).sum(axis=-1, keepdims=True)
    return ((weights * (d_weights - mean)).astype(dtype),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def scale(q: Array) -> Array:
    """The queries divided by sqrt(head_dim).

    Scaling q, not the product, keeps 16-bit logits in range and lets TensorRT fuse.
    """
    return q * q.shape[-1] ** -0.5


def mix(weights: Array, v: Array) -> Array:
    """The sum of Eq. 7, [batch, ..., heads, tokens, head_dim].

    Args:
        weights: of Eq. 6, [batch, ..., heads, tokens, tokens].
        v: values, [batch, ..., heads, tokens, head_dim].
    """
    return product(jnp.matmul(weights, v))


def for_kernel(z: Array) -> Array:
    """Makes tokens ready for layers whose attention the kernel does.

    Its backward pass is for even numbers of tokens, and 14 x 14 patches and a class are 197: a
    token of zeros makes them even once, rather than in every layer. And in a whole model XLA gives
    the tokens a layout in which the same feature of all images is side by side, and transposes them
    for every product: it must keep this one. Both made a training step of ViT-B/16 with 256 images
    take 74 ms in place of 81 (H200, jax 0.11.2).

    The kernel gives zeros to the token that was added, and to its gradients, as JAX's own form does
    and its tests demand of it; `vit-jax doctor` trains on an odd number of tokens.

    Args:
        z: [batch, tokens, hidden_size].
    """
    return _keep_layout(_pad(z, z.shape[1] % 2))


@jax.jit
def _keep_layout(z: Array) -> Array:
    return with_layout_constraint(z, Layout((0, 1, 2)))


def attend(q: Array, k: Array, v: Array, count: int | None = None) -> Array:
    """Softmax attention, by a fused kernel where the program is compiled for a GPU that has it.

    cuDNN's kernel keeps no attention weights: of the 12 layers of ViT-B/16, 256 images have 2.7 GiB
    of them. It is for 16 bits. What decides is the device that the program is compiled for, which
    need not be one of this machine.

    Args:
        q: queries, not scaled, [batch, tokens, heads, head_dim].
        k: keys, likewise.
        v: values, likewise.
        count: of the tokens; the others are `for_kernel`'s. None if all are tokens.

    Returns:
        [batch, tokens, heads, head_dim]; the others are zeros.
    """
    count = count or q.shape[1]
    plainly = functools.partial(_attend_plainly, count=count)
    if not has_kernel(q.shape, q.dtype):
        return plainly(q, k, v)
    by_cudnn = functools.partial(_attend_by_cudnn, count=count)
    return jax.lax.platform_dependent(q, k, v, cuda=by_cudnn, default=plainly)


def _attend_plainly(q: Array, k: Array, v: Array, count: int) -> Array:
    others = q.shape[1] - count
    # [batch, heads, tokens, head_dim]
    q, k, v = (product(x[:, :count].swapaxes(1, 2)) for x in (q, k, v))
    return _pad(mix(softmax(scores(scale(q), k)), v).swapaxes(1, 2), others)


def _attend_by_cudnn(q: Array, k: Array, v: Array, count: int) -> Array:
    batch, tokens = q.shape[:2]
    q, k, v = (product(_pad(x, tokens % 2)) for x in (q, k, v))
    lengths = None if q.shape[1] == count else jnp.full(batch, count, jnp.int32)
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return y[:, :tokens]


def _pad(x: Array, number: int) -> Array:
    """Adds tokens of zeros to x [batch, tokens, ...]."""
    return jnp.pad(x, ((0, 0), (0, number), *[(0, 0)] * (x.ndim - 2))) if number else x


@functools.cache
def has_kernel(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Tells whether cuDNN is here and takes queries of a dtype and shape, as `attend` gets them."""
    if jnp.dtype(dtype).itemsize != 2:
        return False
    for device in jax.local_devices():
        capability = str(getattr(device, "compute_capability", ""))  # Of AMD's GPUs "gfx942".
        if re.fullmatch(r"\d+\.\d+", capability) and float(capability) < _FIRST_CAPABILITY:
            return False
    x = jax.ShapeDtypeStruct(shape, dtype)
    try:
        jax.eval_shape(functools.partial(_attend_by_cudnn, count=shape[1]), x, x, x)
    except (RuntimeError, ValueError, NotImplementedError):
        return False  # There is no cuDNN, or it refuses heads of this size.
    return True
