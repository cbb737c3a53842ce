"""Whether this machine computes what it should, and what it has: `python -m vit_jax.doctor`."""
