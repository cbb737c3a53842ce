"""The index of "How to train your ViT?" (https://arxiv.org/abs/2106.10270): which file to take.

Each row of `index.csv` names one pre-trained model and one of its fine-tunes. Columns and the rule
of recommendation are those of github.com/google-research/vision_transformer: the columns from the
docstring of `get_augreg_df` in vit_jax/checkpoint.py, the pre-trained choice from vit_jax/train.py,
the choice of a fine-tune from vit_jax_augreg.ipynb.
"""

import csv
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, first_line
from vit_jax.printable import printable

# Its paper counts more than 50,000 models.
MAX_BYTES = 64 << 20
MAX_ROWS = 250_000
_LISTED = 50

UPSTREAM = ("i21k", "i21k_30", "i1k")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A row of the index; scores are fractions, NaN where the index has none.

    Attributes:
        name: the model as in the paper, "R26+S/32".
        ds: the upstream data set: "i21k" (300 epochs), "i21k_30" (30 epochs) or "i1k".
        final_val: upstream validation score of the pre-trained model.
        filename: the pre-trained model, `augreg/{filename}.npz` in the bucket.
        adapt_ds: the data set of the fine-tune.
        adapt_resolution: its side of the image, pixels.
        adapt_final_val: its validation score.
        adapt_final_test: its test score; on ImageNet that of the official validation set.
        adapt_filename: the fine-tune, `augreg/{adapt_filename}.npz` in the bucket.
    """

    name: str
    ds: str
    final_val: float
    filename: str
    adapt_ds: str
    adapt_resolution: int
    adapt_final_val: float
    adapt_final_test: float
    adapt_filename: str


def read_index(path: str | os.PathLike[str]) -> list[Entry]:
    """Reads `index.csv`, of at most `MAX_BYTES` and `MAX_ROWS`, once and row by row.

    Raises:
        UserError: it is unreadable, too large, empty, or lacks a column.
    """
    path = Path(path)
    columns = [field.name for field in dataclasses.fields(Entry)]
    try:
        if not path.is_file():  # To open a FIFO would wait for ever.
            raise ValueError("no file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise ValueError(f"column {missing[0]} is missing")
            entries = [_entry(row) for row in itertools.islice(reader, MAX_ROWS + 1)]
        if len(entries) > MAX_ROWS:
            raise ValueError(f"more than {MAX_ROWS} rows")
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        reason = printable(first_line(error))
        raise UserError(
            f"{path} is not the index of AugReg ({reason}): delete it, and it is fetched again"
        ) from error
    if not entries:
        raise UserError(f"{path} has no rows: delete it, and it is fetched again")
    return entries


def query(
    index: Sequence[Entry],
    name: str,
    *,
    upstream: str = "i21k",
    dataset: str | None = None,
    resolution: int | None = None,
) -> list[Entry]:
    """The rows of one model, in the order of the index.

    Args:
        index: what `read_index` gave.
        name: the model as in file names, "R26_S_32", or as in the paper, "R26+S/32".
        upstream: one of `UPSTREAM`.
        dataset: of the fine-tune, under its name in the index or in TFDS; all of them by default.
        resolution: of the fine-tune, pixels; all of them by default.

    Raises:
        UserError: there is no such row; the message says what there is.
    """
    model = model_of(name)
    rows = _select(index, "model", name, lambda row: model_of(row.filename), model)
    rows = _select(rows, f"upstream data set of {model}", upstream, lambda row: row.ds, upstream)
    if dataset is not None:
        key, about = _dataset_key(dataset), f"fine-tuning data set of {model}"
        rows = _select(rows, about, dataset, lambda row: _dataset_key(row.adapt_ds), key)
    if resolution is not None:
        about = f"resolution of {model}" + (f" on {dataset}" if dataset else "")
        rows = _select(rows, about, resolution, lambda row: row.adapt_resolution, resolution)
    return rows


def best(
    index: Sequence[Entry],
    name: str,
    *,
    upstream: str = "i21k",
    dataset: str | None = None,
    resolution: int | None = None,
) -> Entry:
    """The row whose file is recommended.

    The pre-trained model is the one of the best upstream validation score; its fine-tune, where
    `dataset` names one, is that of the best validation score after fine-tuning. Of equals the first
    in the index.

    Raises:
        UserError: as `query`; or no candidate has a score; or a resolution without a data set.
    """
    if dataset is None and resolution is not None:
        raise UserError(
            f"resolution {resolution} without a data set: only fine-tunes have one, name theirs"
        )
    pretrained = _highest(query(index, name, upstream=upstream), "final_val")
    if dataset is None:
        return pretrained
    siblings = [row for row in index if row.filename == pretrained.filename]
    finetunes = query(siblings, name, upstream=upstream, dataset=dataset, resolution=resolution)
    return _highest(finetunes, "adapt_final_val")


def recommended(
    index: Sequence[Entry],
    name: str,
    dataset: str | None = None,
    resolution: int | None = None,
    upstream: str = "i21k",
) -> str:
    """The recommended file, by the rule of `best`: `augreg/{...}.npz` in the bucket."""
    row = best(index, name, upstream=upstream, dataset=dataset, resolution=resolution)
    return row.filename if dataset is None else row.adapt_filename


def model_of(name: str) -> str:
    """The model in a name or a file name: "R26_S_32" for "R26+S/32" and "R26_S_32-i21k-..."."""
    return name.split("-")[0].replace("/", "_").replace("+", "_")


def _entry(row: dict[str, str | None]) -> Entry:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Entry):
        text = row[field.name]
        if text is None:
            raise ValueError("a row is cut short")
        if field.type is float:
            values[field.name] = float(text or "nan")
        else:
            values[field.name] = int(float(text or 0)) if field.type is int else text
    return Entry(**values)


def _dataset_key(dataset: str) -> str:
    return dataset.lower().replace("_", "-")  # "oxford_iiit_pet" is TFDS's "oxford-iiit-pet"


def _select(
    rows: Sequence[Entry],
    about: str,
    asked: str | int,
    key: Callable[[Entry], str | int],
    wanted: str | int,
) -> list[Entry]:
    selected = [row for row in rows if key(row) == wanted]
    if not selected:
        there = sorted({key(row) for row in rows} - {""})
        some = [printable(str(x)[:100]) for x in there[:_LISTED]]
        rest = [f"and {len(there) - _LISTED} more"] * (len(there) > _LISTED)
        listed = ", ".join([*some, *rest]) or "none"
        raise UserError(f"{asked!r} is no {about}: there is {listed}")
    return selected


def _highest(rows: Sequence[Entry], score: str) -> Entry:
    scored = [row for row in rows if math.isfinite(getattr(row, score))]
    if not scored:
        name = printable(rows[0].filename[:200])
        raise UserError(f"{name} has no {score} in the index: name a file yourself")
    return max(scored, key=lambda row: getattr(row, score))
