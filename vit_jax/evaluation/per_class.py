"""Precision, recall and F1 of each class, and the classes that are taken for another."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.printable import csv_cell

_READABLE = 30  # classes of a confusion matrix


class ClassScores(NamedTuple):
    """The scores of each class, float64 [classes] in [0, 1], NaN where they are of nothing.

    Attributes:
        precision: the share of the images predicted to be of a class that are; NaN if none is.
        recall: the share of a class' images that are predicted; NaN where it has none.
        f1: their harmonic mean; NaN where the class is neither predicted nor there.
        images: int64, how many a class has.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    images: np.ndarray

    def row(self, index: int) -> dict[str, Any]:
        """The scores of a class for JSON, null where there is none."""
        shares = {name: float(getattr(self, name)[index]) for name in self._fields[:3]}
        rounded = {name: None if np.isnan(x) else x for name, x in shares.items()}
        return {**rounded, "examples": int(self.images[index])}


def write_per_class(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table of classes, a row with a "name" for each, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "name": csv_cell(row["name"])} for row in rows)


def class_scores(hits: np.ndarray, predicted: np.ndarray, images: np.ndarray) -> ClassScores:
    """The scores of classes from three counts of images, int64 [classes] each.

    Args:
        hits: rightly predicted to be of the class.
        predicted: to be of the class.
        images: of the class.
    """
    return ClassScores(
        precision=_share(hits, predicted),
        recall=_share(hits, images),
        f1=_share(2 * hits, predicted + images),
        images=images,
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


class Confusion(NamedTuple):
    """A class that is taken for another, by their indices, and how many images of it are."""

    true: int
    predicted: int
    images: int


def most_confused(labels: np.ndarray, predicted: np.ndarray, count: int) -> list[Confusion]:
    """The pairs of classes that are confused most, those of most images first.

    Args:
        labels: int [images].
        predicted: likewise.
        count: how many pairs, at most; equal ones are in the order of the classes.
    """
    wrong = labels != predicted
    pairs = np.stack([labels[wrong], predicted[wrong]], axis=1)
    pairs, images = np.unique(pairs, axis=0, return_counts=True)
    first = np.argsort(-images, kind="stable")[:count]
    return [Confusion(*map(int, (*pairs[i], images[i]))) for i in first]


def confused_classes(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, most: int
) -> np.ndarray:
    """The classes that are confused most, ascending: all where they are no more than `most`.

    Args:
        labels: int [images].
        predicted: likewise.
        num_classes: of the model.
        most: how many classes, at most.
    """
    pairs = most_confused(labels, predicted, most * most)
    # A dictionary keeps the order in which its keys came.
    found = dict.fromkeys(index for pair in pairs for index in (pair.true, pair.predicted))
    found |= dict.fromkeys(range(min(num_classes, most))) if len(found) < most else {}
    return np.sort(list(found)[:most])


def confusion_among(labels: np.ndarray, predicted: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Images by [true, predicted] class of some classes, int64 [chosen, chosen].

    Args:
        labels: int [images].
        predicted: likewise.
        chosen: classes, ascending.
    """
    both = np.isin(labels, chosen) & np.isin(predicted, chosen)
    matrix = np.zeros((len(chosen),) * 2, np.int64)
    places = (np.searchsorted(chosen, x[both]) for x in (labels, predicted))
    np.add.at(matrix, tuple(places), 1)
    return matrix


def readable_confusion(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str], int]:
    """The arguments of `pictures.confusion_matrix`, of as many classes as can be read.

    Args:
        labels: int [images].
        predicted: likewise.
        names: of all classes.
    """
    chosen = confused_classes(labels, predicted, len(names), _READABLE)
    counts = confusion_among(labels, predicted, chosen)
    images = np.bincount(labels, minlength=len(names))[chosen]
    return counts, images, [names[i] for i in chosen], len(names)
