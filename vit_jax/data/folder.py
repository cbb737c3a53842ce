"""A folder of images as a data set: train/ and test/ or validation/, one directory per class."""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.data import classes
from vit_jax.data.headers import tensorflow_reads
from vit_jax.data.source import Source
from vit_jax.errors import UserError

PREFIX = "folder:"
_SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
}


@dataclasses.dataclass(frozen=True)
class File:
    """An image file, its class index, its size in bytes, and whether TensorFlow reads it."""

    path: str
    label: int
    num_bytes: int
    tensorflow_reads: bool


@dataclasses.dataclass(frozen=True)
class Folder:
    """The files of every split, in an order that only their names decide, and the class names."""

    path: str
    class_names: tuple[str, ...]
    splits: dict[str, tuple[File, ...]]

    def select(self, split: str) -> tuple[File, ...]:
        """Returns the files of `split`, in the syntax of TFDS ("train[:98%]+validation").

        Raises:
            UserError: if train is asked for and there is none.
            ValueError: if `split` is malformed, names no split of this folder or selects nothing.
        """
        if "train" not in self.splits and re.search(r"\btrain\b", split):
            raise UserError(
                f"folder {self.path!r} has no train/, only {', '.join(self.splits)}: one directory "
                "per class is expected in train/"
            )
        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=[len(files)], num_bytes=0)
            for name, files in self.splits.items()
        }
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        files = sum((self.splits[part.splitname][part.from_ : part.to] for part in parts), ())
        if not files:
            raise ValueError("it selects no image")
        return files

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the splits that the folder has."""
        return tuple(self.splits)

    def source(self, split: str) -> Source:
        """Returns a split, in the syntax of TFDS; for what it raises, see `select`."""
        files = self.select(split)
        return Source(
            PREFIX + self.path,
            split,
            self.class_names,
            num_examples=len(files),
            num_bytes=sum(file.num_bytes for file in files),
            examples=functools.partial(read_files, files),
            ids=lambda: [file.path for file in files],
            select=lambda chosen: functools.partial(
                read_files, tuple(itertools.compress(files, chosen))
            ),
        )


def open_folder(path: str) -> Folder:
    """Lists the images below `path`, and reads the first bytes of each.

    Classes are the directories of train/, or where there is none of all splits together: numbers
    in the order of their values, other names as text. The files of a split are ordered by a hash of
    their relative path, so that a slice such as "train[:90%]" is a random sample of all classes and
    stays the same on every machine.

    Raises:
        UserError: if the folder or all its splits are missing, there are no classes, a class is
            empty, a test class is unknown in training, or a file is not an image.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"folder {path!r} does not exist: name one with train/, and test/ or validation/, in it"
        )
    found = {directory: name for directory, name in _SPLITS.items() if (root / directory).is_dir()}
    if not found:
        raise UserError(
            f"folder {path!r} has no train/ and nothing to evaluate on: one directory per class is "
            "expected in train/ and in test/ or validation/"
        )
    for name in found.values():
        same = [f"{directory}/" for directory, other in found.items() if other == name]
        if len(same) > 1:
            raise UserError(f"folder {path!r} has both {' and '.join(same)}: keep one of them")
    sources = ["train"] if "train" in found else found
    class_names = classes.in_order({x for name in sources for x in _class_names(root / name)})
    splits = {name: _list_files(root / directory, class_names) for directory, name in found.items()}
    return Folder(path, class_names, splits)


def read_files(files: Sequence[File], seed: tf.Tensor | None = None) -> tf.data.Dataset:
    """Returns {"image", "label", "id", "tensorflow_reads"} of every file.

    The image is as it lies on the disk, the id its path.

    Args:
        files: what to read, in this order.
        seed: int64 scalar; shuffles the files.
    """
    dataset = tf.data.Dataset.from_tensor_slices(
        {
            "id": [file.path for file in files],
            "label": tf.constant([file.label for file in files], tf.int64),
            "tensorflow_reads": [file.tensorflow_reads for file in files],
        }
    )
    if seed is not None:
        dataset = dataset.shuffle(len(files), seed, reshuffle_each_iteration=False)
    return dataset.map(
        lambda file: {"image": tf.io.read_file(file["id"]), **file},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def visible(directory: Path) -> list[Path]:
    """Lists what is in a directory and not hidden, by name."""
    return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))


def _class_names(directory: Path) -> tuple[str, ...]:
    names = tuple(entry.name for entry in visible(directory) if entry.is_dir())
    if not names:
        raise UserError(f"{directory} holds no classes: make one directory per class in it")
    return names


def _list_files(directory: Path, class_names: Sequence[str]) -> tuple[File, ...]:
    files = []
    for name in _class_names(directory):
        if name not in class_names:
            raise UserError(f"class {name!r} of {directory} is not in train/: add it or remove it")
        paths = visible(directory / name)
        if not paths:
            raise UserError(f"class {directory / name} is empty: add images or remove it")
        label = class_names.index(name)
        files += [check_image(path, label) for path in paths]

    def key(file: File) -> bytes:
        return hashlib.sha256(Path(file.path).relative_to(directory).as_posix().encode()).digest()

    return tuple(sorted(files, key=key))


def check_image(path: Path, label: int) -> File:
    """The file of an image, recognized by its first bytes.

    Raises:
        UserError: it is not one.
    """
    readable = tensorflow_reads(path)
    return File(str(path), label, path.stat().st_size, readable)
