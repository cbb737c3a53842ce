"""Semantic segmentation of drawn shapes, where the right answer is known.

python -m experiments.segmentation [--small] [--workdir W]

Draws discs, squares and triangles of any color on noise, and their masks. Says how well logits of
patches can do that are enlarged bilinearly, whatever the model. Then trains
configs/segmentation.py:tiny, prints its mIoU beside that ceiling, and writes a picture of images,
true and predicted masks. With --small the color of a shape tells its class, images have 32
pixels and the model one layer. Started again it goes on where it stopped. Each number of images,
with --small or without, has a folder of its own in W.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

if not __package__:
    sys.exit("error: this is a module now: run python -m experiments.segmentation")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from PIL import Image

from vit_jax import command, config_files, tensorflow_env
from vit_jax.evaluation.segmentation import SegmentationMetrics
from vit_jax.files import atomic_folder, make_folder
from vit_jax.models.segmentation import pixel_scores, upsample

CLASSES = ("background", "disc", "square", "triangle")
# Where a color tells the class, that of each shape.
COLORS = ((220, 60, 60), (60, 200, 80), (70, 90, 230))
_RADII = (0.14, 0.24)  # of the side of an image
_NOISE = 25.0  # standard deviation, in gray levels
_TRIES = 50  # at a place for a shape that touches no other
_FITTING_STEPS = 300
_SMALL_SIDE = 32


class Drawn(NamedTuple):
    """An image, uint8 [side, side, 3], and its mask, uint8 [side, side], indices of `CLASSES`."""

    image: np.ndarray
    mask: np.ndarray


def draw(rng: np.random.Generator, side: int = 48, colored: bool = False) -> Drawn:
    """Draws one to three shapes that do not touch on a noisy background.

    Args:
        rng: of all randomness.
        side: of the image, in pixels.
        colored: whether the color of a shape tells its class; else it is any that stands out.
    """
    rows, columns = np.mgrid[:side, :side] + 0.5
    ground = rng.uniform(60, 195, 3)
    pixels = np.tile(ground, (side, side, 1))
    mask = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(1, 4)):
        for _ in range(_TRIES):
            radius = side * rng.uniform(*_RADII)
            y, x = rng.uniform(radius, side - radius, 2)
            around = np.maximum(abs(rows - y), abs(columns - x)) < radius + 1
            if not mask[around].any():
                break
        else:
            continue
        label = int(rng.integers(1, len(CLASSES)))
        inside = _inside(label, rows - y, columns - x, radius)
        mask[inside] = label
        pixels[inside] = COLORS[label - 1] if colored else (ground + rng.choice([-60, 60], 3))
    pixels += rng.normal(0, _NOISE, pixels.shape)
    return Drawn(np.clip(pixels, 0, 255).astype(np.uint8), mask)


def _inside(label: int, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    if CLASSES[label] == "disc":
        return down**2 + right**2 < radius**2
    if CLASSES[label] == "square":
        return np.maximum(abs(down), abs(right)) < 0.85 * radius
    return (down < 0.8 * radius) & (abs(right) < (down + radius) * 0.55)  # It stands on its base.


def write_folder(
    folder: pathlib.Path, counts: dict[str, int], side: int = 48, colored: bool = False
) -> None:
    """Writes images and masks as `data.mask_folder` reads them, all or nothing.

    Nothing is written where the folder is there already.

    Args:
        folder: gets a directory for each split, and classes.txt.
        counts: the images of each split.
        side: as in `draw`.
        colored: likewise.
    """
    if folder.exists():
        return
    make_folder(folder.parent, "--workdir")
    with atomic_folder(folder) as new:
        for seed, (split, count) in enumerate(counts.items()):
            for kind in ("images", "masks"):
                (new / split / kind).mkdir(parents=True)
            rng = np.random.default_rng(seed)
            for index in range(count):
                drawn, name = draw(rng, side, colored), f"{index:04}.png"
                Image.fromarray(drawn.image).save(new / split / "images" / name)
                Image.fromarray(drawn.mask).save(new / split / "masks" / name)
        (new / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def ceilings(masks: np.ndarray, patch: int) -> tuple[float, float]:
    """The mIoU that logits of patches can have which are enlarged bilinearly, whatever the model.

    Args:
        masks: uint8 [images, side, side], indices of `CLASSES`.
        patch: side of a patch, in pixels.

    Returns:
        That of each class' share of a patch; and of logits that were fitted to the masks themselves
        by gradient descent, which no model can be expected to beat.
    """
    count, side, _ = masks.shape
    rows = side // patch
    one_hot = np.float32(masks[..., None] == np.arange(len(CLASSES)))
    shares = one_hot.reshape(count, rows, patch, rows, patch, -1).mean((2, 4))
    fitted = _fit(jnp.log(shares + 0.05), jnp.asarray(masks))
    return tuple(_miou(np.asarray(upsample(x, (side, side))), masks) for x in (shares, fitted))


@jax.jit
def _fit(logits: jax.Array, masks: jax.Array) -> jax.Array:
    optimizer = optax.adam(0.1)

    def loss(logits: jax.Array) -> jax.Array:
        return pixel_scores(upsample(logits, masks.shape[1:]), masks)["loss"].sum()

    def step(_: int, state: tuple) -> tuple:
        logits, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(logits), moments)
        return optax.apply_updates(logits, updates), moments

    return jax.lax.fori_loop(0, _FITTING_STEPS, step, (logits, optimizer.init(logits)))[0]


def _miou(logits: np.ndarray, masks: np.ndarray) -> float:
    pairs = masks.astype(int) * len(CLASSES) + logits.argmax(-1)
    confusion = np.bincount(pairs.ravel(), minlength=len(CLASSES) ** 2)
    shape = (len(CLASSES),) * 2
    return SegmentationMetrics(confusion.reshape(shape), 0.0, len(masks)).scalars()["mIoU"]


def config_of(args: argparse.Namespace, folder: pathlib.Path) -> ConfigDict:
    """The config of the run on a folder of images and masks."""
    config = config_files.load(f"segmentation:tiny,folder:{folder}").config
    if args.small:
        config.batch_size = 16
        config.dataset.image_size = _SMALL_SIDE
        config.model.update({"hidden_size": 32, "num_layers": 1, "mlp_dim": 64, "num_heads": 2})
        config.schedule.base_lr = 1e-2
    config.duration = f"{args.steps or (600 if args.small else 1000)} steps"
    return config


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        default=pathlib.Path("runs/segmentation"),
        metavar="DIR",
        help="gets the images, the run and the picture [runs/segmentation]",
    )
    parser.add_argument(
        "--small", action="store_true", help="colored shapes, small images and a small model"
    )
    parser.add_argument(
        "--steps", type=command.positive, metavar="N", help="of the run [1000, small 600]"
    )
    parser.add_argument(
        "--images", type=command.positive, metavar="N", help="to train on [2000, small 500]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser("python -m experiments.segmentation").parse_args(argv)
    tensorflow_env.quiet()
    from vit_jax import evaluate
    from vit_jax.train import train

    counts = {"train": args.images or (500 if args.small else 2000), "test": 100}
    place = args.workdir / f"{'small-' * args.small}{counts['train']}"
    folder, run = place / "shapes", place / "run"
    config = config_of(args, folder)
    write_folder(folder, counts, config.dataset.image_size, colored=args.small)
    paths = sorted((folder / "test" / "masks").iterdir())
    masks = np.stack([np.asarray(Image.open(path)) for path in paths])
    shares, fitted = ceilings(masks, config.model.patch_size)
    print(f"ceiling: mIoU {shares:.4f} of each class' share of a patch, {fitted:.4f} of logits")
    print("  that were fitted to the masks of the test images themselves", flush=True)
    final = train(config, run)
    flags = ["--checkpoint", str(run), "--dataset", f"folder:{folder}", "--split", "test"]
    evaluate.main([*flags, "--per_class", "--report", str(place / "report")])
    print(f"mIoU {final['mIoU']:.4f}, of a ceiling of {fitted:.4f}")
    return 0


if __name__ == "__main__":
    command.run(main)
