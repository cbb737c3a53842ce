import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.dropout import Dropout, random_bits

KEY = jax.random.key(0)


def drop(x, rate, key=KEY, deterministic=False):
    return Dropout(rate).apply({}, x, deterministic, rngs={"dropout": key})


@pytest.mark.parametrize("features", [64, 63])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_that_is_asked_for_is_dropped_and_the_rest_keeps_the_sum(rate, features):
    x = jnp.ones((4096, features))
    y = np.asarray(drop(x, rate), np.float64)
    assert np.unique(y).size == 2 and y.min() == 0
    assert y.max() == pytest.approx(1 / (1 - rate), rel=1e-4)
    # Five standard deviations of a mean of so many draws.
    deviation = np.sqrt(rate * (1 - rate) / y.size)
    assert np.mean(y == 0) == pytest.approx(rate, abs=5 * deviation)
    rows, columns = (np.mean(y == 0, axis=axis) for axis in (1, 0))
    # Neither neighbors nor halves of one number go together.
    assert np.std(rows) == pytest.approx(np.sqrt(rate * (1 - rate) / features), rel=0.1)
    assert np.abs(columns - rate).max() < 5 * np.sqrt(rate * (1 - rate) / len(y))
    neighbors = np.corrcoef((y[:, :-1] == 0).ravel(), (y[:, 1:] == 0).ravel())[0, 1]
    assert abs(neighbors) < 5 / np.sqrt(y.size)


@pytest.mark.parametrize("rate", [0.25, 0.1])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", 2e-5), ("bfloat16", 2**-7)])
def test_it_is_that_of_flax_but_for_the_draws(rate, dtype, precision):
    x = jax.random.uniform(jax.random.key(7), (64, 50, 40), minval=0.5, maxval=1.5).astype(dtype)
    theirs, ours = nn.Dropout(rate).apply({}, x, False, rngs={"dropout": KEY}), drop(x, rate)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    x, ours, theirs = (np.asarray(y, np.float64) for y in (x, ours, theirs))
    both = (ours != 0) & (theirs != 0)
    # 0.1 is no multiple of 2^-16, and 16 bits are rounded.
    np.testing.assert_allclose(ours[both], theirs[both], rtol=precision)
    np.testing.assert_allclose(ours[ours != 0], x[ours != 0] / (1 - rate), rtol=precision)
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    for y in (ours, theirs):
        assert np.mean(y == 0) == pytest.approx(rate, abs=5 * deviation)
        # The expectation is x.
        error = np.sqrt(rate / (1 - rate) * np.square(x).sum())
        assert abs((y - x).sum()) < 5 * error
    # Each element is drawn for itself: two draws agree as often as chance has it.
    assert both.mean() == pytest.approx((1 - rate) ** 2, abs=0.006)


def test_all_bits_are_fair():
    bits = np.asarray(random_bits(KEY, (512, 33)))
    assert bits.dtype == np.uint16 and bits.shape == (512, 33)
    for bit in range(16):
        assert np.mean(bits >> bit & 1) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(bits.size))


def test_the_key_decides_and_nothing_is_dropped_without_a_rate_or_in_evaluation():
    x = jnp.ones((8, 32), jnp.bfloat16)
    first = drop(x, 0.5)
    assert first.dtype == x.dtype
    np.testing.assert_array_equal(drop(x, 0.5), first)
    assert np.any(drop(x, 0.5, jax.random.key(1)) != first)
    assert drop(x, 0.0) is x
    assert drop(x, 0.5, deterministic=True) is x


def test_gradients_pass_where_the_values_did():
    x = jax.random.normal(KEY, (16, 10))
    y, pullback = jax.vjp(lambda x: drop(x, 0.25), x)
    (dx,) = pullback(jnp.ones_like(y))
    np.testing.assert_allclose(dx, np.where(np.asarray(y) == 0, 0, 4 / 3), rtol=1e-6)
