"""Draws what a model looks at and learns: `python -m vit_jax.analysis all --checkpoint C ...`."""

import argparse
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.files import atomic_write, make_folder
from vit_jax.image_size import sides
from vit_jax.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vit_jax.analysis.curves import Panel
    from vit_jax.analysis.page import Page
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

# As many as rollout.png shows; rollout.npz has all.
_SHOWN = 24
_TOP = 5
_LONGEST_LABEL = 36  # letters beside a probability, above an image


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parse(argv)
    warnings.simplefilter("ignore")  # PIL warns of odd metadata and large sizes.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It tells of a home without a cache.
    names = (args.analysis,)
    if args.analysis == "all":
        names = _OF_IMAGES + _OF_WEIGHTS + (_OF_RUNS if args.run else ())
    panels = _read_panels(Path(args.run), args.curves_wanted) if "curves" in names else []
    output = _Output(Path(args.output), args.dpi, args.html)
    code, title, facts = 0, args.run, {"Run": args.run}
    if set(names) - set(_OF_RUNS):
        code, title, facts = _of_model(args, names, output)
    if panels:
        _curves(panels, args.smoothing, output)
    output.finish(title, facts)
    return code


def _of_model(
    args: argparse.Namespace, names: Sequence[str], output: "_Output"
) -> tuple[int, str, dict[str, str]]:
    """The analyses of a model; returns the exit code, and what the page says of the model."""
    command.keep_programs()
    from vit_jax.data.image_files import find_images  # With PIL: --help should not wait for it.

    files = find_images(args.images)
    pretrained = flags.load(args)
    output.make()
    if "filters" in names:
        _filters(pretrained, output)
    if "positions" in names:
        _positions(pretrained, output)
    of_images = [name for name in names if name in _OF_IMAGES]
    code = 0
    if of_images:
        done = _analyze_images(pretrained, files, args.batch_size, of_images, output)
        code = 0 if done == len(files) else 1 if done else 2
    if output.page is None:
        return code, "", {}
    from vit_jax.analysis import page

    title = f"{Path(args.checkpoint).name}: what it looks at and what it has learned"
    return code, title, page.facts_of(pretrained, args.checkpoint)


class _Output:
    """Writes a figure and its arrays, each whole or not at all, and says so.

    Attributes:
        page: that gathers the pictures; None unless it is asked for.
    """

    def __init__(self, directory: Path, dpi: int, html: bool):
        self._directory, self._dpi = directory, dpi
        self.page: Page | None = None
        if html:
            from vit_jax.analysis import page

            self.page = page.Page()

    def make(self) -> None:
        """Makes the directory."""
        make_folder(self._directory)

    def save(self, name: str, figure: "Figure", **arrays: Any) -> None:
        """Writes NAME.png and NAME.npz."""
        png, npz = (self._directory / f"{name}.{suffix}" for suffix in ("png", "npz"))
        with atomic_write(npz) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=self._dpi)
        for path in (png, npz):
            print(printable(str(path)), flush=True)

    def show(self, title: str, caption: str, figure: "Figure", **options: Any) -> None:
        """Adds a picture to the page, see `Page.add`."""
        if self.page is not None:
            self.page.add(title, caption, figure, **options)

    def finish(self, title: str, facts: Mapping[str, str]) -> None:
        """Writes the page, unless there is nothing to see."""
        if self.page is not None and (self.page.images or self.page.of_model):
            print(printable(str(self.page.write(self._directory, title, facts))), flush=True)


def _read_panels(run: Path, wanted: bool) -> "list[Panel]":
    """The curves of a run; none, and a line that says why, where nobody has asked for them."""
    from vit_jax.analysis import curves

    try:
        return curves.read_panels(run)
    except UserError as error:
        if wanted:
            raise
        print(printable(f"curves are left out: {error}"), flush=True)
        return []


def _curves(panels: "list[Panel]", smoothing: float | None, output: _Output) -> None:
    from vit_jax.analysis import captions, curves, plots

    smoothing = curves.default_smoothing(panels) if smoothing is None else smoothing
    output.make()
    figure = plots.curves(panels, smoothing)
    lines = {f"{panel.name}_{kind}": each for panel in panels for kind, each in panel.curves()}
    output.save("curves", figure, **{name: np.stack(curve) for name, curve in lines.items()})
    output.show("How it was trained", captions.of_curves(panels, smoothing), figure, wide=True)


def _filters(pretrained: "Pretrained", output: _Output) -> None:
    from vit_jax.analysis import captions, embeddings, plots

    kernel = embeddings.rgb_filters(pretrained.params)
    components, shares = embeddings.principal_filters(kernel)
    figure = plots.filter_grid(embeddings.to_rgb(components), shares.sum())
    output.save("filters", figure, components=components, share_of_variance=shares)
    output.show("Filters", captions.of_filters(len(components), shares.sum()), figure)


def _positions(pretrained: "Pretrained", output: _Output) -> None:
    import jax

    from vit_jax.analysis import captions, embeddings, plots
    from vit_jax.analysis.intermediates import position_embedding
    from vit_jax.models import create_model

    images = np.zeros((1, *sides(pretrained.preprocessing.image_size), 3), np.float32)
    embed = jax.jit(position_embedding, static_argnums=0)
    embedding = embed(create_model(pretrained.model), pretrained.params, images)
    similarity = embeddings.position_similarity(embedding, _grid(pretrained)[0])
    figure = plots.similarity_grid(similarity)
    output.save("positions", figure, similarity=similarity)
    output.show("Position embeddings", captions.of_positions(similarity), figure)


def _grid(pretrained: "Pretrained") -> tuple[tuple[int, int], int]:
    """Rows and columns of patches, and the side of one in pixels."""
    from vit_jax.models import create_model

    side = create_model(pretrained.model).downsampling
    height, width = sides(pretrained.preprocessing.image_size)
    return (height // side, width // side), side


def _analyze_images(
    pretrained: "Pretrained",
    files: Sequence[str],
    batch_size: int,
    names: Sequence[str],
    output: _Output,
) -> int:
    """The analyses that run the model, all in one pass; returns how many images it had."""
    from vit_jax.data.image_files import read_batches
    from vit_jax.inference import top

    grid, side = _grid(pretrained)
    observe = _observer(pretrained, names, grid, side)
    knows_classes = pretrained.model["num_classes"] and not pretrained.has_untrained_head
    seen: Counter[str] = Counter()
    kept = _Kept()
    for found, batch in read_batches(files, pretrained.preprocessing, batch_size, command.report):
        # Only as many rows leave the device as there are images.
        observed = {name: np.asarray(x[: len(found)]) for name, x in observe(batch).items()}
        for index, file in enumerate(found):
            row = {name: x[index] for name, x in observed.items()}
            seen[stem := Path(file).stem] += 1
            image = _Image(
                file,
                stem if seen[stem] == 1 else f"{stem}_{seen[stem]}",
                pretrained.preprocessing.to_pixels(batch[index]),
                top(row["logits"], pretrained.class_names, pretrained.loss, _TOP)
                if knows_classes
                else [],
            )
            kept.keep(image, row)
            _analyze_image(image, row, grid, side, output)
    if kept.files and "rollout" in names:
        _rollout(kept, output)
    if kept.files and "distance" in names:
        num_tokens = observed["num_tokens"][0]
        _distance(kept, grid, side, num_tokens, output)
    return len(kept.files)


class _Image(NamedTuple):
    """An image, the name of its own files, its pixels [height, width, 3], and its classes."""

    file: str
    name: str
    pixels: np.ndarray
    predictions: list[dict[str, Any]]


class _Kept:
    """The parts of every image that are left for the pictures of all."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.shown: list[_Image] = []
        self.rollout: list[np.ndarray] = []
        self.distance: list[np.ndarray] = []

    def keep(self, image: _Image, row: Mapping[str, np.ndarray]) -> None:
        """Takes what is needed of an image and of what was observed of it."""
        self.files.append(image.file)
        if len(self.shown) < _SHOWN:
            self.shown.append(image)
        for name in ("rollout", "distance"):
            if name in row:
                getattr(self, name).append(row[name])


def _analyze_image(
    image: _Image,
    row: Mapping[str, np.ndarray],
    grid: tuple[int, int],
    side: int,
    output: _Output,
) -> None:
    """Draws what one image has of its own."""
    page = output.page
    shown = page is not None and page.begin(image.file, image.predictions)
    if shown and "rollout" in row:
        from vit_jax.analysis import captions, plots

        figure = plots.rollouts(image.pixels[None], row["rollout"][None])
        caption = captions.of_rollout(row["rollout"], side)
        output.show("Attention rollout", caption, figure, file=image.file)
    if "attention" in row:
        _attention(image, row["attention"], grid, output, shown)
    if "intermediates" in row:
        _intermediates(image, row["intermediates"], grid, output, shown)


def _rollout(kept: _Kept, output: _Output) -> None:
    import jax.numpy as jnp

    from vit_jax.analysis import plots
    from vit_jax.analysis.attention import to_mask

    maps, pixels = np.stack(kept.rollout), np.stack([image.pixels for image in kept.shown])
    lines = [(Path(image.file).name, _in_words(image.predictions)) for image in kept.shown]
    figure = plots.rollouts(pixels, maps[: len(pixels)], lines)
    masks = np.asarray(to_mask(jnp.asarray(maps), pixels.shape[1:3]))
    output.save("rollout", figure, files=np.array(kept.files), rollout=maps, mask=masks)


def _in_words(predictions: Sequence[Mapping[str, Any]]) -> str:
    """The most probable class with its probability; "" where no class is known."""
    from vit_jax.analysis.page import label_of

    if not predictions:
        return ""
    label, probability = label_of(predictions[0]), predictions[0]["probability"]
    if len(label) > _LONGEST_LABEL:
        label = f"{label[: _LONGEST_LABEL - 1]}…"
    return f"{label} {probability:.1%}"


def _distance(
    kept: _Kept, grid: tuple[int, int], side: int, num_tokens: int, output: _Output
) -> None:
    from vit_jax.analysis import captions, plots
    from vit_jax.analysis.attention import uniform_distance

    each = np.stack(kept.distance)
    mean = each.astype(np.float64).mean(axis=0)
    uniform = uniform_distance(grid, side, num_tokens)
    figure = plots.attention_distances(mean, uniform, len(each))
    arrays = {"distance": mean, "distance_of_images": each, "uniform": uniform}
    output.save("distance", figure, files=np.array(kept.files), **arrays)
    output.show("Attention distance", captions.of_distances(mean, uniform), figure)


def _observer(
    pretrained: "Pretrained", names: Sequence[str], grid: tuple[int, int], side: int
) -> Callable[[np.ndarray], dict[str, Any]]:
    """A function from a batch of images to what the analyses need of it, [batch, ...] each."""
    import jax
    import jax.numpy as jnp

    from vit_jax.analysis.attention import attention_distance, on_patches, rollout
    from vit_jax.analysis.intermediates import layer_tokens, logits_and_attention
    from vit_jax.models import create_model

    # Without scan_layers, a layer's attention weights need not outlive what is made of them.
    model = create_model(pretrained.model)
    of_weights = {
        "attention": lambda weights: weights,
        "rollout": lambda weights: on_patches(rollout(weights), grid),
        "distance": lambda weights: attention_distance(weights, grid, side),
    }

    def observe(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        logits, weights = logits_and_attention(model, params, images)
        observed = {name: of_weights[name](weights) for name in names if name in of_weights}
        observed |= {"logits": logits, "num_tokens": jnp.full(len(images), weights.shape[-1])}
        if "intermediates" in names:
            observed["intermediates"] = layer_tokens(model, params, images)
        return observed

    compiled, params = jax.jit(observe), jax.device_put(pretrained.params)
    return lambda images: compiled(params, images)


def _attention(
    image: _Image, weights: np.ndarray, grid: tuple[int, int], output: _Output, shown: bool
) -> None:
    import jax.numpy as jnp

    from vit_jax.analysis import captions, plots
    from vit_jax.analysis.attention import on_patches

    maps = np.asarray(on_patches(jnp.asarray(weights), grid))
    has_class_token = weights.shape[-1] > grid[0] * grid[1]
    who = "the class token" if has_class_token else "the mean of the patches"
    figure = plots.head_maps(image.pixels, maps, f"Attention of {who} to every patch")
    output.save(f"attention_{image.name}", figure, image=np.array(image.file), weights=weights)
    if shown:
        options = {"file": image.file, "closed": True}
        output.show("Every head of every layer", captions.of_heads(who), figure, **options)


def _intermediates(
    image: _Image, tokens: np.ndarray, grid: tuple[int, int], output: _Output, shown: bool
) -> None:
    from vit_jax.analysis import captions, plots

    patches = tokens[:, -grid[0] * grid[1] :].reshape(len(tokens), *grid, -1)
    title = "Patches after every layer: the first three principal components as colors"
    figure = plots.layer_colors(image.pixels, patches, title)
    output.save(f"intermediates_{image.name}", figure, image=np.array(image.file), tokens=tokens)
    if shown:
        options = {"file": image.file, "closed": True}
        output.show("The patches after every layer", captions.of_layers(), figure, **options)


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
