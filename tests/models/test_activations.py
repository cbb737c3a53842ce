import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vit_jax.models.activations import GELU

ROOT = np.sqrt(2 / np.pi)


def erf_form(x):
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    share = (1 + erf(x / np.sqrt(2))) / 2
    return x * share, share + x * density


def tanh_form(x):
    tanh = np.tanh(ROOT * (x + 0.044715 * x**3))
    slope = (1 - tanh**2) * ROOT * (1 + 3 * 0.044715 * x**2)
    return x * (1 + tanh) / 2, (1 + tanh + x * slope) / 2


EXACT = {"erf": erf_form, "tanh": tanh_form}
X = np.concatenate([np.linspace(-12, 12, 4801), [-1e4, -1e-30, 0.0, 1e-30, 1e4]])


@pytest.mark.parametrize("form", GELU)
# Far below zero 1 + tanh and 1 + erf cancel, and x times that is left of an error of 2**-24.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 4e-6), ("bfloat16", 2**-8)])
def test_value_and_derivative_are_those_of_float64(form, dtype, tolerance):
    x = jnp.asarray(X, dtype)
    y, pullback = jax.vjp(GELU[form], x)
    dy = jnp.full_like(x, -1.5)
    (dx,) = pullback(dy)
    assert y.dtype == dx.dtype == dtype
    value, derivative = EXACT[form](np.asarray(x, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), value, rtol=tolerance, atol=tolerance)
    found = np.asarray(dx, np.float64)
    np.testing.assert_allclose(found, -1.5 * derivative, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("form", GELU)
def test_nothing_but_x_is_kept(form):
    x = jnp.ones((4, 6), jnp.bfloat16)
    _, pullback = jax.vjp(GELU[form], x)
    (kept,) = (a for a in jax.tree.leaves(pullback) if a.size > 1)
    assert kept.shape == x.shape and kept.dtype == x.dtype


def program(x, platform, *in_product):
    lowered = jax.jit(lambda x: GELU["tanh"](x, *in_product)).trace(x)
    return lowered.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "dtype", "in_product", "known"),
    [
        ("cuda", "bfloat16", True, True),
        ("cuda", "bfloat16", False, False),
        ("cpu", "bfloat16", True, False),
        ("cuda", "float32", True, False),
    ],
)
def test_a_product_is_given_the_form_that_xla_knows_in_its_own_bits(
    platform, dtype, in_product, known
):
    text = program(jax.ShapeDtypeStruct((4, 6), dtype), platform, in_product)
    in_16_bits = "tanh" in text and "f32" not in text.replace("bf16", "")
    assert in_16_bits == known
    assert ("tanh" in text) == (known or dtype == "float32")


def test_what_a_product_is_given_is_the_same_function_in_the_precision_of_its_bits():
    known = jax.nn.gelu(jnp.asarray(X[:-1], jnp.bfloat16), approximate=True)
    x = np.asarray(jnp.asarray(X[:-1], jnp.bfloat16), np.float64)
    np.testing.assert_allclose(np.asarray(known, np.float64), tanh_form(x)[0], rtol=2e-2, atol=2e-2)
