"""`python -m vit_jax COMMAND`: the command line where its script is not on the PATH."""

from vit_jax.cli import main

main()
