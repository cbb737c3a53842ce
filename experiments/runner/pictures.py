"""The look of the pictures: a color, a marker and a line for each family, ours before the paper's.

A draw function of an experiment is three calls:

    figure, (axes,) = pictures.panels(1)
    pictures.points(axes, results, log="x")
    return pictures.finish(figure)

Ours are filled, with error bars where there are several seeds; the paper's are hollow and faint.
At a smaller scale than the paper's, and where the two lie far apart, the paper's get axes of their
own beside. `picture_of` has every picture say which scale it shows.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.runner import notes
from vit_jax.printable import printable
from vit_jax.runner import mean_and_sd

if TYPE_CHECKING:
    from experiments.runner.results import Result, Results

VIT, HYBRID, RESNET, AXIAL = "ViT", "Hybrid", "ResNet (BiT)", "Axial"
PAPER = "paper"

# Okabe and Ito's colors, which color-blind people tell apart; the rest tells in black and white.
_FAMILIES = {
    VIT: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    HYBRID: {"color": "#D55E00", "marker": "D", "linestyle": "-."},
    RESNET: {"color": "#009E73", "marker": "s", "linestyle": "--"},
    AXIAL: {"color": "#CC79A7", "marker": "^", "linestyle": ":"},
}
_SERIES = (
    *_FAMILIES.values(),
    {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": "#56B4E9", "marker": "P", "linestyle": (0, (8, 2))},
    {"color": "#333333", "marker": "X", "linestyle": (0, (1, 2))},
)
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")
_FAINT, _GRAY = 0.45, "#777777"
# Ranges that take so many times the room of the larger when they share an axis lie apart.
_APART = 2.2
_PAPER_AXES = "the paper's axes"
# Where a name may stand, in points from its own, the best first.
_PLACES = (
    tuple((7, y) for y in (0, 4, -4, 8, -8))
    + ((0, 9), (0, -10))
    + tuple((x, y) for x in (-7, 7) for y in (0, 5, -5, 11, -11, 17, -17))
)


def family(model: str) -> str:
    """The family of a model by its name: one of VIT, HYBRID, RESNET, AXIAL."""
    if model.startswith("Axial"):
        return AXIAL
    if "+" in model:
        return HYBRID
    return RESNET if re.match(r"R\d", model) else VIT


def style(model: str) -> dict[str, Any]:
    """Keywords of `Axes.plot` for a model: those of its family, the larger the bigger."""
    return {**_FAMILIES[family(model)], "markersize": _marker_size(model)}


def _marker_size(model: str) -> float:
    transformer = re.search(r"ViT-(Ti|S|b|B|L|H)/(\d+)", model)
    if transformer:
        size, patch = transformer.groups()
        order = {"Ti": 0, "S": 1, "b": 1, "B": 2, "L": 3, "H": 4}[size]
        return 4.5 + 1.3 * order + (0.7 if int(patch) < 32 else 0)
    resnet = re.fullmatch(r"(?:Axial)?R(?:esNet)?(\d+)(?:x(\d+))?", model)
    if resnet:
        depth, width = int(resnet[1]), int(resnet[2] or 1)
        return 4.5 + math.log2(depth * width**2 / 50)
    return 6.0


def series_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Styles of series that are no models, such as two ways to pool, in their order."""
    names = list(names)
    if len(names) > len(_SERIES):
        raise ValueError(f"{len(names)} series: no more than {len(_SERIES)} can be told apart")
    return {name: {**looks, "markersize": 6.0} for name, looks in zip(names, _SERIES, strict=False)}


def picture_of(results: "Results") -> Figure | None:
    """The picture of an experiment, with a line that says what its numbers are of.

    Returns:
        It, None if the experiment has none or nothing of it has a number yet.
    """
    draw = results.experiment.draw
    if draw is None or all(result.mean is None for result in results.found):
        return None
    figure = draw(results)
    # Above the layout, whatever it is: the file is as large as what it shows.
    options = {"ha": "left", "va": "bottom", "fontsize": 8, "color": _GRAY, "parse_math": False}
    figure.text(0.0, 1.0, printable(notes.in_a_line(results.setting)), **options)
    return figure


def panels(
    columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.5, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row.

    Args:
        columns: of panels.
        rows: of panels.
        width: of a panel in inches.
        height: likewise.
        options: of `Figure.subplots`, such as `sharey`.
    """
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


class _Point(NamedTuple):
    x: float
    y: float
    sd: float | None


def points(
    axes: Axes,
    results: "Results",
    *,
    label: str = "model",
    log: str = "",
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    legend: Callable[[str], str] | None = None,
    names: bool = True,
    line: bool = True,
) -> None:
    """Draws the measurements that have an x: ours, and behind them or beside them the paper's.

    What has failed or not run is left out. Shares are drawn in percent.

    Args:
        axes: of `panels`. They become two at a smaller scale than the paper's, or where ours and
            the paper's lie too far apart for one pair.
        results: to draw.
        label: whose values are the series.
        log: the axes that are logarithmic: "", "x", "y" or "xy".
        styles: of the series by name; by default they are models, see `style`.
        legend: the entry of a series in the legend; by default a model's family, or the series.
        names: write the names of the series at their ends.
        line: join the points of a series.
    """
    series = results.groups(label)
    legend = legend or (family if styles is None else str)
    ours = {name: _ours(group.found) for name, group in series.items()}
    papers = {name: _papers(group.found) for name, group in series.items()}
    axes.set(**{f"{name}scale": "log" for name in log})
    apart = _apart(axes, ours.values(), papers.values())
    behind = paper_axes(axes, results, apart=apart) if any(papers.values()) else axes
    if len(series) == 1:  # Its name in the legend is enough.
        legend, names = str, False
    for name in series:
        looks = {**(style(name) if styles is None else styles[name])}
        if not line:
            looks["linestyle"] = "none"
        if papers[name]:
            _draw(behind, papers[name], _hollow(looks), zorder=1)
            _entry(behind, PAPER, _hollow({**looks, "color": _GRAY, "marker": "o"}))
        if ours[name]:
            _draw(axes, ours[name], looks, zorder=3)
            _entry(axes, legend(name), looks)
        if names:
            _name(axes, name, ours[name], looks["color"])
            if behind is not axes:
                _name(behind, name, papers[name], looks["color"])


def _ours(found: "Sequence[Result]") -> list[_Point]:
    drawn = []
    for result in found:
        factor = 100 if result.measurement.percent else 1
        if result.mean is not None and result.measurement.x is not None:
            sd = None if result.sd is None else factor * result.sd
            drawn.append(_Point(result.measurement.x, factor * result.mean, sd))
    return sorted(drawn)


def _papers(found: "Sequence[Result]") -> list[_Point]:
    every = [result.measurement for result in found]
    return sorted(
        _Point(each.paper_x, each.paper, each.paper_sd)
        for each in every
        if each.paper is not None and each.paper_x is not None
    )


def _draw(axes: Axes, drawn: Sequence[_Point], looks: Mapping[str, Any], zorder: int) -> None:
    sds = [0.0 if point.sd is None else point.sd for point in drawn]
    axes.errorbar(
        [point.x for point in drawn],
        [point.y for point in drawn],
        yerr=sds if any(sds) else None,
        capsize=2.5,
        elinewidth=1.2,
        zorder=zorder,
        **{"linewidth": 1.6, **looks},
    )


def _hollow(looks: Mapping[str, Any]) -> dict[str, Any]:
    color = tuple(1 - _FAINT * (1 - np.array(to_rgb(looks["color"]))))
    return {**looks, "color": color, "markerfacecolor": "white", "linewidth": 1.0}


def _entry(axes: Axes, label: str, looks: Mapping[str, Any]) -> None:
    axes.plot([], [], label=label, **{**looks, "markersize": 6.5})


def _name(axes: Axes, name: str, drawn: Sequence[_Point], color: str) -> None:
    if drawn:
        last = drawn[-1]
        text = axes.annotate(
            name,
            (last.x, last.y),
            (7, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=8,
            color=color,
            parse_math=False,
            zorder=5,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white", alpha=0.85)])


def plain(value: float) -> str:
    """A number as a tick of an axis: "0.03", "5000", "30k", "300M"."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:g}{suffix}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:g}"
    digits, exponent = f"{value:e}".split("e")
    factor = "" if float(digits) == 1 else rf"{float(digits):g}\cdot "
    return f"${factor}10^{{{int(exponent)}}}$"


def _apart(
    axes: Axes, ours: Iterable[Sequence[_Point]], papers: Iterable[Sequence[_Point]]
) -> bool:
    """Whether one pair of axes would press ours or the paper's together."""
    mine, theirs = [point for part in ours for point in part], [p for part in papers for p in part]
    if not mine or not theirs:
        return False
    for name, scale in (("x", axes.get_xscale()), ("y", axes.get_yscale())):
        both = [np.array([getattr(point, name) for point in part]) for part in (mine, theirs)]
        # What differs by a tenth, or on a logarithmic axis by half, is close.
        least = 0.1 * max(np.abs(part).max() for part in both)
        if scale == "log":
            both, least = [np.log(part) for part in both], math.log(1.5)
        if np.ptp(np.concatenate(both)) > _APART * max(least, *map(np.ptp, both)):
            return True
    return False


def paper_axes(axes: Axes, results: "Results", *, apart: bool = False) -> Axes:
    """Where the paper's numbers are drawn, which at a smaller scale are of other data.

    Args:
        axes: of ours.
        results: that are drawn there.
        apart: whether they cannot share axes, whatever the scale is.

    Returns:
        The same, or others: right of ours, or below where panels stand beside each other.
    """
    scale = results.setting.scale
    if scale.reduction is None and not apart:
        return axes
    axes.set_gid(f"{scale.name} scale")
    figure, place = axes.figure, axes.get_subplotspec()
    existing = _paper_axes(axes)
    if existing:
        return existing
    alone = place.get_gridspec().ncols == 1
    halves = place.subgridspec(*((1, 2) if alone else (2, 1)))
    axes.set_subplotspec(halves[0])
    paper = figure.add_subplot(halves[1], xscale=axes.get_xscale(), yscale=axes.get_yscale())
    paper.set_gid(_PAPER_AXES)
    return paper


def _paper_axes(axes: Axes) -> Axes | None:
    grid = axes.get_subplotspec().get_gridspec()
    for other in axes.figure.axes:
        if other.get_gid() == _PAPER_AXES and other.get_subplotspec().get_gridspec() is grid:
            return other
    return None


def bars(
    axes: Axes,
    results: "Results",
    *,
    group: str,
    label: str = "model",
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Draws bars in groups: ours, and behind each, wider and hollow, the paper's.

    A bar is the mean of all measurements of its group and series, its error bar the standard
    deviation of that mean over the seeds. It is left out if one of them is missing.

    Args:
        axes: of `panels`. They become two at a smaller scale than the paper's.
        results: to draw.
        group: the label whose values stand side by side along the abscissa.
        label: whose values are the bars of a group.
        styles: of the bars by name, see `series_styles`; by default they follow each other.
    """
    groups, series = list(results.groups(group)), list(results.groups(label))
    styles = styles or series_styles(series)
    width = 0.8 / len(series)
    behind = paper_axes(axes, results)
    for number, name in enumerate(series):
        color = styles[name]["color"]
        for place, each in enumerate(groups):
            found = results.where(**{group: each, label: name}).found
            x = place + (number - (len(series) - 1) / 2) * width
            paper, ours = _paper_mean(found), _mean_over_seeds(found)
            if paper is not None:
                behind.bar(
                    x,
                    paper,
                    0.92 * width,
                    facecolor="white",
                    edgecolor=_hollow({"color": color})["color"],
                    hatch="" if behind is axes else _HATCHES[number],
                )
            if ours is not None:
                axes.bar(
                    x,
                    ours[0],
                    0.6 * width,
                    yerr=ours[1],
                    color=color,
                    hatch=_HATCHES[number],
                    edgecolor="white",
                    capsize=2.5,
                )
        axes.bar(0, 0, label=name, color=color, hatch=_HATCHES[number], edgecolor="white")
    axes.bar(0, 0, label=PAPER, facecolor="white", edgecolor=_GRAY)
    for each in (axes, behind):
        each.set_xticks(range(len(groups)), groups)


def _paper_mean(found: "Sequence[Result]") -> float | None:
    values = [result.measurement.paper for result in found]
    return None if not values or None in values else float(np.mean(values))


def _mean_over_seeds(found: "Sequence[Result]") -> tuple[float, float | None] | None:
    """The mean of all and its standard deviation over seeds; None if one is missing."""
    seeds = [
        [
            (100 if result.measurement.percent else 1) * value
            for result, value in zip(found, values, strict=True)
        ]
        for values in zip(*(result.values for result in found), strict=False)
        if None not in values
    ]
    if not seeds or any(result.mean is None for result in found):
        return None
    return mean_and_sd([float(np.mean(seed)) for seed in seeds])


def finish(figure: Figure) -> Figure:
    """Completes what was drawn: ticks, grid, names that do not overlap, and one legend."""
    for axes in figure.axes:
        paper = None if axes.get_gid() == _PAPER_AXES else _paper_axes(axes)
        if paper:
            _label_both(axes, paper)
        axes.set_title(axes.get_title(), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            _plain_ticks(axis)
    _make_room(figure)
    _add_legend(figure)
    _place_names(figure)
    return figure


def _label_both(axes: Axes, paper: Axes) -> None:
    title = axes.get_title()
    axes.set_title(": ".join(filter(None, (title, axes.get_gid()))))
    paper.set_title(": ".join(filter(None, (title, "the paper"))))
    paper.set(xlabel=axes.get_xlabel(), ylabel=axes.get_ylabel())


def _plain_ticks(axis: Axis) -> None:
    if axis.get_scale() != "log" or not isinstance(axis.get_major_locator(), LogLocator):
        return
    lowest, highest = axis.get_view_interval()
    decades = math.log10(highest / lowest)
    subs = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())


def _make_room(figure: Figure) -> None:
    """Enlarges a figure in which panels have become two."""
    grids = [
        axes.get_subplotspec().get_gridspec()
        for axes in figure.axes
        if axes.get_gid() == _PAPER_AXES
    ]
    if grids:
        rows, columns = grids[0].get_geometry()
        width, height = figure.get_size_inches()
        figure.set_size_inches(width * (1 + 0.8 * (columns - 1)), height * (1 + 0.8 * (rows - 1)))


def _add_legend(figure: Figure) -> None:
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if PAPER in entries:
        entries[PAPER] = entries.pop(PAPER)
    for columns in range(min(len(entries), 5), 0, -1):
        legend = figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            handlelength=3,
        )
        if legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()


def _place_names(figure: Figure) -> None:
    """Puts each name where it hides least of the markers and of the names before it."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        taken = _marks(axes, figure.dpi)
        for text in axes.texts:
            if isinstance(text, Annotation):
                hidden = []
                for number, place in enumerate(_PLACES):
                    _move(text, *place)
                    hidden.append(_overlap(_box(text), taken) + 3 * number)
                _move(text, *_PLACES[int(np.argmin(hidden))])
                taken = np.vstack([taken, _box(text)])


def _move(text: Annotation, x: float, y: float) -> None:
    text.xyann = x, y
    text.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")


def _box(text: Annotation) -> np.ndarray:
    return text.get_window_extent().extents


def _marks(axes: Axes, dpi: float) -> np.ndarray:
    """The corners in pixels [marks, 4] of markers, error bars, and the ticks at the left."""
    left, bottom, right, top = axes.bbox.extents
    boxes = [np.array([[-np.inf, -np.inf, left, np.inf], [left, -np.inf, right, bottom]])]
    for line in axes.lines:
        centers = axes.transData.transform(line.get_xydata())
        radius = dpi / 72 * line.get_markersize() / 2
        boxes.append(np.hstack([centers - radius, centers + radius]))
    for collection in axes.collections:
        if isinstance(collection, LineCollection):
            ends = collection.get_transform().transform(np.concatenate(collection.get_segments()))
            boxes.append(ends.reshape(-1, 4))
    return np.vstack(boxes)


def _overlap(box: np.ndarray, boxes: np.ndarray) -> float:
    """The area in pixels that a box [4] has in common with others [boxes, 4], in sum."""
    sides = np.minimum(box[2:], boxes[:, 2:] + 2) - np.maximum(box[:2], boxes[:, :2] - 2)
    return float(np.prod(np.clip(sides, 0, None), axis=1).sum())
