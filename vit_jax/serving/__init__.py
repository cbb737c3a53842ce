"""A model over HTTP: `python -m vit_jax.serving`, or `vit-jax serve`."""
