"""Serves an exported model over HTTP: `python -m vit_jax.serving --model DIR`."""

import argparse
import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import command
from vit_jax.errors import UserError
from vit_jax.printable import printable

if TYPE_CHECKING:
    from vit_jax.serving.attention import Attention
    from vit_jax.serving.served import Served

_INSTALL = "pip install '.[serve]'"

_EPILOG = """examples:
  %(prog)s --model deploy/b16
  %(prog)s --model deploy/b16 --checkpoint B_16 --port 0
  %(prog)s --model runs/flowers
  curl -F image=@photo.jpg 'http://127.0.0.1:8000/predict?top_k=3'

routes:
  /            a page on which one drops a picture
  /predict     POST an image, or several as a form: classes with names and probabilities
  /logits      POST likewise: what the model gives; of an export of features /features, and so on
  /attention   POST an image: what the model looks at, as a PNG; where its weights are known
  /model       input, preprocessing, classes, SHA-256
  /health      whether it lives, and is ready
  /metrics     for Prometheus

exit codes:
  0  ended by SIGTERM or Ctrl-C; what was accepted has been answered
  2  a flag or the model is wrong, or the port is taken"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser("python -m vit_jax.serving").parse_args(argv)
    try:
        from vit_jax.serving.app import Options, create_app
        from vit_jax.serving.server import bind, serve, url
    except ImportError as error:
        raise UserError(f"serving needs more packages ({error}): {_INSTALL}") from error
    warnings.simplefilter("ignore")  # PIL warns of odd metadata, from several threads.
    with bind(args.host, args.port) as listening:
        served, attention = _load(args)
        with contextlib.closing(served):
            options = Options(
                max_batch=min(args.max_batch, served.largest or args.max_batch),
                max_delay_ms=args.max_delay_ms,
                max_queue=max(args.max_queue, args.max_files),
                max_bytes=args.max_bytes,
                max_files=args.max_files,
                upload_seconds=args.upload_seconds,
            )
            size = "x".join(map(str, served.preprocessing.image_shape))
            print(f"{served.name}: {size} to {served.output}, {served.facts['runtime']}")
            print(f"listening on {url(listening)}", flush=True)
            serve(create_app(served, options, attention), listening, args.upload_seconds)
    return 0


def _load(args: argparse.Namespace) -> "tuple[Served, Attention | None]":
    """The model, and what draws its attention where its weights are known."""
    from vit_jax.checkpoints.remote import is_remote_name
    from vit_jax.serving.served import is_exported, load

    path = Path(args.model)
    exported = is_exported(path) or (path.is_dir() and args.checkpoint is not None)
    if not exported and args.checkpoint is not None:
        raise UserError(
            f"--model {args.model} is no export: leave out --checkpoint to serve it as weights"
        )
    if not exported and not is_remote_name(args.model) and not path.exists():
        raise UserError(
            f"--model {args.model} does not exist: name the folder that vit-jax export --output "
            "wrote, or weights as predict --checkpoint takes them"
        )
    served = load(path, args.device) if exported else None
    if served is not None and args.checkpoint is None:
        return served, None
    if served is None and args.device is not None:
        raise UserError(f"--device {args.device} is for ONNX files: JAX takes what it finds")
    command.keep_programs()
    from vit_jax.checkpoints.pretrained import load_pretrained
    from vit_jax.serving.attention import Attention
    from vit_jax.serving.weights import from_weights

    pretrained = load_pretrained(args.checkpoint or args.model)
    print(printable(f"compiling {pretrained.source}"), flush=True)
    if served is not None:
        return served, Attention(pretrained, served)
    served = from_weights(pretrained, args.model, args.max_batch)
    try:
        return served, Attention(pretrained, served)
    except UserError as error:
        print(f"attention is left out: {error}", flush=True)
        return served, None


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(
        prog=prog,
        description="Serves an exported model over HTTP, to programs and on a page.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="what vit-jax export --output wrote: its engine where TensorRT is, else its ONNX "
        "file; or one of these files; or weights, a run, a file or a name, which JAX runs",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="C",
        help="the weights that were exported, to show what the model looks at, which JAX computes",
    )
    parser.add_argument(
        "--device", metavar="D", help="of an ONNX file: cpu, cuda or tensorrt, or cuda:1 [cpu]"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for other machines too [127.0.0.1]"
    )
    parser.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="0 takes a free one [8000]"
    )
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--max_batch",
        type=command.positive,
        default=8,
        metavar="N",
        help="images that the model runs at once, of as many requests as there are [8]",
    )
    group.add_argument(
        "--max_delay_ms",
        type=_milliseconds,
        default=5.0,
        metavar="MS",
        help="for which an image waits for others [5]",
    )
    group = parser.add_argument_group("bounds")
    group.add_argument(
        "--max_queue",
        type=command.positive,
        default=256,
        metavar="N",
        help="images in work; more are answered by 503 [256]",
    )
    group.add_argument(
        "--max_bytes",
        type=command.positive,
        default=32 * 2**20,
        metavar="N",
        help="of a request, and 16 times as many of all that arrive at a time [33554432]",
    )
    group.add_argument(
        "--max_files", type=command.positive, default=32, metavar="N", help="of a request [32]"
    )
    group.add_argument(
        "--upload_seconds",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="for the body of a request to arrive [30]",
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 65535")
    return int(text)


def _milliseconds(text: str) -> float:
    return _between(text, 0, 10_000)


def _seconds(text: str) -> float:
    return _between(text, 0.1, 3600)


def _between(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
    return value


if __name__ == "__main__":
    command.run(main)
