"""Training curves, read from the metrics.jsonl of a run."""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError
from vit_jax.files import storage_errors

METRICS = "metrics.jsonl"
_EVALUATION = "eval_"
_MOST_SCORES = 6
# Of a curve with fewer points a mean over the past shows mostly how late it is.
_SMOOTHED_FROM, _SMOOTHING = 50, 0.8
# What a line of training says beside these is about speed and cost.
_OF_TRAINING = ("loss", "accuracy", "learning_rate", "grad_norm")


class Curve(NamedTuple):
    """The values of one metric, [points] each.

    Attributes:
        steps: at which they were logged.
        values: of training, means over the steps since the point before; of an evaluation, of all
            its images.
    """

    steps: np.ndarray
    values: np.ndarray


class Panel(NamedTuple):
    """A metric, in training and in the evaluation that decides; None where a run has none."""

    name: str
    training: Curve | None
    evaluation: Curve | None

    def curves(self) -> list[tuple[str, Curve]]:
        """The scalars that there are, with "training" or "evaluation" before each."""
        pairs = (("training", self.training), ("evaluation", self.evaluation))
        return [(kind, curve) for kind, curve in pairs if curve]


def read_panels(run: pathlib.Path) -> list[Panel]:
    """Reads the curves of a run that goes on or is finished, in the order in which to show them.

    They are the loss, what the evaluation scores, the learning rate and the norm of the gradient.
    A line that is no record, as the last one of a run that was killed while it wrote, is left out,
    and so is a value that is no finite number.

    Args:
        run: its workdir.

    Raises:
        UserError: it has no metrics.jsonl that can be read, or nothing is logged in it yet.
    """
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{run} has no {METRICS}: give the workdir of a run")
    with storage_errors(lambda reason: f"{path} cannot be read: {reason}"):
        lines = path.read_bytes().splitlines()
    records = [record for line in lines if (record := _record(line))]
    keys = dict.fromkeys(key for record in records for key in record)
    evaluated = [key.removeprefix(_EVALUATION) for key in keys if key.startswith(_EVALUATION)]
    scores = [*dict.fromkeys(name for name in ("accuracy", *evaluated) if name != "loss")]
    panels = [
        Panel(
            name,
            curve_of(records, name) if name in _OF_TRAINING else None,
            curve_of(records, _EVALUATION + name),
        )
        for name in ("loss", *scores[:_MOST_SCORES], "learning_rate", "grad_norm")
    ]
    if panels := [panel for panel in panels if panel.training or panel.evaluation]:
        return panels
    raise UserError(f"{path} has no metrics yet: wait for the run's first line of progress")


def curve_of(records: Iterable[dict[str, float]], key: str) -> Curve | None:
    """Collects one metric of records that have "step"; None if none of them has it.

    Args:
        records: lines of a metrics.jsonl.
        key: of the metric.
    """
    points = [(record["step"], record[key]) for record in records if key in record]
    return Curve(*np.array(points, np.float64).T) if points else None


def smooth(values: np.ndarray, constant: float) -> np.ndarray:
    """Returns exponential means: of all values up to each, weighted by constant ** age.

    The weights are divided by their sum, so that the first values are not drawn toward 0.

    Args:
        values: [points].
        constant: from 0, which changes nothing, to below 1.
    """
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = constant * total + value, constant * weight + 1
        means.append(total / weight)
    return np.array(means)


def default_smoothing(panels: Iterable[Panel]) -> float:
    """The constant that suits the curves of training: 0, none at all, for short ones."""
    longest = max((len(x.training.steps) for x in panels if x.training), default=0)
    return _SMOOTHING if longest >= _SMOOTHED_FROM else 0.0


def _record(line: bytes) -> dict[str, float] | None:
    """The finite numbers of a line, None if it is no record of a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    finite = {key: float(x) for key, x in record.items() if _is_number(x)}
    return finite if "step" in finite else None


def _is_number(value: object) -> bool:
    # An integer beyond all floats would raise an error in isfinite.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )
