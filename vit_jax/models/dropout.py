"""Dropout (Srivastava et al., 2014), from few random bits."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

_BITS = 16


class Dropout(nn.Dropout):
    """Dropout as flax.linen has it, but from 16 random bits an element in place of 32 and a float.

    Threefry, whose numbers are the same for any number of devices, makes 32 at a time, and that is
    what dropout costs. The rate is a multiple of 2^-16, at most 2^-17 from what is asked for; what
    stays is divided by exactly its probability.
    """

    @nn.compact
    def __call__(
        self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None
    ) -> Array:
        """Maps inputs [..., features] to the same shape.

        Args:
            inputs: of any rank but 0.
            deterministic: whether nothing is dropped.
            rng: a key; None for the "dropout" RNG.
        """
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        dropped = round(self.rate * 2**_BITS)
        if not dropped or deterministic:
            return inputs
        bits = random_bits(self.make_rng("dropout") if rng is None else rng, inputs.shape)
        # Of a product and a bool, the bool alone is kept for the backward pass.
        stay = jnp.asarray(2**_BITS / (2**_BITS - dropped), inputs.dtype)
        return jnp.where(bits >= dropped, inputs * stay, jnp.zeros((), inputs.dtype))


def random_bits(rng: Array, shape: tuple[int, ...]) -> Array:
    """Draws uint16 numbers of a shape, two from each number of 32 bits.

    Args:
        rng: a key; the result is a pure function of it.
        shape: of rank 1 at least.
    """
    *others, features = shape
    pairs = jax.random.bits(rng, (*others, math.ceil(features / 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(pairs, jnp.uint16)
    return halves.reshape(*others, -1)[..., :features]
