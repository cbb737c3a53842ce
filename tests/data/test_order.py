"""The orders of training images: every image once an epoch, or every class equally often."""

import collections
import itertools

import numpy as np
import pytest

from vit_jax.data.order import Balanced, Shuffled, create_order
from vit_jax.data.pipeline import train_batches
from vit_jax.errors import UserError

from ..sources import tiny_source

COUNTS = (1, 2, 9, 0, 4)  # of images a class
LABELS = np.random.default_rng(5).permutation(np.repeat(np.arange(5), COUNTS))
OPTIONS = {
    "batch_size": 8, "image_size": 8, "protocol": "inception", "random_crop": True,
    "random_flip": True, "seed": 3,
}  # fmt: skip


@pytest.mark.parametrize("seed", [3, -3])
def test_the_plain_order_is_that_of_every_run_so_far(seed):
    order = Shuffled(seed, 7)
    # As in the runs that were begun when there was no other.
    epochs = [
        np.random.default_rng((0, int(seed < 0), 3, epoch)).permutation(7) for epoch in range(3)
    ]
    assert [order[i] for i in range(21)] == np.concatenate(epochs).tolist()


def test_every_class_comes_once_in_so_many_images_as_there_are_classes():
    order = Balanced(0, LABELS)
    rounds = LABELS[[order[i] for i in range(400)]].reshape(100, 4)
    np.testing.assert_array_equal(np.sort(rounds), np.tile([0, 1, 2, 4], (100, 1)))
    assert len({tuple(row) for row in rounds}) == 24  # Every order of four comes.


def test_within_a_class_every_image_comes_once_in_so_many_draws_as_there_are_images():
    order = Balanced(0, LABELS)
    indices = [order[i] for i in range(4 * 36)]
    for label, count in enumerate(COUNTS):
        own = [i for i in indices if LABELS[i] == label]
        assert len(own) == (36 if count else 0)
        for begin in range(0, len(own), max(count, 1)):
            assert sorted(own[begin : begin + count]) == np.flatnonzero(label == LABELS).tolist()
    nine = [tuple(x) for x in np.reshape([i for i in indices if LABELS[i] == 2], (4, 9))]
    assert len(set(nine)) == 4


def test_a_far_position_and_any_order_of_asking_give_the_same():
    asked = [10**12, 5, 10**12 + 1, 3, 77, 0, 78]
    first, second = Balanced(7, LABELS), Balanced(7, LABELS)
    expected = {i: first[i] for i in sorted(asked)}
    assert {i: second[i] for i in asked} == expected
    other = Balanced(8, LABELS)
    assert [other[i] for i in range(40)] != [first[i] for i in range(40)]


def batches(source, steps, **options):
    order = create_order(source, "balanced", OPTIONS["seed"])
    found = train_batches(source, order=order, **{**OPTIONS, **options})
    return list(itertools.islice(found, steps))


def test_balanced_batches_are_a_function_of_seed_and_position_alone():
    source, _, _ = tiny_source(COUNTS, size=8)
    whole = batches(source, 9)
    counted = collections.Counter(np.concatenate([x["label"] for x in whole]).tolist())
    assert counted == {0: 18, 1: 18, 2: 18, 4: 18}
    again = [batches(source, 4, first_step=5), batches(source, 4, first_step=5, workers=1)]
    for tail in again:
        for one, other in zip(tail, whole[5:], strict=True):
            np.testing.assert_array_equal(one["label"], other["label"])
            np.testing.assert_array_equal(one["image"], other["image"])
    halves = [batches(source, 9, process_index=i, process_count=2) for i in range(2)]
    for one, *parts in zip(whole, *halves, strict=True):
        for key, value in one.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)


def test_what_has_no_class_or_several_cannot_be_balanced():
    with pytest.raises(UserError, match="needs a label of every image, and some have none"):
        Balanced(0, np.array([0, 1, -1]))
    source, _, _ = tiny_source((2, 2), size=8)
    object.__setattr__(source, "multi_label", True)
    with pytest.raises(UserError, match="tiny has several labels: use --config.class_weights=bal"):
        create_order(source, "balanced", 0)
