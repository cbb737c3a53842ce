"""A folder of images as a data set: train/ and test/ or validation/, one directory per class."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.data import classes, splits
from vit_jax.data.headers import check_end, check_format
from vit_jax.data.source import Example, Source
from vit_jax.data.tfrecord import unreadable
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
    """An image file, its class index, and its size in bytes."""

    path: str
    label: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class FileExamples:
    """Image files as the examples of a `Source`; an id is a path."""

    files: tuple[File, ...]

    def __len__(self) -> int:
        """Returns the number of files."""
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """Reads a file as it lies on the disk.

        Raises:
            UserError: it is missing or may not be read.
        """
        file = self.files[index]
        with unreadable(file.path):
            encoded = Path(file.path).read_bytes()
        return {"image": encoded, "label": file.label, "id": file.path}

    def ids(self) -> list[str]:
        """Returns the paths."""
        return [file.path for file in self.files]

    def labels(self) -> np.ndarray:
        """Returns the labels."""
        return np.array([file.label for file in self.files], np.int64)


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
        sizes = {name: len(files) for name, files in self.splits.items()}
        parts = splits.slices(split, sizes)
        return sum((self.splits[name][part] for name, part in parts), ())

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
            num_bytes=sum(file.num_bytes for file in files),
            examples=FileExamples(files),
        )


def open_folder(path: str) -> Folder:
    """Lists the images below `path`, and reads the first bytes of each.

    Of those to evaluate on the last bytes are read too, see `headers.check_end`: they are first
    looked at after many steps.

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
    files = {name: _list_files(root / directory, class_names) for directory, name in found.items()}
    for file in itertools.chain(*(files[name] for name in files if name != "train")):
        check_end(file.path)
    return Folder(path, class_names, files)


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
        name = Path(file.path).relative_to(directory).as_posix()
        # A name may have bytes that are no text.
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    return tuple(sorted(files, key=key))


def check_image(path: Path, label: int) -> File:
    """The file of an image, recognized by its first bytes.

    Raises:
        UserError: it is not one.
    """
    check_format(path)
    return File(str(path), label, path.stat().st_size)
