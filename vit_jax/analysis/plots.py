"""The figures of `python -m vit_jax.analysis`, from arrays; others are `evaluation.pictures`."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.gridspec import SubplotSpec
from matplotlib.image import AxesImage

_DOT, _FAINT = "#0b6bcb", "#9aa5b1"
_PANEL = 1.45  # inches


def masked_images(images: np.ndarray, masks: np.ndarray) -> Figure:
    """Every image, and beside it what is left of it under its mask (Figures 6 and 14).

    Args:
        images: [images, height, width, 3] in [0, 1].
        masks: [images, height, width] in [0, 1].
    """
    pairs = min(3, len(images))
    rows = -(-len(images) // pairs)
    figure = Figure(figsize=(pairs * (2 * _PANEL + 0.15), rows * _PANEL + 0.3))
    # A narrow column between the pairs.
    grid = figure.add_gridspec(
        rows,
        3 * pairs - 1,
        width_ratios=([1, 1, 0.06] * pairs)[:-1],
        left=0.003,
        right=0.997,
        bottom=0.005,
        top=1 - 0.27 / (rows * _PANEL + 0.3),
        wspace=0.03,
        hspace=0.03,
    )
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        row, pair = divmod(index, pairs)
        for column, pixels in enumerate((image, image * mask[..., None])):
            axes = figure.add_subplot(grid[row, 3 * pair + column])
            _show(axes, pixels)
            if row == 0:
                axes.set_title(("input", "attention")[column], fontsize=10, pad=4)
    return figure


def head_maps(image: np.ndarray, maps: np.ndarray, title: str) -> Figure:
    """An image, and what the class token looks at in every layer (columns) and head (rows).

    Args:
        image: [height, width, 3] in [0, 1].
        maps: [layers, heads, rows, columns]; one color scale for all.
        title: above the maps.
    """
    num_layers, num_heads = maps.shape[:2]
    figure, right = _beside(image, num_heads, num_layers, title)
    axes = figure.add_subplot(right)
    # A few patches that take all of a head's attention would leave the others in the dark.
    highest = np.quantile(maps, 0.97)
    drawn = _tiles(axes, maps.swapaxes(0, 1), 0, highest)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="layer", ylabel="head")
    box, width, height = axes.get_position(), figure.get_figwidth(), figure.get_figheight()
    tall = min(2.2 / height, box.height)
    place = (box.x1 + 0.1 / width, box.y1 - tall, 0.1 / width, tall)
    bar = figure.colorbar(drawn, cax=figure.add_axes(place), extend="max")
    bar.set_label("share of the attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def layer_colors(image: np.ndarray, tokens: np.ndarray, title: str) -> Figure:
    """An image, and every layer's patches colored by their first three principal components.

    Args:
        image: [height, width, 3] in [0, 1].
        tokens: of the patches, [layers, rows, columns, hidden_size].
        title: above the maps.
    """
    columns = min(6, len(tokens))
    rows = -(-len(tokens) // columns)
    figure, right = _beside(image, rows, columns, title, gap=0.17)
    grid = right.subgridspec(rows, columns, wspace=0.06, hspace=0.25)
    panels = grid.subplots(squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(tokens):
            axes.remove()
            continue
        _show(axes, _three_components(tokens[index]), interpolation="nearest")
        axes.set_title(f"layer {index + 1}", fontsize=8, pad=3)
    return figure


def attention_distances(distances: np.ndarray, uniform: float, num_images: int) -> Figure:
    """Draws one dot per head and layer (Figure 7 right).

    Args:
        distances: [layers, heads] in pixels.
        uniform: the distance of a head that looks at all tokens alike.
        num_images: over which the distances were averaged.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    draw_distances(figure, distances, uniform, num_images)
    return figure


def draw_distances(
    figure: FigureBase, distances: np.ndarray, uniform: float, num_images: int
) -> None:
    """Draws as `attention_distances`, in a figure or a part of one."""
    axes = figure.subplots()
    num_layers, num_heads = distances.shape
    layers = np.repeat(np.arange(1, num_layers + 1), num_heads)
    axes.scatter(
        layers,
        distances.ravel(),
        s=30,
        color=_DOT,
        alpha=0.75,
        edgecolor="white",
        linewidth=0.5,
        label="a head",
    )
    axes.axhline(
        uniform,
        color=_FAINT,
        linestyle="--",
        linewidth=1.2,
        zorder=1,
        label="attention to all tokens alike",
    )
    axes.set(
        xlabel="layer",
        ylabel="mean attention distance (pixels)",
        xlim=(0.3, num_layers + 0.7),
        ylim=(0, 1.12 * max(uniform, distances.max())),
    )
    axes.set_xticks(np.arange(1, num_layers + 1, 1 if num_layers <= 16 else 2))
    images = "image" if num_images == 1 else f"mean over {num_images} images"
    heads = "1 head" if num_heads == 1 else f"{num_heads} heads"
    axes.set_title(f"Attention distance: {heads} a layer, {images}", fontsize=10)
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def filter_grid(filters: np.ndarray, share: float) -> Figure:
    """Principal components of the RGB filters, seven a row (Figure 7 left).

    Args:
        filters: [filters, height, width, 3] in [0, 1].
        share: of the variance that they hold together.
    """
    rows, columns = _filter_grid_shape(len(filters))
    side = 0.62
    figure = Figure(figsize=(columns * side + 0.2, rows * side + 0.5), layout="constrained")
    draw_filters(figure, filters, share)
    return figure


def _filter_grid_shape(count: int) -> tuple[int, int]:
    columns = min(7, count)
    return -(-count // columns), columns


def draw_filters(figure: FigureBase, filters: np.ndarray, share: float) -> None:
    """Draws as `filter_grid`, in a figure or a part of one."""
    panels = figure.subplots(*_filter_grid_shape(len(filters)), squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index < len(filters):
            _show(axes, filters[index], interpolation="nearest")
        else:
            axes.remove()
    figure.suptitle(
        f"First {len(filters)} principal components of the\nRGB filters, {share:.0%} of their "
        "variance",
        fontsize=10,
    )


def similarity_grid(similarity: np.ndarray) -> Figure:
    """A map for each patch: how similar every patch's position embedding is (Figure 7 middle).

    Args:
        similarity: [rows, columns, rows, columns], cosines.
    """
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    draw_similarity(figure, similarity)
    return figure


def draw_similarity(figure: FigureBase, similarity: np.ndarray) -> None:
    """Draws as `similarity_grid`, in a figure or a part of one."""
    axes = figure.subplots()
    drawn = _tiles(axes, similarity, -1, 1)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.set_title("Position embeddings: similarity of each patch with all", fontsize=10)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, ticks=np.linspace(-1, 1, 5))
    bar.set_label("cosine similarity")


def _beside(
    image: np.ndarray, rows: int, columns: int, title: str, gap: float = 0.0
) -> tuple[Figure, SubplotSpec]:
    """An image, and right of it room for so many panels, with gaps of so many inches below each."""
    side, left = 0.72, 2.35
    wide, tall = columns * side, rows * (side + gap) - gap
    width, height = left + wide + 0.9, max(tall, 1.8) + 0.85
    figure = Figure(figsize=(width, height))
    top = 1 - 0.7 / height
    axes = figure.add_axes((0.1 / width, top - 1.8 / height, 1.8 / width, 1.8 / height))
    _show(axes, image)
    axes.set_title("input", fontsize=10, pad=4)
    figure.text(left / width, 1 - 0.12 / height, title, fontsize=10, va="top")
    grid = figure.add_gridspec(
        left=left / width,
        right=(left + wide) / width,
        bottom=top - tall / height,
        top=top,
    )
    return figure, grid[0]


def _tiles(axes: Axes, tiles: np.ndarray, lowest: float, highest: float) -> AxesImage:
    """Draws maps [rows, columns, height, width] side by side, numbered from 1, in one scale.

    One picture cut by lines: hundreds of axes would take many seconds.
    """
    rows, columns, height, width = tiles.shape
    drawn = axes.imshow(
        tiles.swapaxes(1, 2).reshape(rows * height, columns * width),
        cmap="viridis",
        vmin=lowest,
        vmax=highest,
        extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
        aspect=height / width,
        interpolation="nearest",
    )
    for column in range(1, columns):
        axes.axvline(column + 0.5, color="white", linewidth=1.2)
    for row in range(1, rows):
        axes.axhline(row + 0.5, color="white", linewidth=1.2)
    axes.set_xticks(np.arange(1, columns + 1, -(-columns // 32)))
    axes.set_yticks(np.arange(1, rows + 1, -(-rows // 32)))
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return drawn


def _show(axes: Axes, pixels: np.ndarray, **options: Any) -> None:
    axes.imshow(np.clip(pixels, 0, 1), **options)
    axes.set_axis_off()


def _three_components(tokens: np.ndarray) -> np.ndarray:
    """Projects [rows, columns, hidden_size] to [rows, columns, 3] in [0, 1]."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    left, scales, _ = np.linalg.svd(flat, full_matrices=False)
    colors = np.zeros((len(flat), 3))
    count = min(3, len(scales))
    colors[:, :count] = (left * scales)[:, :count]
    low, high = np.quantile(colors, 0.02), np.quantile(colors, 0.98)
    return np.clip((colors - low) / max(high - low, 1e-12), 0, 1).reshape(*tokens.shape[:2], 3)
