"""Checks of what this machine computes, and of what it has: `python -m vit_jax.doctor`."""
