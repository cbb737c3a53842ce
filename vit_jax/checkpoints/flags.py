"""The flags of a command that reads a model, one set for all of them."""

import argparse
from typing import TYPE_CHECKING

from vit_jax import command

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained

_OVERRIDES = ("num_heads", "gelu", "layer_norm_epsilon", "image_size")


def add_flags(
    parser: argparse.ArgumentParser, name: str = "--checkpoint", required: bool = True
) -> None:
    """Adds the flag of the checkpoint and those that override what is read from it.

    Args:
        parser: what to add to.
        name: of the checkpoint's flag.
        required: whether the command needs it in any case.
    """
    group = parser.add_argument_group("the model")
    group.add_argument(
        name,
        dest="checkpoint",
        required=required,
        metavar="C",
        help="a run's directory, a file or folder of weights in Google's, timm's or Hugging Face's "
        "format, or a published name (B_16, ViT-B_16, hf:OWNER/NAME)",
    )
    group.add_argument(
        "--image_size",
        type=command.image_size,
        metavar="PIXELS",
        help="side of the input, or HEIGHTxWIDTH; position embeddings are interpolated [the "
        "checkpoint's]",
    )
    unknown = "where the checkpoint does not say"
    group.add_argument("--num_heads", type=command.positive, metavar="N", help=unknown)
    group.add_argument("--gelu", choices=["tanh", "erf"], help=unknown)
    group.add_argument("--layer_norm_epsilon", type=float, metavar="EPSILON", help=unknown)


def load(args: argparse.Namespace) -> "Pretrained":
    """Loads the model that the flags name; see `load_pretrained`, also for what it raises."""
    # JAX takes half a second to import, for which a wrong flag and --help should not wait.
    from vit_jax.checkpoints.pretrained import load_pretrained

    values = {name: getattr(args, name) for name in _OVERRIDES}
    overrides = {name: value for name, value in values.items() if value is not None}
    return load_pretrained(args.checkpoint, **overrides)
