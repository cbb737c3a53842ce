"""The order in which training sees images: from the global position to the index of an image.

An order is a pure function of the seed and the position, see `pipeline`.
"""

import functools
import threading
from typing import Protocol

import numpy as np

from vit_jax.data.source import Source
from vit_jax.errors import UserError

# What random numbers are drawn for.
_EPOCH, _AUGMENTATION, _CLASSES, _MEMBERS = range(4)

SAMPLINGS = ("", "balanced")


class Order(Protocol):
    """The images of a run."""

    def __getitem__(self, position: int, /) -> int:
        """Returns the index of the image at a global position."""
        ...


class Shuffled:
    """Every image once an epoch, in an order of its own.

    Args:
        seed: of the order.
        num_examples: of the data set.
    """

    def __init__(self, seed: int, num_examples: int):
        self._seed = seed
        self._num_examples = num_examples

    def __getitem__(self, position: int) -> int:
        """Returns the index of the image at a global position."""
        epoch, place = divmod(position, self._num_examples)
        return int(_permutation(_EPOCH, self._seed, epoch, self._num_examples)[place])


class Balanced:
    """Every class equally often, and within a class every image.

    Of k classes with images, k images that follow each other (from a multiple of k on) are one of
    each, in an order that is drawn anew each time. Of a class with n images, n such draws are all
    of its images once.

    Args:
        seed: of the order.
        labels: int [examples], of the data set.

    Raises:
        UserError: an image has no label (-1).
    """

    def __init__(self, seed: int, labels: np.ndarray):
        if (labels < 0).any():
            raise UserError(
                "dataset.sampling 'balanced' needs a label of every image, and some have none "
                "(-1): set --config.dataset.sampling=''"
            )
        self._seed = seed
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        # By class the orders of the last two epochs: threads may be in both.
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in self._members]

    def __getitem__(self, position: int) -> int:
        """Returns the index of the image at a global position."""
        draw, place = divmod(position, len(self._members))
        which = int(_permutation(_CLASSES, self._seed, draw, len(self._members))[place])
        members = self._members[which]
        epoch, place = divmod(draw, len(members))
        return int(members[self._order(which, epoch)[place]])

    def _order(self, which: int, epoch: int) -> np.ndarray:
        with _ordering:
            orders = self._orders[which]
            if epoch not in orders:
                if len(orders) > 1:
                    del orders[min(orders)]
                rng = _generator(_MEMBERS, self._seed, which, epoch)
                orders[epoch] = rng.permutation(len(self._members[which]))
            return orders[epoch]


def create_order(source: Source, sampling: str, seed: int) -> Order:
    """The order of the images of a run.

    Args:
        source: to train on.
        sampling: one of `SAMPLINGS`: "" takes every image once an epoch, "balanced" every class
            equally often, for which the labels of all images are read.
        seed: of the order.

    Raises:
        UserError: classes are to be balanced, and an image has none or several.
    """
    if sampling != "balanced":
        return Shuffled(seed, source.num_examples)
    if source.multi_label:
        raise UserError(
            f"dataset.sampling 'balanced' draws an image by its class, and an image of "
            f"{source.name} has several labels: use --config.class_weights=balanced"
        )
    return Balanced(seed, source.labels())


_ordering = threading.Lock()


def _permutation(purpose: int, seed: int, number: int, count: int) -> np.ndarray:
    # Of the threads that come to a new epoch one makes its order.
    with _ordering:
        return _make_permutation(purpose, seed, number, count)


@functools.lru_cache(maxsize=2)  # Threads may be in two epochs.
def _make_permutation(purpose: int, seed: int, number: int, count: int) -> np.ndarray:
    """The order of an epoch: 8 bytes an image, a second for 14 million."""
    return _generator(purpose, seed, number).permutation(count)


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """The source of all randomness in the augmentation of the image at a global position."""
    return _generator(_AUGMENTATION, seed, position)


def _generator(purpose: int, seed: int, *numbers: int) -> np.random.Generator:
    # NumPy takes no negative seeds.
    return np.random.default_rng((purpose, int(seed < 0), abs(seed), *numbers))
