"""Draws what a model looks at and learns: `python -m vit_jax.analysis all --checkpoint C ...`."""

import argparse
import contextlib
import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_jax import command
from vit_jax.analysis.output import Output
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.printable import printable

if TYPE_CHECKING:
    from vit_jax.analysis.curves import Panel
    from vit_jax.checkpoints.pretrained import Pretrained

_OF_IMAGES = ("attention", "rollout", "distance", "intermediates")
_OF_WEIGHTS = ("filters", "positions")
_OF_RUNS = ("curves",)

_EPILOG = """analyses, each of which writes pictures (PNG) and their numbers (NPZ):
  attention      what every head of every layer looks at, two files an image
  rollout        attention rollout over all layers: a heat map, and a mask (Appendix D.8)
  distance       mean attention distance in pixels by layer and head (Appendix D.7)
  filters        principal components of the filters that see the image (Figure 7)
  positions      similarity of the position embeddings (Figure 7); needs no images, as filters
  intermediates  the tokens after every layer, two files an image
  curves         the training of a run, from its metrics.jsonl; needs no weights

examples:
  %(prog)s all --checkpoint runs/flowers --images photos/ --output analysis --html
  %(prog)s rollout --checkpoint B_16 --images photos/ --output rollout
  %(prog)s filters --checkpoint ViT-B_16 --output figure7
  %(prog)s curves --run runs/digits --output curves

exit codes:
  0  everything was written
  1  some images could not be read; each is one line on stderr, the others were done
  2  none could be read, or a flag or the checkpoint is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parse(argv)
    warnings.simplefilter("ignore")  # PIL warns of odd metadata and large sizes.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It tells of a home without a cache.
    names = (args.analysis,)
    if args.analysis == "all":
        names = _OF_IMAGES + _OF_WEIGHTS + (_OF_RUNS if args.run else ())
    panels = _read_panels(Path(args.run), args.curves_wanted) if "curves" in names else []
    output = Output(Path(args.output), args.dpi, args.html)
    code, title, facts = 0, args.run, {"Run": args.run}
    if of_model := [name for name in names if name not in _OF_RUNS]:
        code, title, facts = _of_model(args, of_model, output)
    if panels:
        _curves(panels, args.smoothing, output)
    output.finish(title, facts)
    return code


def _of_model(
    args: argparse.Namespace, names: Sequence[str], output: Output
) -> tuple[int, str, dict[str, str]]:
    """The analyses of a model; returns the exit code, and what the page says of the model."""
    command.keep_programs()
    from vit_jax.data.image_files import find_images  # With PIL: --help should not wait for it.

    pretrained = flags.load(args)
    files = find_images(args.images, pretrained.preprocessing.channels)
    names = _of_this(pretrained, names, asked=args.analysis)
    output.make()
    if "filters" in names:
        _filters(pretrained, output)
    if "positions" in names:
        _positions(pretrained, output)
    of_images = [name for name in names if name in _OF_IMAGES]
    code = 0
    if of_images:
        from vit_jax.analysis.of_images import analyze_images

        done = analyze_images(pretrained, files, args.batch_size, of_images, output)
        code = 0 if done == len(files) else 1 if done else 2
    elif files:
        print("the images are not read: no analysis of them is left", flush=True)
    if output.page is None:
        return code, "", {}
    from vit_jax.analysis import page

    title = f"{Path(args.checkpoint).name}: what it looks at and what it has learned"
    return code, title, page.facts_of(pretrained, args.checkpoint)


def _of_this(pretrained: "Pretrained", names: Sequence[str], asked: str) -> list[str]:
    """The analyses that a model has something for; of `all`, a line says why of each other."""
    found = []
    for name in names:
        try:
            _check(name, pretrained)
            found.append(name)
        except UserError as error:
            if asked != "all":
                raise
            _leave_out(name, error)
    return found


def _check(name: str, pretrained: "Pretrained") -> None:
    """Traces what an analysis begins with, and computes nothing."""
    import jax

    from vit_jax.analysis import embeddings, intermediates
    from vit_jax.models import create_model

    if name == "filters":
        embeddings.rgb_filters(pretrained.params)
        return
    images = jax.ShapeDtypeStruct((1, *pretrained.preprocessing.image_shape), np.float32)
    begin = intermediates.position_embedding if name == "positions" else intermediates.layer_tokens
    jax.eval_shape(partial(begin, create_model(pretrained.model)), pretrained.params, images)


def _leave_out(name: str, error: UserError) -> None:
    print(printable(f"without {name}: {error}"), flush=True)


def _read_panels(run: Path, wanted: bool) -> "list[Panel]":
    """The curves of a run; none, and a line that says why, where nobody has asked for them."""
    from vit_jax.analysis import curves

    try:
        return curves.read_panels(run)
    except UserError as error:
        if wanted:
            raise
        _leave_out("curves", error)
        return []


def _curves(panels: "list[Panel]", smoothing: float | None, output: Output) -> None:
    from vit_jax.analysis import captions, curves, plots

    smoothing = curves.default_smoothing(panels) if smoothing is None else smoothing
    output.make()
    figure = plots.curves(panels, smoothing)
    lines = {f"{panel.name}_{kind}": each for panel in panels for kind, each in panel.curves()}
    output.save("curves", figure, **{name: np.stack(curve) for name, curve in lines.items()})
    output.show("How it was trained", captions.of_curves(panels, smoothing), figure, wide=True)


def _filters(pretrained: "Pretrained", output: Output) -> None:
    from vit_jax.analysis import captions, embeddings, plots

    kernel = embeddings.rgb_filters(pretrained.params)
    components, shares = embeddings.principal_filters(kernel)
    figure = plots.filter_grid(embeddings.to_rgb(components), shares.sum())
    output.save("filters", figure, components=components, share_of_variance=shares)
    output.show("Filters", captions.of_filters(len(components), shares.sum()), figure)


def _positions(pretrained: "Pretrained", output: Output) -> None:
    import jax

    from vit_jax.analysis import captions, embeddings, plots
    from vit_jax.analysis.intermediates import position_embedding
    from vit_jax.analysis.of_images import grid_of
    from vit_jax.models import create_model

    images = np.zeros((1, *pretrained.preprocessing.image_shape), np.float32)
    embed = jax.jit(position_embedding, static_argnums=0)
    embedding = embed(create_model(pretrained.model), pretrained.params, images)
    similarity = embeddings.position_similarity(embedding, grid_of(pretrained)[0])
    figure = plots.similarity_grid(similarity)
    output.save("positions", figure, similarity=similarity)
    output.show("Position embeddings", captions.of_positions(similarity), figure)


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(
        prog=prog,
        description="Draws what a model looks at and has learned, as pictures and their numbers.",
        epilog=_EPILOG,
    )
    parser.add_argument("analysis", choices=[*_OF_IMAGES, *_OF_WEIGHTS, *_OF_RUNS, "all"])
    flags.add_flags(parser, required=False)
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE_OR_DIR",
        help="directories are searched recursively",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the files go; made if missing"
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help="also gather the pictures on a page, DIR/index.html, that needs no other file",
    )
    parser.add_argument(
        "--run",
        metavar="WORKDIR",
        help="whose training curves to draw [the checkpoint, where that is a run]",
    )
    parser.add_argument(
        "--smoothing",
        type=_share,
        metavar="S",
        help="constant of the exponential mean of training curves; 0 smooths nothing [0.8 for "
        "curves of 50 points or more, 0 for others]",
    )
    parser.add_argument(
        "--batch_size",
        type=command.positive,
        default=8,
        metavar="N",
        help="images at a time; less takes less memory [8]",
    )
    parser.add_argument(
        "--dpi", type=command.positive, default=110, metavar="N", help="of the pictures [110]"
    )
    return parser


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")


def _has_metrics(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = build_parser("python -m vit_jax.analysis").parse_args(argv)
    if args.analysis not in (*_OF_WEIGHTS, *_OF_RUNS) and not args.images:
        raise UserError(f"{args.analysis} looks at images: give some with --images")
    if args.analysis not in _OF_RUNS and not args.checkpoint:
        raise UserError(f"{args.analysis} looks at a model: give it with --checkpoint")
    args.curves_wanted = args.run is not None or args.analysis in _OF_RUNS
    if args.run is None and args.checkpoint and _has_metrics(Path(args.checkpoint)):
        args.run = args.checkpoint
    if args.analysis in _OF_RUNS and not args.run:
        raise UserError("curves are of a run: give its workdir with --run")
    return args


if __name__ == "__main__":
    command.run(main)
