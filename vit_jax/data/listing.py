"""A list of images with their labels as a data set: a CSV file, or one of JSON lines.

    path,label              path,labels,split           {"path": "a.jpg", "label": "rose"}
    a.jpg,rose              a.jpg,red;open,train        {"path": "b.jpg", "labels": ["red", "open"]}

A path is relative to the list, or absolute, and may lead anywhere that the user may read: nothing
but an image is read from there.
"""

import contextlib
import csv
import itertools
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vit_jax.data import classes
from vit_jax.data.folder import SPLITS
from vit_jax.data.headers import measure, no_image
from vit_jax.data.labeled_files import (
    Entry,
    FileRules,
    LabeledFiles,
    divide,
    in_hashed_order,
    without_cut_off,
)
from vit_jax.data.survey import Broken, Survey, listed
from vit_jax.errors import UserError, brief, brief_name, first_line

PREFIX = "list:"
SUFFIXES = (".csv", ".jsonl")
_MOST_BYTES = 2**29  # ten million lines of 50
_LONGEST_NAME = 255
_LONGEST_LABEL = 200  # characters
_DEFAULTS = FileRules()


class Line(NamedTuple):
    """A line of a list: its number, an image's path as written, labels, and split if it has one."""

    number: int
    path: str
    labels: tuple[str, ...]
    split: str | None


class _Fault(Exception):
    """Something is wrong with the list at a line."""


def open_list(path: str, rules: FileRules = _DEFAULTS) -> LabeledFiles:
    """Reads a list, and the first bytes of each image in it.

    Of those to evaluate on the last bytes are read too, see `headers.check_end`. Classes are the
    labels of the split "train", or where there is none all: numbers in the order of their values,
    others as text. A list whose lines name no split is divided, see `labeled_files.divide`.

    Args:
        path: of a file of `SUFFIXES`, UTF-8.
        rules: for what is not as it should be.

    Raises:
        UserError: the list cannot be read, or all that is wrong with its images, in one line.
    """
    survey = Survey(f"list {path!r}", rules.broken == "skip", rules.skip_flag, rules.channels)
    file = Path(path).expanduser()
    lines, multi_label = read_list(file)
    entries = _entries(file.parent, lines, survey)
    partition = None
    if lines[0].split is None:
        found, partition = divide(entries, rules, survey)
    else:
        found = _by_split(entries, lines, survey)
    class_names = _class_names(found, survey)
    _check_classes(class_names, rules.least_classes, multi_label, survey)
    survey.check()
    return LabeledFiles(
        survey.what,
        PREFIX + path,
        str(file.parent),
        class_names,
        {x: in_hashed_order(found[x], class_names, multi_label=multi_label) for x in found},
        multi_label=multi_label,
        partition=partition,
        notes=survey.notes(),
    )


def _entries(directory: Path, lines: Sequence[Line], survey: Survey) -> list[Entry]:
    """The images that are there, once each."""
    entries = []
    for line in _without_repetitions(directory, lines, survey):
        path = os.path.join(directory, line.path)
        try:
            size, fault = measure(path, survey.channels), ""
        except (OSError, ValueError) as error:  # ValueError: no path has a NUL in it.
            reason = getattr(error, "strerror", None) or first_line(error)
            fault = f"{path} of line {line.number} cannot be read ({reason}): mend that"
            size = None
        if size is None:
            fault = fault or no_image(path, survey.channels)
            survey.broken[line.path] = Broken(fault, ";".join(line.labels))
        else:
            entries.append(Entry(line.path, path, line.labels, size))
    return entries


def _without_repetitions(directory: Path, lines: Sequence[Line], survey: Survey) -> Iterable[Line]:
    seen: dict[str, Line] = {}
    repeated, contradictions = 0, []
    for line in lines:
        first = seen.setdefault(_identity(os.path.join(directory, line.path)), line)
        if first is line:
            continue
        if (first.labels, first.split) == (line.labels, line.split):
            repeated += 1
        else:
            contradictions.append(
                f"{brief_name(line.path)} in lines {first.number} and {line.number}"
            )
    if contradictions:
        survey.others.append(
            f"{len(contradictions):,} lines contradict others about the labels or the split of an "
            f"image ({listed(contradictions, 4)}): keep one of each"
        )
    if repeated:
        survey.remarks.append(f"{repeated:,} passed over that repeat other lines")
    return seen.values()


def _identity(path: str) -> str:
    """One text for all the ways to name a file: relative, absolute, by links."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # No path has a NUL in it.
        return path


def _by_split(
    entries: Sequence[Entry], lines: Sequence[Line], survey: Survey
) -> dict[str, list[Entry]]:
    split_of = {line.path: line.split for line in lines if line.split}
    found: dict[str, list[Entry]] = {split: [] for split in split_of.values()}
    for entry in entries:
        found[split_of[entry.name]].append(entry)
    for split in found.keys() - {"train"}:
        found[split] = without_cut_off(found[split], survey)
    return found


def _class_names(found: Mapping[str, Sequence[Entry]], survey: Survey) -> tuple[str, ...]:
    labels = {split: {x for entry in part for x in entry.labels} for split, part in found.items()}
    everywhere = set().union(*labels.values())
    known = labels.get("train", everywhere)
    survey.unknown += sorted(map(repr, everywhere - known))
    return classes.in_order(known)


def _check_classes(
    class_names: Sequence[str], least: int, multi_label: bool, survey: Survey
) -> None:
    if not class_names and not survey.broken:
        survey.others.append(f"{survey.what} has no label in it: write one for each image")
    elif class_names and not multi_label and len(class_names) < least:
        survey.others.append(
            f"{survey.what} has one class alone, {class_names[0]!r}, so there is nothing to tell "
            "apart: add images of another"
        )


def read_list(path: Path) -> tuple[list[Line], bool]:
    """The lines of a list, and whether its images may have several labels.

    Raises:
        UserError: the file is missing, too large, no text, or a line is not of its form.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"list {str(path)!r} ends in neither {' nor '.join(SUFFIXES)}: rename it")
    if not path.is_file():
        raise UserError(f"list {str(path)!r} is no file that exists: name one of images and labels")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"list {str(path)!r} has more than {_MOST_BYTES >> 20} MiB: divide it")
    read = _csv_lines if path.suffix.lower() == ".csv" else _json_lines
    with _one_line(path), path.open(encoding="utf-8-sig", newline="") as file:
        lines, kinds = [], set()
        for line, kind in read(file):
            if kinds and (kind not in kinds or (line.split is None) != (lines[0].split is None)):
                raise _Fault(
                    f"line {line.number} differs from line {lines[0].number} in what it has: all "
                    "have label or all labels, and all have a split or none has one"
                )
            kinds.add(kind)
            lines.append(line)
    if not lines:
        raise UserError(f"list {str(path)!r} has no images: write a line for each")
    return lines, kinds == {"labels"}


@contextlib.contextmanager
def _one_line(path: Path) -> Generator[None]:
    """Tells in one line why a list cannot be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        reason = "it is no UTF-8 text, save it as that"
        raise UserError(f"list {str(path)!r} cannot be read: {reason}") from error
    except (OSError, ValueError, csv.Error, RecursionError, _Fault) as error:
        raise UserError(f"list {str(path)!r} cannot be read: {first_line(error)}") from error


def _csv_lines(file: TextIO) -> Iterator[tuple[Line, str]]:
    rows = csv.reader(file, strict=True)
    header = [name.strip().lower() for name in next(rows, [])]
    kinds = [kind for kind in ("label", "labels") if kind in header]
    if "path" not in header or len(kinds) != 1 or len({*header}) < len(header):
        raise _Fault(
            f"its first line is {brief(','.join(header))}: it must name the columns, path and "
            "label, or path and labels, and each once"
        )
    for row in rows:
        if not any(row):
            continue
        if len(row) != len(header):
            raise _Fault(
                f"line {rows.line_num} has {len(row)} columns and the first {len(header)}: put "
                'what has a comma in it between quotes, "a,b.jpg"'
            )
        values = dict(zip(header, row, strict=True))
        text = values[kinds[0]]
        labels = [text] if kinds == ["label"] else [x for x in text.split(";") if x.strip()]
        yield _line(rows.line_num, values["path"], labels, values.get("split")), kinds[0]


def _json_lines(file: TextIO) -> Iterator[tuple[Line, str]]:
    for number, text in zip(itertools.count(1), file, strict=False):
        if not text.strip():
            continue
        values = _object(number, text)
        kinds = [kind for kind in ("label", "labels") if kind in values]
        if "path" not in values or len(kinds) != 1:
            raise _Fault(
                f'line {number} has the keys {brief(", ".join(values))}: it must have "path", and '
                '"label" or "labels"'
            )
        labels = [values["label"]] if kinds == ["label"] else values["labels"]
        if not isinstance(labels, list):
            raise _Fault(f"line {number} has labels {brief(labels)}: they must be a list of texts")
        yield _line(number, values["path"], labels, values.get("split")), kinds[0]


def _object(number: int, text: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"line {number} is no JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise _Fault(f"line {number} is {brief(values)}: it must be an object, {{...}}")
    return values


def _line(number: int, path: Any, labels: Sequence[Any], split: Any) -> Line:
    """A line whose values are of their types."""
    try:
        os.fsencode(path) if isinstance(path, str) else None
    except UnicodeEncodeError:
        path = None
    if not isinstance(path, str) or not path.strip():
        raise _Fault(f"line {number} has no path that can be one")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.split(os.sep)):
        rule = f"no file's name is longer than {_LONGEST_NAME} bytes"
        raise _Fault(f"line {number} has path {brief(path)}: {rule}")
    name = SPLITS.get(str(split).strip().lower()) if split is not None else None
    if split is not None and name is None:
        raise _Fault(f"line {number} has split {brief(split)}: use {', '.join(SPLITS)}")
    found = tuple(dict.fromkeys(_label(number, label) for label in labels))
    return Line(number, path.strip(), found, name)


def _label(number: int, label: Any) -> str:
    text = str(label).strip() if isinstance(label, str | int) else ""
    if not text or isinstance(label, bool) or len(text) > _LONGEST_LABEL:
        raise _Fault(
            f"line {number} has label {brief(label)}: it must be text of 1 to {_LONGEST_LABEL} "
            "characters, or a whole number"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault(f"line {number} has label {brief(label)}, which is no text") from error
    return text
