"""Converts weights: `python -m vit_jax.convert --from C --to PATH --format FORMAT`."""

from collections.abc import Sequence

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.printable import printable

# Those of `checkpoints.save.FORMATS`, which imports JAX, for which --help should not wait.
FORMATS = ("official", "timm", "torchvision", "huggingface")

_EPILOG = """examples:
  %(prog)s --from runs/digits --to digits.npz --format official
  %(prog)s --from B_16 --to b16-timm --format timm
  %(prog)s --from hf:google/vit-base-patch16-224 --to b16.npz --format official"""


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(
        prog=prog,
        description="Converts weights between formats, and reads the result again to compare.",
        epilog=_EPILOG,
    )
    flags.add_flags(parser, "--from")
    parser.add_argument("--to", required=True, metavar="PATH", help="a file or folder to be made")
    parser.add_argument("--format", required=True, choices=FORMATS, help="of what is written")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser("python -m vit_jax.convert").parse_args(argv)
    from vit_jax.checkpoints.conversion import NUM_IMAGES, convert, reader_notes

    source = flags.load(args)
    of_params, of_logits = convert(source, args.to, args.format)
    print(printable(f"from  {source.source}"))
    print(printable(f"to    {args.to} ({args.format})"))
    print(f"largest difference of any parameter: {of_params:g}")
    print(f"largest difference of the logits on {NUM_IMAGES} random images: {of_logits:g}")
    for note in reader_notes(source, args.format):
        print(f"note: {note}")
    if source.segmentation is not None:
        print("note: the decoder of pixels is left out: the run's checkpoints alone have it")
    if source.detection is not None:
        print("note: the head of the detector is left out: the run's checkpoints alone have it")
    return 0


if __name__ == "__main__":
    command.run(main)
