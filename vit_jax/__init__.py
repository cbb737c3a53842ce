"""Vision Transformers in JAX/Flax, faithful to "An Image is Worth 16x16 Words" (ICLR 2021)."""

from vit_jax.xla_flags import avoid_stale_weights

__version__ = "0.1.0"

avoid_stale_weights()
