"""From a checkpoint to what is deployed: `python -m vit_jax.export --checkpoint C --output DIR`.

Writes DIR/saved_model (stage tf), DIR/model.onnx (onnx) and DIR/model.engine (tensorrt), compares
each with the Flax model in float32, and fails where a precision's threshold is passed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import command, tensorflow_env
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.export.precisions import PRECISIONS
from vit_jax.export.stages import CONVERTERS, OUTPUTS, PIXELS, STAGES
from vit_jax.printable import printable

if TYPE_CHECKING:
    from vit_jax.export.pipeline import Export

_OF_HEAD = ("logits", "probabilities")
_EPILOG = """exit codes:
  0  every stage ran, and is as close to Flax as its precision allows
  1  every stage ran, but one is not close enough
  2  a flag, the checkpoint or this machine does not allow a stage; those before it are written
     (without --stages, one that this machine has not the packages for is named and left out)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser().parse_args(argv)
    _check(args)
    tensorflow_env.quiet()
    from vit_jax.export.pipeline import Export

    export = Export(
        Path(args.output),
        precision=PRECISIONS[args.precision],
        batch=args.batch,
        latency_seconds=args.latency_seconds,
    )
    if args.stages != ["tensorrt"]:
        _convert(args, export)
    if "tensorrt" in (args.stages or ()):
        export.build_engine()
    for failure in export.failures:
        line = f"error: {failure}; see {export.directory / 'parity.json'}"
        print(printable(line), file=sys.stderr)
    return 1 if export.failures else 0


def _convert(args: argparse.Namespace, export: "Export") -> None:
    from absl import logging

    from vit_jax.export.pipeline import Photographs

    # TensorFlow warns that gradients of the SavedModel are missing, which nobody asks for.
    logging.set_verbosity(logging.ERROR)
    pretrained = flags.load(args)
    if pretrained.has_untrained_head and args.outputs in _OF_HEAD:
        source = printable(pretrained.source)
        print(f"note: {source} has a head of zeros: its {args.outputs} mean nothing yet")
    export.convert(
        pretrained,
        stages=args.stages,
        converter=args.converter,
        outputs=args.outputs,
        layer=args.layer,
        include_preprocessing=args.include_preprocessing,
        free_size=args.free_size,
        in_graph=args.preprocessing == "in_graph",
        photographs=Photographs(
            dataset=args.dataset or "",
            split=args.split,
            data_dir=args.data_dir,
            directory=args.data or "",
            number=args.num_images,
        ),
    )


def build_parser(prog: str = "python -m vit_jax.export") -> command.Parser:
    """The flags of the command; `prog` is what its help calls it."""
    parser = command.Parser(prog=prog, description=__doc__, epilog=_EPILOG)
    flags.add_flags(parser, required=False)
    parser.add_argument("--output", required=True, metavar="DIR", help="what it writes goes there")
    parser.add_argument(
        "--stages",
        type=_stages,
        metavar="S,...",
        help=f"of {', '.join(STAGES)} [tf,onnx, or what this machine has the packages for]",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="of the ONNX file and of what is built from it [fp32]",
    )
    parser.add_argument(
        "--batch",
        default="1:8:64",
        metavar="MIN:OPT:MAX",
        help="batch sizes to time, and to build the engine for [1:8:64]",
    )
    parser.add_argument(
        "--outputs",
        choices=OUTPUTS,
        default="logits",
        help="features: the pooled ones; tokens: those of every patch, a class token or registers "
        "first; grid: those of the patches, in rows and columns; pixels: logits of every pixel, of "
        "a run of segmentation; boxes: scores and the box of every cell, of a run of detection "
        "[logits]",
    )
    parser.add_argument(
        "--layer",
        type=command.positive,
        metavar="N",
        help="whose result tokens or grid are, from 1 on [the last LayerNorm's]",
    )
    parser.add_argument(
        "--free_size",
        action="store_true",
        help="an ONNX file for images of any height and width, whose position embeddings are "
        "interpolated in the graph",
    )
    parser.add_argument(
        "--converter",
        choices=CONVERTERS,
        help="jax2tf for JAX 0.7.1, jax2onnx for newer ones, to the ONNX file alone [what is "
        "installed]",
    )
    parser.add_argument(
        "--include_preprocessing",
        action="store_true",
        help="take uint8 pixels; resizing and cropping are the caller's in any case",
    )
    parser.add_argument(
        "--preprocessing",
        choices=("outside", "in_graph"),
        default="outside",
        help="in_graph: an ONNX file for raw uint8 pixels of any height and width, which it "
        "resizes, crops and normalizes itself [outside]",
    )
    group = parser.add_argument_group("parity")
    group.add_argument(
        "--dataset",
        metavar="D",
        help="a data set of the model's classes to compare on and to tell the accuracy of: a TFDS "
        "name, folder:PATH or digits",
    )
    group.add_argument("--split", default="", help="in TFDS syntax [validation or test]")
    group.add_argument("--data_dir", default="", help="where TFDS looks [its default]")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="or photographs, searched recursively; accuracy is told if their "
        "directories have the names of the model's classes [synthetic images]",
    )
    group.add_argument(
        "--num_images", type=command.positive, default=256, metavar="N", help="at most [256]"
    )
    group.add_argument(
        "--latency_seconds",
        type=float,
        default=2.0,
        metavar="S",
        help="how long to time each batch size; 0 for not at all [2]",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises a UserError where flags do not go together."""
    if args.checkpoint is None and args.stages != ["tensorrt"]:
        raise UserError("--checkpoint is missing: only --stages tensorrt goes without")
    if args.data and args.dataset:
        raise UserError(f"--data {args.data} and --dataset {args.dataset}: give one of them")
    if args.dataset and args.outputs not in (*_OF_HEAD, PIXELS):
        raise UserError(
            f"--outputs {args.outputs} have no accuracy: use --data in place of --dataset"
        )
    if args.free_size and {"tf", "tensorrt"} & set(args.stages or ()):
        raise UserError("--free_size is for the ONNX file alone: use --stages onnx")
    if args.preprocessing == "in_graph":
        _check_in_graph(args)
    makes_onnx = args.stages is None or "onnx" in args.stages
    precision = PRECISIONS[args.precision]
    if precision.calibration_images and not (args.data or args.dataset) and makes_onnx:
        raise UserError(
            f"--precision {precision.name} needs photographs to take its scales from: add "
            "--data DIR"
        )
    if args.data and not os.path.isdir(args.data):
        raise UserError(f"--data {args.data} is not a directory")


def _check_in_graph(args: argparse.Namespace) -> None:
    if "tensorrt" in (args.stages or ()):
        raise UserError(
            "--preprocessing in_graph is for the ONNX file alone, as TensorRT has neither an "
            "antialiased Resize nor 64-bit floats: use --stages onnx, or leave it out and have "
            "Triton's ensemble in deploy/ prepare images"
        )
    if "tf" in (args.stages or ()):
        raise UserError("--preprocessing in_graph is for the ONNX file alone: use --stages onnx")
    for flag in ("free_size", "include_preprocessing"):
        if getattr(args, flag):
            raise UserError(
                f"--preprocessing in_graph goes without --{flag}: the graph resizes raw pixels to "
                "the model's own size, and normalizes them"
            )


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]


if __name__ == "__main__":
    command.run(main)
