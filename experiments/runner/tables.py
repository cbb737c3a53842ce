"""The numbers of an experiment beside the paper's: a Markdown table, and CSV."""

import csv as csv_module
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.runner import notes
from vit_jax import runner
from vit_jax.printable import csv_cell, printable

if TYPE_CHECKING:
    from experiments.runner.results import Result, Results

OURS, FAILED, NOT_RUN = "ours", "failed", "not run"
_MOST_LINES = 30
_COLUMNS = (
    "metric",
    "mean",
    "sd",
    "seeds",
    "seeds_asked",
    "paper",
    "paper_sd",
    "reference",
    "x",
    "paper_x",
    "unit",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table, as it is shown.

    Attributes:
        ours: the mean and the standard deviation; "failed", "not run"; or "" if there is nothing to
            run.
        paper: the paper's number; "" if it has none.
        note: which seeds are missing, "2 of 3 seeds".
    """

    ours: str = ""
    paper: str = ""
    note: str = ""

    @property
    def is_missing(self) -> bool:
        """Whether there is something to run and no number."""
        return self.ours in (FAILED, NOT_RUN)

    def __str__(self) -> str:
        paper = f"({self.paper})" if self.paper else ""
        note = f"[{self.note}]" if self.note else ""
        return " ".join(filter(None, (self.ours, note, paper)))


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table: its header, and of each row the labels and the cells."""

    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Cell, ...]], ...]


def grid(results: "Results") -> Grid:
    """The table of results: rows and columns in the order in which their labels appear.

    Raises:
        ValueError: two measurements have the same labels.
    """
    experiment, decimals = results.experiment, _decimals(results)
    cells: dict[tuple[tuple[str, ...], str], Cell] = {}
    only = f"{OURS} ({_reference(results)})" if _has_reference(results) else OURS
    for result in results.found:
        labels = result.measurement.labels
        row = tuple(labels.get(name, "") for name in experiment.rows)
        place = row, labels.get(experiment.column, only)
        if place in cells:
            raise ValueError(f"{experiment.name} has two measurements of {dict(labels)}")
        cells[place] = _cell(result, decimals)
    rows, columns = (dict.fromkeys(place[part] for place in cells) for part in (0, 1))
    return Grid(
        experiment.rows,
        tuple(columns),
        tuple((row, tuple(cells.get((row, each), Cell()) for each in columns)) for row in rows),
    )


def _has_reference(results: "Results") -> bool:
    return any(result.measurement.paper is not None for result in results.found)


def _reference(results: "Results") -> str:
    return results.experiment.reference or "paper"


def _decimals(results: "Results") -> int:
    """The decimals of the paper's shares: one in Table 9, two in Table 5."""
    every = [result.measurement for result in results.found]
    shares = [each.paper for each in every if each.percent and each.paper is not None]
    return 1 if all(round(share, 1) == share for share in shares) else 2


def _cell(result: "Result", decimals: int) -> Cell:
    measurement, found = result.measurement, [x for x in result.values if x is not None]
    paper = _number(measurement.paper, measurement.paper_sd)
    if measurement.percent and measurement.paper is not None and measurement.paper_sd is None:
        paper = f"{measurement.paper:.{decimals}f}"
    if not result.values:
        return Cell(paper=paper)
    if result.mean is None:
        has_run = any("failed" in problem for problem in result.problems)
        return Cell(FAILED if has_run else NOT_RUN, paper)
    missing = len(found) < len(result.values)
    note = f"{len(found)} of {len(result.values)} seeds" if missing else ""
    show = runner.percent if measurement.percent else _number
    return Cell(show(result.mean, result.sd), paper, note)


def _number(mean: float | None, sd: float | None = None) -> str:
    """A number in the unit in which it is shown: "4262", "1.2e-05" or "88.55 ± 0.04"."""
    if mean is None:
        return ""
    if sd is None:
        return f"{mean:.4g}"
    return f"{mean:.2f} ± {sd:.2f}" if abs(mean) >= 1 else f"{mean:.4g} ± {sd:.2g}"


def caption(results: "Results") -> list[str]:
    """Sentences that say what the numbers are, and what cannot be compared with the paper's."""
    return [
        _what(results),
        *_part(results.setting.only),
        *notes.about_accuracies(results),
        results.setting.scale.summary,
        *notes.about_data((x.measurement for x in results.found), results.setting),
    ]


def _part(only: Mapping[str, Sequence[str]]) -> list[str]:
    chosen = " and ".join(f"{label} {', '.join(values)}" for label, values in only.items())
    return [f"A part of the experiment: only {chosen}."] if only else []


def _what(results: "Results") -> str:
    seeds = max((len(result.values) for result in results.found), default=0)
    mean = f": the mean ± the sample standard deviation over seeds, {seeds} at most"
    words = mean if seeds > 1 else ", each of one seed"
    if not _has_reference(results):
        return f"Shares are in percent{words}."
    other = results.experiment.reference
    of = f"what was {other} and is not in the paper" if other else "the paper's number"
    return f"Shares are in percent{words}; in parentheses {of}."


def markdown(results: "Results") -> str:
    """The table in Markdown: below it what the numbers are, and a line for each that is missing.

    Text from files neither ends a cell nor begins a line.

    Raises:
        ValueError: see `grid`.
    """
    table = grid(results)
    parts = [
        f"# {results.experiment.title}",
        runner.markdown(
            (*table.labels, *table.columns),
            [(*labels, *map(str, cells)) for labels, cells in table.rows],
            words=len(table.labels),
        ),
        "\n".join(map(printable, caption(results))),
    ]
    if results.problems:
        parts.append("Missing:\n\n" + "\n".join(f"- {line}" for line in _missing(results)))
    return "\n\n".join(parts)


def _missing(results: "Results") -> list[str]:
    # What failed is news, what has not run is known to whoever stopped it.
    lines = sorted(map(printable, results.problems), key=lambda line: "failed" not in line)
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"{more} more, see results.jsonl"]


def csv(results: "Results") -> str:
    """The table as CSV, a row for each measurement.

    The columns are the experiment, the scale, the labels, then "metric", "mean", "sd" (over
    "seeds", those that are there, of "seeds_asked"), "paper", "paper_sd",
    "reference" (what these are, if they are not the paper's), "x", "paper_x" and "unit": "%" or "".
    What is missing is empty; a text that a spreadsheet would take for a formula is marked as text.
    """
    labels = list(dict.fromkeys(name for x in results.found for name in x.measurement.labels))
    file = io.StringIO()
    writer = csv_module.writer(file, lineterminator="\n")
    writer.writerow(["experiment", "scale", *labels, *_COLUMNS])
    for result in results.found:
        own = [csv_cell(result.measurement.labels.get(name, "")) for name in labels]
        about = [results.experiment.name, results.setting.scale.name, *own]
        writer.writerow([*about, *_values(result, results.experiment.reference)])
    return file.getvalue()


def _values(result: "Result", reference: str) -> list[object]:
    """What stands in `_COLUMNS`."""
    measurement, factor = result.measurement, 100 if result.measurement.percent else 1
    return [
        csv_cell(measurement.metric),
        *(None if value is None else factor * value for value in (result.mean, result.sd)),
        sum(value is not None for value in result.values),
        len(result.values),
        measurement.paper,
        measurement.paper_sd,
        reference if measurement.paper is not None else "",
        measurement.x,
        measurement.paper_x,
        "%" if measurement.percent else "",
    ]
