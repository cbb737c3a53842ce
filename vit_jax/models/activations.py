"""GELU (Hendrycks & Gimpel, 2016, arXiv 1606.08415) in both forms, with their derivatives.

Autodiff keeps half a dozen arrays of the MLP's width for the backward pass; here it keeps x alone.
Both are computed in float32 also where x has 16 bits: the arrays that they read and write set
their time, and not their arithmetic.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

_CUBIC = 0.044715
_ROOT = math.sqrt(2 / math.pi)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu_tanh(x: Array, in_product: bool = False) -> Array:
    """GELU in its tanh form, which the official checkpoints were trained with.

    Args:
        x: of any shape.
        in_product: whether XLA is to have the product that x comes from do it on NVIDIA's GPUs, in
            float32 as well. It knows a form of it in 16 bits, where x is not computed again; if it
            did not, they would be computed with, as by the official code.
    """
    if x.dtype.itemsize > 2:
        return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)
    if not in_product:
        return _by_sigmoid(x)
    known = functools.partial(jax.nn.gelu, approximate=True)
    return jax.lax.platform_dependent(x, cuda=known, default=_by_sigmoid)


def _by_sigmoid(x: Array) -> Array:
    """The same: (1 + tanh(u)) / 2 is sigmoid(2 u), which takes a GPU half as long."""
    y = x.astype(jnp.float32)
    return (y * _share(y)).astype(x.dtype)


def _share(x: Array) -> Array:
    return jax.nn.sigmoid(2 * _ROOT * (x + _CUBIC * x**3))


def _gelu_tanh_derivative(x: Array) -> Array:
    share = _share(x)
    return share + x * share * (1 - share) * (2 * _ROOT * (1 + 3 * _CUBIC * x**2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu_erf(x: Array, in_product: bool = False) -> Array:
    """GELU in its exact form, which timm and Hugging Face use; no product does it.

    Written with erf because jax.nn.gelu uses erfc, which ONNX does not have.
    """
    del in_product
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_erf_derivative(x: Array) -> Array:
    density = jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))) + x * density


def _define_gradient(gelu: Any, derivative: Callable[[Array], Array]) -> None:
    def forward(x: Array, in_product: bool) -> tuple[Array, Array]:
        return gelu(x, in_product), x

    def backward(_in_product: bool, x: Array, dy: Array) -> tuple[Array]:
        # Else the compiler finds tanh, or erf, in both passes and keeps it, in float32.
        x, dy = jax.lax.optimization_barrier((x, dy))
        return ((derivative(x.astype(jnp.float32)) * dy.astype(jnp.float32)).astype(x.dtype),)

    gelu.defvjp(forward, backward)


_define_gradient(gelu_tanh, _gelu_tanh_derivative)
_define_gradient(gelu_erf, _gelu_erf_derivative)

GELU = {"tanh": gelu_tanh, "erf": gelu_erf}
