import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.normalization import LayerNorm, normalize

EPSILON = 1e-6
FEATURES = 96


def exact(x, scale, bias, dy):
    """The value and the gradients of sum(dy * y), in float64 by the derivative of every step."""
    x, scale, bias, dy = (np.asarray(a, np.float64) for a in (x, scale, bias, dy))
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    deviation = np.sqrt(variance + EPSILON)
    normalized = (x - mean) / deviation
    d_normalized = dy * scale
    d_variance = (d_normalized * (x - mean)).sum(-1, keepdims=True) * -0.5 * deviation**-3
    d_mean = -d_normalized.sum(-1, keepdims=True) / deviation
    dx = d_normalized / deviation + d_variance * 2 * (x - mean) / FEATURES + d_mean / FEATURES
    grads = dx, (dy * normalized).sum((0, 1)), dy.sum((0, 1))
    return normalized * scale + bias, grads


def inputs(offset, deviation, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(offset + deviation * rng.normal(size=(3, 7, FEATURES)), dtype)
    scale = jnp.asarray(1 + rng.normal(size=FEATURES) / 3, jnp.float32)
    bias = jnp.asarray(rng.normal(size=FEATURES), jnp.float32)
    return x, scale, bias, jnp.asarray(rng.normal(size=x.shape), dtype)


# Relative to the largest value. Where the mean is a thousand deviations, x itself has no more
# than 24 - 10 bits of the deviation; a variance below epsilon must neither vanish nor overflow.
@pytest.mark.parametrize(
    ("offset", "deviation", "dtype", "tolerance"),
    [
        (0.5, 2.0, "float32", 2e-6),
        (1000.0, 1.0, "float32", 2e-4),
        (0.0, 1e-5, "float32", 2e-6),
        (0.0, 1e4, "float32", 2e-6),
        (4.0, 1.0, "bfloat16", 6e-3),
    ],
)
def test_value_and_gradients_are_those_of_float64(offset, deviation, dtype, tolerance):
    x, scale, bias, dy = inputs(offset, deviation, dtype)
    y, pullback = jax.vjp(lambda *args: normalize(*args, EPSILON, jnp.dtype(dtype)), x, scale, bias)
    expected, expected_grads = exact(x, scale, bias, dy)
    assert y.dtype == dtype
    for found, right in zip((y, *pullback(dy)), (expected, *expected_grads), strict=True):
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, right, rtol=0, atol=tolerance * np.abs(right).max())


def test_no_more_than_x_and_two_numbers_a_token_are_kept():
    x, scale, bias, _ = inputs(0.0, 1.0, "bfloat16")
    _, pullback = jax.vjp(lambda x: normalize(x, scale, bias, EPSILON, x.dtype), x)
    kept = [a for a in jax.tree.leaves(pullback) if a.size > FEATURES or a.dtype != jnp.float32]
    assert sorted((a.shape, a.dtype.name) for a in kept) == [(x.shape, "bfloat16")]


def test_parameters_are_those_of_flax():
    import flax.linen as nn

    x = jnp.ones((2, 3, 8), jnp.bfloat16)
    ours = LayerNorm(EPSILON, jnp.bfloat16).init(jax.random.key(0), x)
    flax = nn.LayerNorm(dtype=jnp.bfloat16).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours, flax)
    assert jax.tree.map(lambda a: a.dtype, ours) == jax.tree.map(lambda a: a.dtype, flax)
