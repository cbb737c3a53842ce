"""Draws the picture at the top of the README: what a ViT looks at in photographs.

python docs/overview.py --checkpoint vit_tiny_patch16_224.npz --output docs/overview.png PHOTO ...
"""

import argparse

import jax
import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from vit_jax.analysis.attention import on_patches, rollout, to_mask
from vit_jax.analysis.intermediates import attention_weights
from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.data import imagenet
from vit_jax.data.images import preprocess, read_image
from vit_jax.models import create_model

LAYERS = (1, 5, 8)
BAR, TEXT = "#0b6bcb", "#24292f"
GAP = 5  # pixels between patches


def main() -> None:
    """Runs the model on the photographs and draws one row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    pretrained = load_pretrained(args.checkpoint)
    inputs = np.stack([preprocess(read_image(p), pretrained.preprocessing) for p in args.photos])
    model = create_model(pretrained.model)
    weights = attention_weights(model, pretrained.params, inputs)
    probabilities = jax.nn.softmax(model.apply({"params": pretrained.params}, inputs, train=False))
    mean, std = np.array(pretrained.preprocessing.mean), np.array(pretrained.preprocessing.std)
    pixels = np.clip(inputs * std + mean, 0, 1)
    columns = 3 + len(LAYERS)
    figure, axes = plt.subplots(
        len(pixels),
        columns + 1,
        figsize=(13.4, 2.2 * len(pixels)),
        layout="constrained",
        squeeze=False,
        width_ratios=[1] * columns + [1.15],
    )
    for row, image, of_image, probability in zip(axes, pixels, weights, probabilities, strict=True):
        draw_row(row, image, of_image, pretrained, model.downsampling)
        draw_classes(row[-1], np.asarray(probability), pretrained.class_names)
    titles = ["photograph", "patches", *(f"attention, layer {n}" for n in LAYERS), "rollout", ""]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10.5, color=TEXT)
    figure.savefig(args.output, dpi=100)


def draw_row(
    row: np.ndarray, image: np.ndarray, weights: jax.Array, pretrained: Pretrained, side: int
) -> None:
    """Draws a photograph, its patches, and where the class token looks.

    Args:
        row: axes.
        image: [height, width, 3] in [0, 1].
        weights: attention weights, [layers, heads, tokens, tokens].
        pretrained: the model's description.
        side: of a patch, in pixels.
    """
    count = pretrained.preprocessing.image_size // side
    grid = (count, count)
    maps = [on_patches(weights[n - 1].mean(axis=0), grid) for n in LAYERS]
    maps.append(on_patches(rollout(weights[None])[0], grid))
    draw(row[0], image)
    draw(row[1], cut(image, side))
    for axis, looked_at in zip(row[2:], maps, strict=False):
        highest = np.quantile(looked_at, 0.99)  # Single patches would leave the rest in the dark.
        mask = np.asarray(to_mask(np.minimum(looked_at, highest), image.shape[:2]))
        draw(axis, image * (0.08 + 0.92 * mask[..., None]))


def draw(axis: Axes, pixels: np.ndarray) -> None:
    """Shows pixels without a frame."""
    axis.imshow(pixels)
    axis.axis("off")


def cut(image: np.ndarray, side: int) -> np.ndarray:
    """Moves the patches of an image apart, on white."""
    count = len(image) // side
    step = side + GAP
    apart = np.ones((count * step - GAP, count * step - GAP, 3))
    for y in range(count):
        for x in range(count):
            patch = image[y * side : (y + 1) * side, x * side : (x + 1) * side]
            apart[y * step : y * step + side, x * step : x * step + side] = patch
    return apart


def draw_classes(axis: Axes, probabilities: np.ndarray, names: tuple[str, ...] | None) -> None:
    """Draws the three most probable classes as bars."""
    best = np.argsort(-probabilities)[:3]
    axis.barh(range(3), probabilities[best], color=BAR, height=0.28)
    for place, index in enumerate(best):
        name = imagenet.readable(names[index]) if names else str(index)
        axis.text(0, place - 0.22, name, fontsize=10, color=TEXT, va="bottom")
        percent = f"{probabilities[index]:.2%}"
        axis.text(1, place - 0.22, percent, fontsize=10, color=TEXT, va="bottom", ha="right")
    axis.set(xlim=(0, 1.0), ylim=(2.6, -0.9))
    axis.axis("off")


if __name__ == "__main__":
    main()
