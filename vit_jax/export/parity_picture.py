"""A picture of the parity of an export: how far each form of the model is from Flax."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vit_jax.evaluation.pictures import RIGHT, WRONG, shortened
from vit_jax.export.precisions import thresholds

_LEAST = 1e-9  # What is drawn of a difference of 0.


def draw(stages: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the largest difference of each stage beside what its precision allows.

    A disc is within the limit, a cross beyond it, a bar the limit: they are told apart without
    their colors.

    Args:
        stages: as in parity.json, each with `name`, `precision` and `relative_difference`.
        path: of a PNG file.
    """
    figure = Figure(
        figsize=(7.5, 1.5 + 0.42 * len(stages)), facecolor="white", layout="constrained"
    )
    axes = figure.add_subplot()
    limits = thresholds()
    for row, stage in enumerate(stages):
        limit = limits[stage["precision"]]["relative_difference"]
        found = stage["relative_difference"]
        found = max(found, _LEAST) if found is not None and math.isfinite(found) else math.inf
        is_within = found <= limit
        shown = min(found, 10.0)
        axes.plot([_LEAST / 10, shown], [row, row], color="#d0d4d9", linewidth=1, zorder=1)
        axes.plot([limit], [row], marker="|", markersize=18, markeredgewidth=2.5, color="black")
        axes.plot(
            [shown],
            [row],
            marker="o" if is_within else "X",
            markersize=9,
            color=RIGHT if is_within else WRONG,
            markeredgecolor="black",
            zorder=3,
        )
        axes.annotate(
            f"{found:.1e}",
            (shown, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlim(_LEAST, 20)
    axes.set_ylim(len(stages) - 0.4, -0.7)
    axes.set_yticks(range(len(stages)), [shortened(str(stage["name"]), 40) for stage in stages])
    axes.set_xlabel("largest difference from Flax in float32, by the largest output")
    axes.set_title("disc: within the limit   cross: beyond it   bar: the limit", fontsize=9)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, format="png", dpi=110)
