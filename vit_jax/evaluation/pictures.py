"""The pictures of an evaluation: a confusion matrix, and a sheet of images with what they are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from vit_jax.printable import printable

# Blue and orange are told apart with every kind of color blindness.
RIGHT, WRONG = "#1f5fa8", "#c25a00"
_COLUMNS = 6
SIDE = 1.75  # inches, of an image of a sheet


class Shown(NamedTuple):
    """An image of a sheet: uint8 pixels [height, width, 3], and the lines below it."""

    pixels: np.ndarray
    lines: tuple[str, ...]


def shortened(text: str, most: int) -> str:
    """A text made printable and cut in its middle to so many characters."""
    text = printable(text)
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def contact_sheet(images: Sequence[Shown], title: str, columns: int = _COLUMNS) -> Figure:
    """Images in rows, each with its lines.

    Args:
        images: at least one.
        title: above them.
        columns: images of a row.
    """
    rows, side, text = -(-len(images) // columns), SIDE, 0.14 * len(images[0].lines) + 0.12
    height = rows * (side + text) + 0.45
    width = columns * (side + 0.12)
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.06 / width, 1 - 0.12 / height, title, fontsize=10, va="top", parse_math=False)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left = column * (side + 0.12) + 0.06
        bottom = height - 0.4 - row * (side + text) - side
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        tiny = max(image.pixels.shape) < 64
        axes.imshow(image.pixels, interpolation="nearest" if tiny else "antialiased")
        axes.set_axis_off()
        for number, line in enumerate(image.lines):
            figure.text(
                left / width,
                (bottom - 0.05 - 0.14 * number) / height,
                shortened(line, 32),
                fontsize=7,
                va="top",
                parse_math=False,
            )
    return figure


def confusion_matrix(
    counts: np.ndarray, images: np.ndarray, names: Sequence[str], num_classes: int
) -> Figure:
    """Images by true class (rows) and predicted class (columns).

    Args:
        counts: int [classes, classes], of some thirty classes at most.
        images: int [classes], of each true class, whatever they are taken for.
        names: of these classes.
        num_classes: how many there are beside them, and they.
    """
    count, size = len(counts), 0.34 * len(counts) + 2.6
    shares = counts / np.maximum(images[:, None], 1)
    figure = Figure(figsize=(max(size, 6.2), size), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.imshow(_colors(shares), interpolation="nearest")
    for row, column in np.argwhere(counts):
        dark = shares[row, column] > (0.55 if row == column else 0.3)
        color = "white" if dark else "black"
        text = f"{counts[row, column]}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    labels = [shortened(name, 22) for name in names]
    ticks = np.arange(count)
    axes.set_xticks(ticks, labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(ticks, labels, fontsize=8, parse_math=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d0d4d9", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="predicted", ylabel="true")
    of_all = f", the {count} of {num_classes:,} confused most" if count < num_classes else ""
    title = f"Images by true and predicted class{of_all}"
    legend = "blue: right, orange: wrong; the darker, the larger a share of its row"
    axes.set_title(f"{title}\n{legend}", fontsize=9)
    return figure


def _colors(shares: np.ndarray) -> np.ndarray:
    """White to blue on the diagonal and to orange off it, [classes, classes, 3]."""
    right = np.eye(len(shares), dtype=bool)[..., None]
    # A share of a hundredth can be seen.
    strength = np.where(right[..., 0], shares, np.sqrt(shares))[..., None]
    color = np.where(right, to_rgb(RIGHT), to_rgb(WRONG))
    return 1 + strength * (color - 1)
