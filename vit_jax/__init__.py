"""Vision Transformers in JAX/Flax, faithful to "An Image is Worth 16x16 Words" (ICLR 2021)."""

__version__ = "0.1.0"
