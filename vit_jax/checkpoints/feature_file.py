"""A file of the features of a data set, with fingerprints of all that they depend on.

It is an `.npz` that `numpy.load` opens: `train/features` [rows, features], `train/labels` [rows],
the same of `test`, and fingerprints, everything in float32, which holds a label up to 2^24
exactly. It is read as any file of a stranger, see `arrays`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.arrays import read_arrays
from vit_jax.checkpoints.formats.npz import write_npz
from vit_jax.errors import UserError

SPLITS = ("train", "test")


class Features(NamedTuple):
    """Features of images and their labels.

    Attributes:
        values: float32 [rows, features].
        labels: int32 [rows], or of images of several labels 0 and 1, [rows, classes].
    """

    values: np.ndarray
    labels: np.ndarray


Fingerprints = Mapping[str, bytes]


def fingerprint_params(params: Any) -> bytes:
    """A digest of the names, shapes and values of parameters, nested dicts of arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{name} {array.dtype}{array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def fingerprint_text(*values: Any, lines: Iterable[str] = ()) -> bytes:
    """A digest of JSON-like values, and of lines such as the ids of images."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for line in lines:
        # A file's name may have bytes that are no text.
        digest.update(line.encode(errors="surrogateescape") + b"\0")
    return digest.digest()


def write_features(
    path: str | os.PathLike[str], splits: Mapping[str, Features], fingerprints: Fingerprints
) -> None:
    """Writes features, whole or not at all.

    Args:
        path: of the file, whose place it takes.
        splits: by `SPLITS`.
        fingerprints: by what they are of.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {f"fingerprint/{name}": _numbers(x) for name, x in fingerprints.items()}
    for name, features in splits.items():
        arrays |= {f"{name}/features": features.values, f"{name}/labels": features.labels}
    write_npz(path, arrays)


def read_features(
    path: str | os.PathLike[str],
    fingerprints: Fingerprints,
    rows: Mapping[str, int],
    width: int,
    num_classes: int,
    several_labels: bool = False,
) -> dict[str, Features]:
    """Reads features that were written for the same weights, preprocessing and images.

    Args:
        path: of the file.
        fingerprints: of now.
        rows: of each of `SPLITS`.
        width: how many features an image has.
        num_classes: what labels are below.
        several_labels: whether an image has any number of labels.

    Raises:
        UserError: the file is damaged, none of features, or a fingerprint is another.
    """
    arrays = read_arrays(path)
    wanted = {f"{name}/{part}" for name in SPLITS for part in ("features", "labels")}
    wanted |= {f"fingerprint/{name}" for name in fingerprints}
    if arrays.keys() != wanted:
        raise UserError(f"{path} holds no features of `probe`: name another file")
    other = [
        name
        for name, value in fingerprints.items()
        if not np.array_equal(arrays[f"fingerprint/{name}"], _numbers(value))
    ]
    if other:
        raise UserError(
            f"{path} holds features of other {' and '.join(other)}: name another file, or remove "
            "it to compute them anew"
        )
    return {
        name: _checked(path, arrays, name, (rows[name], width), num_classes, several_labels)
        for name in SPLITS
    }


def _numbers(digest: bytes) -> np.ndarray:
    return np.frombuffer(digest, np.uint8).astype(np.float32)


def _checked(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    name: str,
    shape: tuple[int, int],
    num_classes: int,
    several_labels: bool,
) -> Features:
    values, labels = arrays[f"{name}/features"], arrays[f"{name}/labels"]
    of_labels, known = (shape[:1], num_classes)
    if several_labels:
        of_labels, known = ((shape[0], num_classes), 2)
    fits = values.shape == shape and labels.shape == of_labels
    if not fits or not np.isin(labels, np.arange(known)).all():
        raise UserError(f"{path} has no whole features of {name}: remove it to compute them anew")
    return Features(values, labels.astype(np.int32))
