"""A data set as the rest of the program knows it: a split of encoded, labeled images."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from vit_jax.data.boxes import Boxes
from vit_jax.data.holdout import Partition
from vit_jax.errors import UserError, brief

Example = dict[str, Any]


class Examples(Protocol):
    """The examples of a split in a fixed order, each of which is read without the others.

    Threads and processes read them at the same time.
    """

    def __len__(self) -> int:
        """Returns their number."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Reads one: {"image": bytes, encoded; "label"; "id": str}, see `Source`."""
        ...

    def ids(self) -> list[str]:
        """Returns the ids of all, without reading any."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a data set.

    `source[i]` reads an example: {"image": bytes, encoded; "label": an int, of `open_real`,
    `open_objectnet` and where `multi_label` int64 [classes], where `has_masks` bytes, a PNG, where
    `has_boxes` a `boxes.Boxes`; "id": str, names the example}.

    Attributes:
        name: of the data set, as it was asked for.
        split: in TFDS syntax, such as "train[:98%]".
        class_names: by label.
        num_bytes: of all encoded images, about; 0 if unknown.
        examples: reads them.
        border: pixels of every side of an image that evaluation cuts off.
        turn: whether images are turned as their EXIF orientation says; those of TFDS are not: the
            published pipelines decode them with TensorFlow, which knows no orientation.
        multi_label: whether an image has any number of labels, which are trained on: 1 for each
            class that it shows, 0 for the others.
        has_masks: whether the label of an image is a mask, the class of each of its pixels.
        has_boxes: whether it is the boxes of its objects.
        root: of the files that ids name, "" where they name none. What is below it identifies a
            file wherever the whole lies.
        partition: how the images were divided where the data set has no splits of its own.
        notes: what a user should be told of the data set, a line each.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    num_bytes: int
    examples: Examples = dataclasses.field(repr=False)
    border: int = 0
    turn: bool = True
    multi_label: bool = False
    has_masks: bool = False
    has_boxes: bool = False
    root: str = ""
    partition: Partition | None = dataclasses.field(default=None, repr=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    @property
    def num_examples(self) -> int:
        """The number of examples in the split."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """Reads one example.

        Raises:
            UserError: its file is missing or damaged.
        """
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        """Reads all examples in their order."""
        return (self[index] for index in range(self.num_examples))

    def ids(self) -> list[str]:
        """Returns the ids of all examples without reading any."""
        return self.examples.ids()

    def labels(self) -> np.ndarray:
        """Returns the labels of all examples, int64 [examples] or [examples, classes].

        Nothing is read where `examples` has a method `labels`, which lists them; else every
        example is.
        """
        return _labels(self.examples)

    def boxes(self, index: int) -> Boxes:
        """Returns the objects of an image of a source that `has_boxes`.

        The image is read only where `examples` has no method `boxes`, which tells them alone.
        """
        known = getattr(self.examples, "boxes", None)
        return known(index) if known else self.examples[index]["label"]

    def select(self, indices: np.ndarray) -> "Source":
        """Returns the source of some of the examples.

        Args:
            indices: of the examples, in their new order.
        """
        return dataclasses.replace(
            self,
            num_bytes=self.num_bytes * len(indices) // max(self.num_examples, 1),
            examples=_Selected(self.examples, indices),
        )


def _labels(examples: Examples) -> np.ndarray:
    known = getattr(examples, "labels", None)
    listed = known() if known else [examples[i]["label"] for i in range(len(examples))]
    return np.array(listed, np.int64)


@dataclasses.dataclass(frozen=True)
class _Selected:
    examples: Examples
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.examples[int(self.indices[index])]

    def ids(self) -> list[str]:
        ids = self.examples.ids()
        return [ids[index] for index in self.indices]

    def labels(self) -> np.ndarray:
        if hasattr(self.examples, "labels"):
            return _labels(self.examples)[self.indices]
        return np.array([self[i]["label"] for i in range(len(self))], np.int64)

    def boxes(self, index: int) -> Boxes:
        place = int(self.indices[index])
        known = getattr(self.examples, "boxes", None)
        return known(place) if known else self.examples[place]["label"]


def check_splits(*, train_split: str, eval_split: str, development: bool) -> None:
    """Raises a UserError if splits are named although `development` chooses both."""
    if development and (train_split or eval_split):
        raise UserError(
            f"development=True chooses both splits: drop it or train_split={brief(train_split)}, "
            f"eval_split={brief(eval_split)}"
        )


def relabel(source: Source, labels: Sequence[int], class_names: Sequence[str]) -> Source:
    """Returns a source with other labels.

    Args:
        source: whose examples have a label, or one for every class as of `open_real`.
        labels: the new one of each class of `source`; of an example without (-1) it stays.
        class_names: by new label.
    """
    names = tuple(class_names)
    examples = _Relabeled(source.examples, tuple(labels), len(names))
    return dataclasses.replace(source, class_names=names, examples=examples)


@dataclasses.dataclass(frozen=True)
class _Relabeled:
    examples: Examples
    new_labels: tuple[int, ...]
    num_classes: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        return example | {"label": self._new(example["label"])}

    def _new(self, label: Any) -> Any:
        if np.ndim(label):
            several = np.zeros(self.num_classes, np.int64)
            np.add.at(several, list(self.new_labels), label)
            return several
        return label if label < 0 else self.new_labels[label]

    def ids(self) -> list[str]:
        return self.examples.ids()

    def labels(self) -> list[Any]:
        return [self._new(label) for label in _labels(self.examples)]
