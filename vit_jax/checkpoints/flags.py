"""The flags by which every command takes a checkpoint."""

import argparse

from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.models.vit import GELU


def add_flags(parser: argparse.ArgumentParser, name: str = "--checkpoint") -> None:
    """Adds the flag `name`, and those that tell what a checkpoint cannot."""
    parser.add_argument(
        name,
        required=True,
        metavar="C",
        dest="checkpoint",
        help="a run's workdir, a file or folder of weights, or a name such as ViT-B_16 or "
        "hf:OWNER/NAME",
    )
    group = parser.add_argument_group("what a checkpoint may leave open, or have wrong")
    group.add_argument("--num_heads", type=int, metavar="N", help="of the attention")
    group.add_argument("--gelu", choices=list(GELU), help="form of the GELU")
    group.add_argument("--layer_norm_epsilon", type=float, metavar="X")
    group.add_argument(
        "--image_size", type=int, metavar="N", help="position embeddings are interpolated to it"
    )


def load(args: argparse.Namespace) -> Pretrained:
    """Reads the checkpoint that the flags name.

    Raises:
        UserError: as `load_pretrained`.
    """
    return load_pretrained(
        args.checkpoint,
        num_heads=args.num_heads,
        gelu=args.gelu,
        layer_norm_epsilon=args.layer_norm_epsilon,
        image_size=args.image_size,
    )
