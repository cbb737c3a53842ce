"""Draws what a model looks at and learns: `python -m vit_jax.analysis all --checkpoint C ...`."""

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.files import atomic_write, make_folder
from vit_jax.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vit_jax.checkpoints.pretrained import Pretrained

_OF_IMAGES = ("attention", "rollout", "distance", "intermediates")
_OF_WEIGHTS = ("filters", "positions")

_EPILOG = """analyses, each of which writes pictures (PNG) and their numbers (NPZ):
  attention      what every head of every layer looks at, two files an image
  rollout        attention rollout over all layers as a mask of the image (Appendix D.8)
  distance       mean attention distance in pixels by layer and head (Appendix D.7)
  filters        principal components of the filters that see the image (Figure 7)
  positions      similarity of the position embeddings (Figure 7); needs no images, as filters
  intermediates  the tokens after every layer, two files an image

examples:
  %(prog)s rollout --checkpoint B_16 --images photos/ --output rollout
  %(prog)s filters --checkpoint ViT-B_16 --output figure7

exit codes:
  0  everything was written
  1  some images could not be read; each is one line on stderr, the others were done
  2  none could be read, or a flag or the checkpoint is wrong"""

# As many as rollout.png shows; rollout.npz has all.
_SHOWN = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parse(argv)
    warnings.simplefilter("ignore")  # PIL warns of odd metadata and large sizes.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It tells of a home without a cache.
    command.keep_programs()
    names = _OF_IMAGES + _OF_WEIGHTS if args.analysis == "all" else (args.analysis,)
    from vit_jax.data.image_files import find_images  # With PIL: --help should not wait for it.

    files = find_images(args.images)
    pretrained = flags.load(args)
    make_folder(Path(args.output))
    save = _Saver(Path(args.output), args.dpi)
    if "filters" in names:
        _filters(pretrained, save)
    if "positions" in names:
        _positions(pretrained, save)
    of_images = [name for name in names if name in _OF_IMAGES]
    if not of_images:
        return 0
    done = _analyze_images(pretrained, files, args.batch_size, of_images, save)
    return 0 if done == len(files) else 1 if done else 2


class _Saver:
    """Writes a figure and its arrays, each whole or not at all, and says so."""

    def __init__(self, directory: Path, dpi: int):
        self._directory, self._dpi = directory, dpi

    def __call__(self, name: str, figure: "Figure", **arrays: Any) -> None:
        png, npz = (self._directory / f"{name}.{suffix}" for suffix in ("png", "npz"))
        with atomic_write(npz) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=self._dpi)
        for path in (png, npz):
            print(printable(str(path)), flush=True)


def _filters(pretrained: "Pretrained", save: _Saver) -> None:
    from vit_jax.analysis import embeddings, plots

    kernel = embeddings.rgb_filters(pretrained.params)
    components, shares = embeddings.principal_filters(kernel)
    figure = plots.filter_grid(embeddings.to_rgb(components), shares.sum())
    save("filters", figure, components=components, share_of_variance=shares)


def _positions(pretrained: "Pretrained", save: _Saver) -> None:
    import jax

    from vit_jax.analysis import embeddings, plots
    from vit_jax.analysis.intermediates import position_embedding
    from vit_jax.models import create_model

    size = pretrained.preprocessing.image_size
    images = np.zeros((1, size, size, 3), np.float32)
    embed = jax.jit(position_embedding, static_argnums=0)
    embedding = embed(create_model(pretrained.model), pretrained.params, images)
    similarity = embeddings.position_similarity(embedding, _grid(pretrained)[0])
    save("positions", plots.similarity_grid(similarity), similarity=similarity)


def _grid(pretrained: "Pretrained") -> tuple[tuple[int, int], int]:
    """Rows and columns of patches, and the side of one in pixels."""
    from vit_jax.models import create_model

    side = create_model(pretrained.model).downsampling
    count = pretrained.preprocessing.image_size // side
    return (count, count), side


def _analyze_images(
    pretrained: "Pretrained",
    files: Sequence[str],
    batch_size: int,
    names: Sequence[str],
    save: _Saver,
) -> int:
    """The analyses that run the model, all in one pass; returns how many images it had."""
    from vit_jax.analysis import plots
    from vit_jax.data.image_files import read_batches

    grid, side = _grid(pretrained)
    observe = _observer(pretrained, names, grid, side)
    seen: Counter[str] = Counter()
    done, pictures, kept = [], [], {name: [] for name in names}
    for found, batch in read_batches(files, pretrained.preprocessing, batch_size, command.report):
        # Only as many rows leave the device as there are images.
        observed = {name: np.asarray(x[: len(found)]) for name, x in observe(batch).items()}
        for name in ("rollout", "distance"):
            if name in names:
                kept[name] += list(observed[name])
        for index, file in enumerate(found):
            picture = _to_pixels(batch[index], pretrained.preprocessing)
            if len(pictures) < _SHOWN:
                pictures.append(picture)
            stem = Path(file).stem
            seen[stem] += 1
            suffix = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
            if "attention" in names:
                weights = observed["attention"][index]
                _attention(save, f"attention_{suffix}", file, picture, weights, grid)
            if "intermediates" in names:
                tokens = observed["intermediates"][index]
                _intermediates(save, f"intermediates_{suffix}", file, picture, tokens, grid)
        done += found
    if not done:
        return 0
    if "rollout" in names:
        import jax.numpy as jnp

        from vit_jax.analysis.attention import to_mask

        maps = np.stack(kept["rollout"])
        masks = np.asarray(to_mask(jnp.asarray(maps), pictures[0].shape[:2]))
        figure = plots.masked_images(np.stack(pictures), masks[: len(pictures)])
        save("rollout", figure, files=np.array(done), rollout=maps, mask=masks)
    if "distance" in names:
        from vit_jax.analysis.attention import uniform_distance

        each = np.stack(kept["distance"])
        mean = each.astype(np.float64).mean(axis=0)
        uniform = uniform_distance(grid, side, grid[0] * grid[1] + _prefix(pretrained.model))
        figure = plots.attention_distances(mean, uniform, len(done))
        arrays = {"distance": mean, "distance_of_images": each, "uniform": uniform}
        save("distance", figure, files=np.array(done), **arrays)
    return len(done)


def _prefix(model: dict[str, Any]) -> int:
    """The tokens of a model that come before its patches."""
    from vit_jax.models import describe
    from vit_jax.models.encoder import EncoderConfig

    description = describe(model)
    return description.num_prefix_tokens if isinstance(description, EncoderConfig) else 0


def _observer(
    pretrained: "Pretrained", names: Sequence[str], grid: tuple[int, int], side: int
) -> Callable[[np.ndarray], dict[str, Any]]:
    """A function from a batch of images to what the analyses need of it, [batch, ...] each."""
    import jax

    from vit_jax.analysis.attention import attention_distance, on_patches, rollout
    from vit_jax.analysis.intermediates import attention_weights, layer_tokens
    from vit_jax.models import create_model

    # Without scan_layers, a layer's attention weights need not outlive what is made of them.
    model = create_model(pretrained.model)
    of_weights = {
        "attention": lambda weights: weights,
        "rollout": lambda weights: on_patches(rollout(weights), grid),
        "distance": lambda weights: attention_distance(weights, grid, side),
    }

    def observe(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        observed = {}
        if wanted := [name for name in names if name in of_weights]:
            weights = attention_weights(model, params, images)
            observed = {name: of_weights[name](weights) for name in wanted}
        if "intermediates" in names:
            observed["intermediates"] = layer_tokens(model, params, images)
        return observed

    compiled, params = jax.jit(observe), jax.device_put(pretrained.params)
    return lambda images: compiled(params, images)


def _attention(
    save: _Saver,
    name: str,
    file: str,
    picture: np.ndarray,
    weights: np.ndarray,
    grid: tuple[int, int],
) -> None:
    import jax.numpy as jnp

    from vit_jax.analysis import plots
    from vit_jax.analysis.attention import on_patches

    maps = np.asarray(on_patches(jnp.asarray(weights), grid))
    has_class_token = weights.shape[-1] > grid[0] * grid[1]
    who = "Attention of the class token" if has_class_token else "Mean attention of the patches"
    figure = plots.head_maps(picture, maps, f"{who} to every patch")
    save(name, figure, image=np.array(file), weights=weights)


def _intermediates(
    save: _Saver,
    name: str,
    file: str,
    picture: np.ndarray,
    tokens: np.ndarray,
    grid: tuple[int, int],
) -> None:
    from vit_jax.analysis import plots

    patches = tokens[:, -grid[0] * grid[1] :].reshape(len(tokens), *grid, -1)
    title = "Patches after every layer: the first three principal components as colors"
    save(name, plots.layer_colors(picture, patches, title), image=np.array(file), tokens=tokens)


def _to_pixels(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Returns the model's input as pixels in [0, 1] again."""
    mean, std = (np.array(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
    return np.clip(image * std + mean, 0, 1)


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(
        prog=prog,
        description="Draws what a model looks at and has learned, as pictures and their numbers.",
        epilog=_EPILOG,
    )
    parser.add_argument("analysis", choices=[*_OF_IMAGES, *_OF_WEIGHTS, "all"])
    flags.add_flags(parser)
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = build_parser("python -m vit_jax.analysis").parse_args(argv)
    if args.analysis not in _OF_WEIGHTS and not args.images:
        raise UserError(f"{args.analysis} looks at images: give some with --images")
    return args


if __name__ == "__main__":
    command.run(main)
