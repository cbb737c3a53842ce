"""The figures of `python -m vit_jax.analysis`, from arrays; others are `evaluation.pictures`."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.gridspec import SubplotSpec
from matplotlib.image import AxesImage

from vit_jax.analysis.attention import to_blocks
from vit_jax.analysis.curves import Curve, Panel, smooth
from vit_jax.printable import printable

# As far from white as from the ground of a dark page.
_DOT, _FAINT = "#2a82da", "#9aa5b1"
_PANEL = 1.45  # inches
# A few patches that take all of the attention would leave the others in the dark.
_BRIGHTEST = 0.97
# How much of a heat map's color is its own; the rest is the photograph in shades of gray.
_HEAT, _HEAT_COLORS = 0.6, "inferno"
_LONGEST_NAME = 44
_TRAINING, _EVALUATION = _DOT, "#d55e00"
_SVG_DPI = 160  # Of the pixels in it: a photograph keeps about as many as the model saw.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# Cells of a tile of many, at least, and the gap between two as a share of one.
_TILE, _TILE_GAP = 12, 0.2
_Place = tuple[float, float, float, float]  # left, bottom, width, height
_GRAYS = (0.299, 0.587, 0.114)  # ITU-R BT.601


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


def rollouts(
    images: np.ndarray, maps: np.ndarray, captions: Sequence[tuple[str, str]] | None = None
) -> Figure:
    """Every image, a heat map of the attention over it, and what its mask leaves (Figures 6, 14).

    A block of the heat map is a patch. Colors mean the same in all of them.

    Args:
        images: [images, height, width, 3] in [0, 1].
        maps: attention to the patches, [images, rows, columns], see `attention.on_patches`.
        captions: of each image, two lines above it; None: no lines.
    """
    per_row = min(2, len(images))
    rows = -(-len(images) // per_row)
    between, titles = 0.05, 0.25
    above = 0.42 if captions else 0.0
    block = 3 * _PANEL + 2 * between
    width = per_row * (block + 0.25) - 0.15
    height = rows * (_PANEL + above + 0.06) + titles + 0.62
    figure = Figure(figsize=(width, height))
    colors = _heat_scale(maps)
    masks = to_blocks(maps / maps.max(axis=(-2, -1), keepdims=True), images.shape[1:3])
    for index, (image, each, mask) in enumerate(zip(images, maps, masks, strict=True)):
        row, column = divmod(index, per_row)
        left = 0.05 + column * (block + 0.25)
        top = height - titles - row * (_PANEL + above + 0.06) - above
        if captions:
            _caption(figure, captions[index], left / width, (top + 0.05) / height)
        panels = (image, heat_map(image, each, colors), image * mask[..., None])
        for number, pixels in enumerate(panels):
            place = (left + number * (_PANEL + between), top - _PANEL, _PANEL, _PANEL)
            axes = figure.add_axes(_relative(place, width, height))
            _show(axes, pixels)
            if row == 0:
                name = ("input", "attention", "as a mask")[number]
                figure.text(
                    (place[0] + _PANEL / 2) / width, 1 - 0.16 / height, name, ha="center", size=9
                )
    place = (0.05 + _PANEL + between, 0.45, _PANEL, 0.09)
    bar = figure.colorbar(
        _over_gray(colors),
        cax=figure.add_axes(_relative(place, width, height)),
        orientation="horizontal",
        extend="max",
    )
    bar.set_label("times the mean of the patches", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def heat_map(image: np.ndarray, attention: np.ndarray, colors: ScalarMappable) -> np.ndarray:
    """Lays the attention to each patch over an image in gray, [height, width, 3] in [0, 1].

    Args:
        image: [height, width, 3] in [0, 1].
        attention: [rows, columns], not negative.
        colors: from multiples of the mean to colors.
    """
    heat = to_blocks(attention / attention.mean(), image.shape[:2])
    gray = image @ np.array(_GRAYS)
    return (1 - _HEAT) * gray[..., None] + _HEAT * colors.to_rgba(heat)[..., :3]


def _heat_scale(maps: np.ndarray) -> ScalarMappable:
    """The colors of all heat maps of a picture."""
    multiples = maps / maps.mean(axis=(-2, -1), keepdims=True)
    highest = max(np.quantile(multiples, _BRIGHTEST), 1)
    return ScalarMappable(Normalize(0, highest, clip=True), _HEAT_COLORS)


def _over_gray(colors: ScalarMappable) -> ScalarMappable:
    """The same colors as they look over a mid-gray of an image, for the bar beside it."""
    own: Colormap = colors.cmap
    seen = (1 - _HEAT) * 0.5 + _HEAT * own(np.linspace(0, 1, own.N))[:, :3]
    return ScalarMappable(colors.norm, ListedColormap(seen))


def _caption(figure: Figure, lines: tuple[str, str], x: float, y: float) -> None:
    name, prediction = (_shorten(printable(line)) for line in lines)
    style: dict[str, Any] = {"va": "bottom", "parse_math": False}
    figure.text(x, y, prediction, fontsize=8.5, **style)
    offset = 0.17 / figure.get_figheight()
    figure.text(x, y + offset, name, fontsize=8.5, weight="bold", **style)


def _shorten(text: str) -> str:
    """A name that fits above its image; of a long one the end tells most."""
    return text if len(text) <= _LONGEST_NAME else f"…{text[1 - _LONGEST_NAME :]}"


def _relative(place: _Place, width: float, height: float) -> _Place:
    left, bottom, wide, tall = place
    return left / width, bottom / height, wide / width, tall / height


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
    drawn = _tiles(axes, maps.swapaxes(0, 1), 0, np.quantile(maps, _BRIGHTEST))
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
    rows, columns = similarity.shape[:2]
    side = min(0.42, 10 / max(rows, columns))
    wide, tall = (max(4.2, count * side) for count in (columns, rows))
    figure = Figure(figsize=(wide + 1.3, tall + 0.7), layout="constrained")
    draw_similarity(figure, similarity)
    return figure


def draw_similarity(figure: FigureBase, similarity: np.ndarray) -> None:
    """Draws as `similarity_grid`, in a figure or a part of one."""
    axes = figure.subplots()
    drawn = _tiles(axes, similarity, -1, 1)
    axes.set(xlabel="input patch column", ylabel="input patch row")
    axes.set_title("Position embedding similarity", fontsize=10)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, ticks=np.linspace(-1, 1, 5))
    bar.set_label("cosine similarity")


def curves(panels: Sequence[Panel], constant: float) -> Figure:
    """Training curves, a panel for each metric; values as they are logged are faint.

    Args:
        panels: see `curves.read_panels`.
        constant: of the exponential mean of what is measured in training, see `curves.smooth`;
            neither evaluations nor the learning rate are smoothed.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.7 * rows + 0.4), layout="constrained")
    parts = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axes, panel in zip(parts, panels, strict=False):
        _curves(axes, panel, constant)
    for axes in parts[len(panels) :]:
        axes.remove()
    entries = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=8.5,
    )
    return figure


def _curves(axes: Axes, panel: Panel, constant: float) -> None:
    logged = "training, as logged"
    line: dict[str, Any] = {"color": _TRAINING, "linewidth": 1.5}
    if panel.name == "learning_rate" and panel.training:
        axes.plot(*panel.training, **line)
    elif panel.training and not constant:
        axes.plot(*panel.training, label=logged, **line)
    elif panel.training:
        steps, values = panel.training
        axes.plot(steps, values, color=_FAINT, alpha=0.6, linewidth=0.9, label=logged)
        label = f"training, exponential mean, constant {constant:g}"
        axes.plot(steps, smooth(values, constant), label=label, **line)
    if panel.evaluation:
        _evaluations(axes, panel.evaluation)
    if panel.name in ("learning_rate", "grad_norm"):
        axes.set_ylim(bottom=0)
    axes.set_title(printable(panel.name.replace("_", " ")), fontsize=10, parse_math=False)
    axes.set_xlabel("step")
    axes.tick_params(labelsize=8, labelbottom=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _evaluations(axes: Axes, curve: Curve) -> None:
    size = 3.5 if len(curve.steps) <= 40 else 0
    style: dict[str, Any] = {"linewidth": 1.2, "marker": "o", "markersize": size, "zorder": 3}
    axes.plot(*curve, label="evaluation, not smoothed", color=_EVALUATION, **style)


def to_svg(figure: Figure, name: str) -> str:
    """Returns a figure as a part of a page of HTML, its letters in the color of the page's text.

    Args:
        figure: whose ground becomes transparent.
        name: of letters and digits, another for each figure of a page.
    """
    for axes in figure.axes:
        if legend := axes.get_legend():
            legend.set_frame_on(False)  # Its ground is white, as its letters may be.
    buffer = io.StringIO()
    # Without a salt of its own a figure would be named after the moment it is drawn.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=_SVG_DPI, transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("#000000", "currentColor").replace("<svg ", '<svg fill="currentColor" ', 1)


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
    """Draws maps [rows, columns, height, width] with gaps between, numbered from 1, in one scale.

    One picture: hundreds of axes would take many seconds.
    """
    rows, columns, height, width = tiles.shape
    finer = -(-_TILE // min(height, width))
    gap = max(1, round(_TILE_GAP * finer * min(height, width)))
    tall, wide = finer * height + gap, finer * width + gap
    apart = np.full((rows, tall, columns, wide), np.nan, np.float32)
    each = tiles.repeat(finer, axis=2).repeat(finer, axis=3)
    apart[:, : tall - gap, :, : wide - gap] = each.swapaxes(1, 2)
    drawn = axes.imshow(
        apart.reshape(rows * tall, columns * wide)[: rows * tall - gap, : columns * wide - gap],
        cmap="viridis",
        vmin=lowest,
        vmax=highest,
        # So that the middle of a tile is its number.
        extent=(
            0.5 + gap / wide / 2,
            columns + 0.5 - gap / wide / 2,
            rows + 0.5 - gap / tall / 2,
            0.5 + gap / tall / 2,
        ),
        aspect=tall / wide,
        interpolation="nearest",
    )
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
