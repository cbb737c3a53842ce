"""HTML to look at: a page for each experiment, and an index of them.

A page loads nothing but its picture, which lies beside it, and runs no script. Whatever comes from
files or from a user is escaped by `webpage.text`.
"""

import contextlib
import csv
import dataclasses
import html
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.runner import graph, notes, tables
from experiments.runner.outcomes import SECONDS_A_DAY, TASK_FILE
from vit_jax import webpage
from vit_jax.files import atomic_write
from vit_jax.webpage import text as _text

if TYPE_CHECKING:
    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

INDEX = "index.html"
PICTURE = "picture.png"
RUNS = "runs"
_STYLE = pathlib.Path(__file__).with_suffix(".css")
_FILES = {
    "table.md": "the table in Markdown",
    "table.csv": "in CSV",
    "results.jsonl": "every number with its run",
    PICTURE: "the picture",
}
_MOST_OPEN = 8
_CSV, _RECORDS = "table.csv", "results.jsonl"
_PREVIEWED = 6  # Lines of a table on a card.


@dataclasses.dataclass(frozen=True)
class Cost:
    """What finished runs took.

    Attributes:
        jobs: how many there are; a task counts as one.
        steps: of training.
        seconds: of training on all devices, and of tasks.
        exaflops: of training.
    """

    jobs: int = 0
    steps: int = 0
    seconds: float = 0.0
    exaflops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(first + second for first, second in pairs))


def write(results: "Results", folder: pathlib.Path) -> pathlib.Path:
    """Writes the page of an experiment, FOLDER/NAME.html, and returns its path.

    Args:
        results: to show.
        folder: of the scale. The runs lie in its RUNS/, the picture, if there is one, in NAME/.

    Raises:
        UserError: the page cannot be written.
        ValueError: see `tables.grid`.
    """
    experiment, name = results.experiment, results.experiment.name
    scale = results.setting.scale.name
    body = [
        f'<nav><a href="{INDEX}">All experiments</a> · scale {_text(scale)}</nav>',
        f"<h1>{_text(experiment.title)}</h1>",
        f"<p>{_text(experiment.about)}</p>" if experiment.about else "",
        _overview(tables.caption(results), _costs(results, folder)),
        _problems(results.problems),
        _picture(results, folder),
        _table(tables.grid(results)),
        "<h2>The command</h2>",
        f"<pre><code>{_text(_command(results))}</code></pre>",
        _links(folder, name),
    ]
    return _write(folder / f"{name}.html", experiment.title, body)


def write_index(all_results: "Sequence[Results]", folder: pathlib.Path) -> pathlib.Path:
    """Writes FOLDER/index.html, with a card for each experiment, and returns its path.

    Pages that lie there from earlier commands have a card too.

    Args:
        all_results: of the experiments.
        folder: see `write`.

    Raises:
        UserError: it cannot be written.
    """
    setting = all_results[0].setting
    cards = [_card(results, folder) for results in all_results]
    known = {INDEX, *(f"{results.experiment.name}.html" for results in all_results)}
    earlier = sorted(page for page in folder.glob("*.html") if page.name not in known)
    lines = [_read_csv(page.with_suffix("") / _CSV) for page in earlier]
    cards += [_earlier_card(*each) for each in zip(earlier, lines, strict=True)]
    measurements = [x.measurement for results in all_results for x in results.found]
    finished = sum(not results.problems for results in all_results)
    finished += sum(_count(each) == (len(each), len(each)) for each in map(_asked, lines) if each)
    total = sum((_cost(path) for path in _finished(folder).values()), Cost())
    title = f"Experiments, scale {setting.scale.name}"
    body = [
        f"<h1>{_text(title)}</h1>",
        "<p>The tables and figures of “An Image is Worth 16x16 Words” "
        '(<a href="https://arxiv.org/abs/2010.11929">arXiv 2010.11929</a>)'
        f"{_made_by(len(all_results))}.</p>",
        _overview(
            (setting.scale.summary, *notes.about_data(measurements, setting)),
            {"Experiments": f"{finished} of {len(cards)} are complete", **_describe(total)},
        ),
        f'<ul class="cards">{"".join(cards)}</ul>',
    ]
    return _write(folder / INDEX, title, body)


def _write(path: pathlib.Path, title: str, body: Iterable[str]) -> pathlib.Path:
    page = webpage.document(title, body, _STYLE.read_text(encoding="utf-8"))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _overview(sentences: Iterable[str], facts: Mapping[str, str]) -> str:
    notice = "".join(f"<p>{_text(sentence)}</p>" for sentence in sentences)
    parts = (f"<dt>{_text(name)}</dt><dd>{_text(x)}</dd>" for name, x in facts.items())
    return f'<div class="overview"><div class="scale">{notice}</div><dl>{"".join(parts)}</dl></div>'


def _problems(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    is_open = " open" if len(lines) <= _MOST_OPEN else ""
    return (
        f'<details class="scale problems"{is_open}><summary>Missing: {len(lines)} runs</summary>'
        f"<ul>{items}</ul></details>"
    )


def _picture(results: "Results", folder: pathlib.Path) -> str:
    name = results.experiment.name
    if not (folder / name / PICTURE).exists():
        return ""
    alt = f"The picture of {results.experiment.title}; its numbers are in the table below."
    path = f"{_text(name)}/{PICTURE}"
    return f'<a class="picture" href="{path}"><img src="{path}" alt="{_text(alt)}"></a>'


def _table(grid: tables.Grid) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in grid.labels)
    head += "".join(f'<th class="number">{_text(name)}</th>' for name in grid.columns)
    rows = [labels for labels, _ in grid.rows]
    body = "".join(
        f"<tr>{_row_labels(rows, number)}{''.join(map(_cell, cells))}</tr>"
        for number, (_, cells) in enumerate(grid.rows)
    )
    return (
        '<div class="table" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row_labels(rows: Sequence[Sequence[str]], number: int) -> str:
    """The labels of a row; one that the rows below share with it reaches over them."""
    labels, found = rows[number], []
    for end in range(1, len(labels) + 1):
        if number and rows[number - 1][:end] == labels[:end]:
            continue
        alike = [row[:end] == labels[:end] for row in rows[number:]]
        span = [*alike, False].index(False) if end < len(labels) else 1
        reach = f' rowspan="{span}"' if span > 1 else ""
        found.append(f'<th scope="row"{reach}>{_text(labels[end - 1])}</th>')
    return "".join(found)


def _cell(cell: tables.Cell) -> str:
    missing = ' class="missing"' if cell.is_missing else ""
    note = f' <span class="note">{_text(cell.note)}</span>' if cell.note else ""
    paper = f'<span class="paper">({_text(cell.paper)})</span>' if cell.paper else ""
    return f"<td><span{missing}>{_text(cell.ours)}</span>{note}{paper}</td>"


def _command(results: "Results") -> str:
    """The command that makes this page."""
    setting = results.setting
    words = [
        "python",
        "-m",
        f"experiments.{results.experiment.name}",
        "--scale",
        setting.scale.name,
    ]
    if setting.seeds != setting.scale.seeds:
        words += ["--seeds", str(setting.seeds)]
    for name, value in _flags(setting).items():
        words += [f"--{name}", value]
    for label, values in setting.only.items():
        words += ["--only", f"{label}={','.join(values)}"]
    return shlex.join(words)


def _flags(setting: "Setting") -> Mapping[str, str]:
    flags = dict(setting.datasets)
    for what in ("images", "classes"):
        flags |= {f"{name}_{what}": str(x) for name, x in getattr(setting, what).items()}
    return flags | ({"data_dir": setting.data_dir} if setting.data_dir else {})


def _costs(results: "Results", folder: pathlib.Path) -> dict[str, str]:
    """What all took that the experiment needs, also what other experiments need too."""
    jobs = graph.collect(result.measurement for result in results.found)
    finished = [path for name, path in _finished(folder).items() if name in jobs]
    facts = _describe(sum(map(_cost, finished), Cost()))
    return {**facts, "Finished": f"{len(finished):,} of {len(jobs):,} runs"}


def _describe(cost: Cost) -> dict[str, str]:
    from vit_jax.reporting import format_seconds  # It imports JAX.

    return {
        "Finished": f"{cost.jobs:,} runs",
        "Steps": f"{cost.steps:,}",
        "Time": f"{format_seconds(cost.seconds)} of training, summed over devices, without "
        "compilation and evaluation",
        "Arithmetic": f"{cost.exaflops:.3g} exaFLOPs",
    }


def _finished(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {path.parent.name: path.parent for path in folder.glob(f"{RUNS}/*/metrics.json")}


def _cost(workdir: pathlib.Path) -> Cost:
    """What a finished run took; of files that are damaged or missing nothing is counted."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
        if (workdir / TASK_FILE).exists():
            task = json.loads((workdir / TASK_FILE).read_text())
            return Cost(jobs=1, seconds=task["seconds"])
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        last = next(x for x in map(json.loads, reversed(lines)) if "device_days" in x)
        return Cost(1, last["step"], SECONDS_A_DAY * last["device_days"], last["exaflops"])
    return Cost(jobs=1)


def _links(folder: pathlib.Path, name: str) -> str:
    links = [
        f'<a href="{_text(name)}/{file}">{what}</a>'
        for file, what in _FILES.items()
        if (folder / name / file).exists()
    ]
    return f"<p>Files: {', '.join(links)}.</p>" if links else ""


def _made_by(experiments: int) -> str:
    return ", made by <code>python -m experiments.all</code>" if experiments > 1 else ""


def _card(results: "Results", folder: pathlib.Path) -> str:
    asked = [result for result in results.found if result.values]
    there = sum(result.mean is not None for result in asked)
    whole = sum(None not in result.values for result in asked)
    failed = sum(" failed" in line for line in results.problems)
    name = results.experiment.name
    if (folder / name / PICTURE).exists():
        thumbnail = f'<img src="{_text(name)}/{PICTURE}" alt="" loading="lazy">'
    else:
        thumbnail = _preview(tables.grid(results))
    status = _status(there, len(asked), whole, failed)
    return _card_of(name, results.experiment.title, thumbnail, status, whole < len(asked))


def _status(there: int, asked: int, whole: int, failed: int) -> str:
    """How far an experiment is, of its numbers and of what they are the mean of."""
    parts = [f"{there:,} of {asked:,} numbers"]
    if whole < there:
        parts.append(f"{there - whole:,} without some seeds")
    if failed:
        parts.append(f"{failed:,} {'run' if failed == 1 else 'runs'} failed")
    return ", ".join(parts)


def _preview(grid: tables.Grid) -> str:
    """A corner of the table, of our numbers alone."""
    columns = slice(0, 2)
    head = "".join(f'<th class="number">{_text(name)}</th>' for name in grid.columns[columns])
    rows = [
        (labels[:2], [cell.ours for cell in cells[columns]])
        for labels, cells in grid.rows[:_PREVIEWED]
    ]
    return f"<table><tr><th></th>{head}</tr>{''.join(map(_preview_row, rows))}</table>"


def _preview_row(row: tuple[Sequence[str], Sequence[str]]) -> str:
    labels, numbers = row
    cells = "".join(f"<td>{_text(number)}</td>" for number in numbers)
    return f"<tr><th>{_text(' · '.join(filter(None, labels)))}</th>{cells}</tr>"


def _read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """The lines of an earlier table.csv; none if it is missing or damaged."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        for line in lines:
            float(line["mean"] or 0), int(line["seeds"]), int(line["seeds_asked"]), line["metric"]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []
    return lines


def _asked(lines: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    return [line for line in lines if line["seeds_asked"] != "0"]


def _count(asked: Iterable[Mapping[str, str]]) -> tuple[int, int]:
    """Of how many lines of a table.csv there is a number, and of all seeds."""
    seeds = [(line["seeds"], line["seeds_asked"]) for line in asked]
    return sum(there != "0" for there, _ in seeds), sum(there == all_of for there, all_of in seeds)


def _failed(path: pathlib.Path) -> int:
    """The runs that an earlier results.jsonl says failed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return len({r.get("run") for r in records if " failed" in str(r.get("problem"))})
    return 0


def _earlier_card(page: pathlib.Path, lines: Sequence[Mapping[str, str]]) -> str:
    """The card of a page that an earlier command made, by the files that it left."""
    found = re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8", errors="replace"))
    title = html.unescape(found[1]) if found else page.stem
    folder, asked = page.with_suffix(""), _asked(lines)
    rows = "".join(map(_preview_row, map(_shown, lines[:_PREVIEWED])))
    thumbnail = f"<table>{rows}</table>" if rows else f"<p>{_text(title)}</p>"
    if (folder / PICTURE).exists():
        thumbnail = f'<img src="{_text(page.stem)}/{PICTURE}" alt="" loading="lazy">'
    there, whole = _count(asked)
    status = _status(there, len(asked), whole, _failed(folder / _RECORDS))
    status = f"{status}, by an earlier command" if asked else "made by an earlier command"
    return _card_of(page.stem, title, thumbnail, status, whole < len(asked))


def _shown(line: Mapping[str, str]) -> tuple[Sequence[str], Sequence[str]]:
    """The labels and the number of a line of a table.csv."""
    names = list(line)[2:]  # Behind the experiment and the scale.
    labels = [line[name] for name in names[: names.index("metric")]]
    mean = f"{float(line['mean']):.4g}" if line["mean"] else ""
    return labels, [mean]


def _card_of(name: str, title: str, thumbnail: str, status: str, missing: bool) -> str:
    return (
        f'<li><a href="{_text(name)}.html"><div class="thumbnail" aria-hidden="true">{thumbnail}'
        f'</div><div class="card-text"><span class="card-title">{_text(title)}</span>'
        f'<span class="status{" missing" if missing else ""}">{_text(status)}</span></div></a></li>'
    )
