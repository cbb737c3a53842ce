"""Image files with their labels as a data set, wherever the labels come from."""

import dataclasses
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import holdout, splits
from vit_jax.data.boxes import Boxes
from vit_jax.data.headers import check_end
from vit_jax.data.holdout import Partition, Row
from vit_jax.data.source import Example, Source
from vit_jax.data.survey import Broken, Survey, listed
from vit_jax.data.tfrecord import unreadable
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FileRules:
    """Rules for image files that lie there as people have them.

    Attributes:
        holdout: the share that is held out where the files are in no splits.
        broken: "refuse" files that should be images and are not, or "skip" them.
        skip_flag: by which a user asks for the latter.
        least_classes: fewer are refused, unless an image may have several labels.
        partition: to follow in place of drawing one, where the files are in no splits.
        must_fit: whether `partition` is of a run that goes on: then each of its images must be as
            it was. Else it is followed only if it fits, as far as the images are there.
        channels: of the images, see `headers.measure`.
    """

    holdout: float = 0.2
    broken: str = "refuse"
    skip_flag: str = "dataset.broken=skip"
    least_classes: int = 1
    partition: Partition | None = None
    must_fit: bool = True
    channels: int = 3


class Entry(NamedTuple):
    """An image that was found: its name in the data set, its path, labels, and size in bytes.

    And where it has a mask or boxes and no labels, a digest of these.
    """

    name: str
    path: str
    labels: tuple[str, ...]
    num_bytes: int
    mask: str = ""

    @property
    def class_name(self) -> str:
        """The labels in one text, or what stands for a mask or boxes."""
        return ";".join(self.labels) or self.mask


@dataclasses.dataclass(frozen=True)
class File:
    """An image file, the index of its class or of each of its classes, and its size in bytes.

    Where the label is a mask, it is the path of that; where there are boxes, it is these.
    """

    path: str
    label: int | tuple[int, ...] | str | Boxes
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
        """Returns the labels, int64 [files]."""
        return np.array([file.label for file in self.files], np.int64)


@dataclasses.dataclass(frozen=True)
class MultiLabelExamples(FileExamples):
    """Image files each of which may have several labels, or none.

    Attributes:
        num_classes: of all.
    """

    num_classes: int

    def __getitem__(self, index: int) -> Example:
        """Reads a file; its label is int64 [classes], 1 for each that it has."""
        example = super().__getitem__(index)
        return example | {"label": self._ones(example["label"])}

    def labels(self) -> np.ndarray:
        """Returns the labels, int64 [files, classes]."""
        return np.array([self._ones(file.label) for file in self.files])

    def _ones(self, label: Any) -> np.ndarray:
        ones = np.zeros(self.num_classes, np.int64)
        ones[np.array(label, np.int64)] = 1
        return ones


@dataclasses.dataclass(frozen=True)
class MaskExamples(FileExamples):
    """Image files each of which has a mask in a file of its own."""

    def __getitem__(self, index: int) -> Example:
        """Reads a file, and that of its mask, which is its label."""
        example = super().__getitem__(index)
        with unreadable(example["label"]):
            return example | {"label": Path(example["label"]).read_bytes()}

    def labels(self) -> np.ndarray:
        """Raises a TypeError: a mask is no label that could be counted."""
        raise TypeError("images with masks have no labels")


@dataclasses.dataclass(frozen=True)
class BoxExamples(FileExamples):
    """Image files with the boxes of their objects."""

    def boxes(self, index: int) -> Boxes:
        """Returns those of an image, without reading it."""
        found = self.files[index].label
        assert isinstance(found, Boxes)
        return found

    def labels(self) -> np.ndarray:
        """Raises a TypeError: boxes are no label that could be counted."""
        raise TypeError("images with boxes have no labels")


@dataclasses.dataclass(frozen=True)
class LabeledFiles:
    """The files of every split, in an order that only their names decide, and the class names.

    Attributes:
        what: the data set, as messages name it.
        name: as it was asked for, such as "folder:/data/flowers".
        root: of the files, see `Source.root`.
        class_names: by label.
        splits: the files of each.
        multi_label: see `Source`.
        has_masks: likewise.
        has_boxes: likewise.
        partition: likewise.
        notes: likewise.
    """

    what: str
    name: str
    root: str
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[File, ...]]
    multi_label: bool = False
    has_masks: bool = False
    has_boxes: bool = False
    partition: Partition | None = None
    notes: tuple[str, ...] = ()

    def select(self, split: str) -> tuple[File, ...]:
        """Returns the files of `split`, in the syntax of TFDS ("train[:98%]+validation").

        Raises:
            UserError: if train is asked for and there is none, or what is held out and that is
                nothing.
            ValueError: if `split` is malformed, names no split of this data set or selects nothing.
        """
        if "train" not in self.splits and re.search(r"\btrain\b", split):
            raise UserError(
                f"{self.what} has no train/, only {', '.join(self.splits)}: {self._expected}"
            )
        nothing_held_out = self.partition is not None and not self.splits[holdout.HELD_OUT]
        if nothing_held_out and re.fullmatch(r"validation(\[.*\])?", split):
            whole = self.has_masks or self.has_boxes
            two = "there must be two" if whole else "a class must have two"
            raise UserError(
                f"{self.what} has no splits and none of its images can be held out to evaluate on, "
                f"for which {two}: add images, or divide them yourself into train and test"
            )
        sizes = {name: len(files) for name, files in self.splits.items()}
        parts = splits.slices(split, sizes)
        return sum((self.splits[name][part] for name, part in parts), ())

    @property
    def _expected(self) -> str:
        if self.has_boxes:
            return "annotations/instances_train.json or train/_annotations.coco.json is expected"
        what = "images/ and masks/ are" if self.has_masks else "one directory per class is"
        return f"{what} expected in train/"

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the splits that there are."""
        return tuple(self.splits)

    def source(self, split: str) -> Source:
        """Returns a split, in the syntax of TFDS; for what it raises, see `select`."""
        files = self.select(split)
        examples = FileExamples(files)
        if self.multi_label:
            examples = MultiLabelExamples(files, len(self.class_names))
        elif self.has_masks:
            examples = MaskExamples(files)
        elif self.has_boxes:
            examples = BoxExamples(files)
        return Source(
            self.name,
            split,
            self.class_names,
            num_bytes=sum(file.num_bytes for file in files),
            examples=examples,
            multi_label=self.multi_label,
            has_masks=self.has_masks,
            has_boxes=self.has_boxes,
            root=self.root,
            partition=self.partition,
            notes=self.notes,
        )


def in_hashed_order(
    entries: Iterable[Entry], class_names: Sequence[str], *, multi_label: bool = False
) -> tuple[File, ...]:
    """The files of a split, ordered by a hash of their names.

    So a slice such as "train[:90%]" is a random sample of all classes, and stays the same on every
    machine.

    Args:
        entries: of the split.
        class_names: by label; an entry's are among them.
        multi_label: whether a file has several.
    """
    index = {name: label for label, name in enumerate(class_names)}

    def label(entry: Entry) -> int | tuple[int, ...]:
        labels = tuple(index[name] for name in entry.labels)
        return labels if multi_label else labels[0]

    return tuple(File(x.path, label(x), x.num_bytes) for x in sorted(entries, key=hashed))


def hashed(entry: Entry) -> bytes:
    """The key that orders the images of a split, see `in_hashed_order`."""
    # A name may have bytes that are no text.
    return hashlib.sha256(entry.name.encode(errors="surrogateescape")).digest()


def without_cut_off(entries: Sequence[Entry], survey: Survey, prefix: str = "") -> list[Entry]:
    """The entries whose files are not cut off, see `headers.check_end`; others are broken.

    Of images to evaluate on: they are first looked at after many steps.

    Args:
        entries: to look at.
        survey: takes those that are broken.
        prefix: of their names in it.
    """
    whole = []
    for entry in entries:
        try:
            check_end(entry.path)
            whole.append(entry)
        except (UserError, OSError) as error:
            survey.broken[prefix + entry.name] = Broken(str(error), entry.class_name)
    return whole


def divide(
    entries: Sequence[Entry], rules: FileRules, survey: Survey
) -> tuple[dict[str, list[Entry]], Partition]:
    """Divides images that are in no splits into "train" and "validation".

    Args:
        entries: all of them.
        rules: the share to hold out, or the partition to follow.
        survey: of the data set; takes what is found.

    Returns:
        The images of both, and the partition to write down, `rules.partition` if that is followed.
    """
    given, sizes = rules.partition, {x.name: x.num_bytes for x in entries}
    if given is not None and (rules.must_fit or given.fits(sizes)):
        return _follow(given, entries, survey, rules.must_fit), given
    if given is not None and given.fits_by_name(sizes):
        survey.remarks.append(
            f"named as the images in the run's {holdout.FILE} but of other sizes, so they count "
            "as other images"
        )
    chosen = holdout.draw(_strata(entries), rules.holdout)
    held_out = without_cut_off([x for x in entries if x.name in chosen], survey)
    train = [x for x in entries if x.name not in chosen]
    rows = {name: Row(x.class_name, holdout.BROKEN, 0) for name, x in survey.broken.items()}
    rows |= {x.name: Row(x.class_name, holdout.TRAIN, x.num_bytes) for x in train}
    rows |= {x.name: Row(x.class_name, holdout.HELD_OUT, x.num_bytes) for x in held_out}
    return {holdout.TRAIN: train, holdout.HELD_OUT: held_out}, Partition(rows)


def _strata(entries: Sequence[Entry]) -> Collection[Sequence[str]]:
    """The names by class; of several labels the rarest counts, which is the hardest to divide."""
    counts = Counter(label for entry in entries for label in entry.labels)
    strata = defaultdict(list)
    for entry in entries:
        rarest = min(entry.labels, key=lambda label: (counts[label], label), default="")
        strata[rarest].append(entry.name)
    return strata.values()


def _follow(
    partition: Partition, entries: Sequence[Entry], survey: Survey, must_fit: bool
) -> dict[str, list[Entry]]:
    found = {entry.name: entry for entry in entries}
    rows = {name: row for name, row in partition.rows.items() if row.split != holdout.BROKEN}
    new = (found.keys() | survey.broken.keys()) - partition.rows.keys()
    if must_fit:  # An image that the run began with may not be left out of it.
        survey.skip, survey.skip_flag = False, ""
    told = survey.others if must_fit else survey.remarks
    survey.broken = {name: x for name, x in survey.broken.items() if name in rows}
    if gone := [name for name in rows if name not in found and name not in survey.broken]:
        way_out = ": restore them, or begin anew in another --workdir" if must_fit else ""
        told.append(
            f"{len(gone):,} of the run's images in {holdout.FILE} are gone "
            f"({listed(gone)}){way_out}"
        )
    there = [(found[name], row) for name, row in rows.items() if name in found]
    if other := [entry.name for entry, row in there if entry.class_name != row.class_name]:
        way_out = ": change them back, or begin anew in another --workdir" if must_fit else ""
        told.append(
            f"{len(other):,} of the images have another class or mask or other boxes than in the "
            f"run's {holdout.FILE} ({listed(other)}){way_out}"
        )
    if new:
        survey.remarks.append(f"{len(new):,} left out that the run began without")
    divided = {
        split: [entry for entry, row in there if row.split == split]
        for split in (holdout.TRAIN, holdout.HELD_OUT)
    }
    divided[holdout.HELD_OUT] = without_cut_off(divided[holdout.HELD_OUT], survey)
    return divided
