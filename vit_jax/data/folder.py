"""A folder of images as a data set: train/ and test/ or validation/, one directory per class."""

import dataclasses
import hashlib
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.errors import UserError

_SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")  # what TensorFlow decodes


@dataclasses.dataclass(frozen=True)
class File:
    """An image file, its class index and its size in bytes."""

    path: str
    label: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Folder:
    """The files of every split, in an order that only their names decide, and the class names."""

    class_names: tuple[str, ...]
    splits: dict[str, tuple[File, ...]]

    def select(self, split: str) -> tuple[File, ...]:
        """Returns the files of `split`, in the syntax of TFDS ("train[:98%]+validation").

        Raises:
            ValueError: if `split` is malformed, names no split of this folder or selects nothing.
        """
        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=[len(files)], num_bytes=0)
            for name, files in self.splits.items()
        }
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        files = sum((self.splits[part.splitname][part.from_ : part.to] for part in parts), ())
        if not files:
            raise ValueError("it selects no image")
        return files


def open_folder(path: str) -> Folder:
    """Lists the images below `path` and looks at the first bytes of each.

    The files of a split are ordered by a hash of their relative path, so that a slice such as
    "train[:90%]" is a random sample of all classes and stays the same on every machine.

    Raises:
        UserError: if the folder or its train/ is missing, there are no classes, a class is empty,
            a test class is unknown in training, or a file is not an image.
    """
    root = Path(path).expanduser()
    if not (root / "train").is_dir():
        raise UserError(
            f"folder {path!r} has no train/: one directory per class is expected in train/ and in "
            "test/ or validation/"
        )
    class_names = _class_names(root / "train")
    splits = {}
    for directory, name in _SPLITS.items():
        if (root / directory).is_dir():
            if name in splits:
                raise UserError(f"folder {path!r} has both validation/ and val/: keep one of them")
            splits[name] = _list_files(root / directory, class_names)
    return Folder(class_names, splits)


def records(files: tuple[File, ...], seed: tf.Tensor | None = None) -> tf.data.Dataset:
    """Returns {"image", "label", "id"} of every file, the image still encoded, the id its path.

    Args:
        files: what to read, in this order.
        seed: int64 scalar; shuffles the files.
    """
    dataset = tf.data.Dataset.from_tensor_slices(
        {
            "id": [file.path for file in files],
            "label": tf.constant([file.label for file in files], tf.int64),
        }
    )
    if seed is not None:
        dataset = dataset.shuffle(len(files), seed, reshuffle_each_iteration=False)
    return dataset.map(
        lambda file: {"image": tf.io.read_file(file["id"]), **file},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def visible(directory: Path) -> list[Path]:
    """What is in a directory and not hidden, by name."""
    return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))


def _class_names(directory):
    names = tuple(entry.name for entry in visible(directory) if entry.is_dir())
    if not names:
        raise UserError(f"{directory} holds no classes: make one directory per class in it")
    return names


def _list_files(directory, class_names):
    files = []
    for name in _class_names(directory):
        if name not in class_names:
            raise UserError(f"class {name!r} of {directory} is not in train/: add it or remove it")
        paths = visible(directory / name)
        if not paths:
            raise UserError(f"class {directory / name} is empty: add images or remove it")
        files += [check_image(path, class_names.index(name)) for path in paths]

    def key(file):
        return hashlib.sha256(Path(file.path).relative_to(directory).as_posix().encode()).digest()

    return tuple(sorted(files, key=key))


def check_image(path: Path, label: int) -> File:
    """The file of an image, recognised by its first bytes.

    Raises:
        UserError: it is not one.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(8).startswith(_MAGIC):
                return File(str(path), label, path.stat().st_size)
    raise UserError(f"{path} is not a JPEG, PNG, GIF or BMP image: convert it or remove it")
