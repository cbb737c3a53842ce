"""The choice of the support set."""

import numpy as np

from ..sources import chosen, tiny_source


def test_support_has_so_many_images_of_each_class():
    source, _, labels = tiny_source([9, 30, 12])
    ids, found = chosen(source, 5, seed=0)
    assert np.bincount(found).tolist() == [5, 5, 5]
    assert len(set(ids)) == 15
    np.testing.assert_array_equal(labels[ids], found)


def test_support_is_a_function_of_the_seed():
    source, _, _ = tiny_source([20, 20])
    picks = [chosen(source, 4, seed)[0] for seed in (0, 1, 2)]
    assert picks == [chosen(source, 4, seed)[0] for seed in (0, 1, 2)]
    assert len({frozenset(ids) for ids in picks}) == 3


def test_fewer_shots_are_a_subset_of_more():
    source, _, _ = tiny_source([20, 20])
    many, labels = chosen(source, 8, seed=1)
    few, _ = chosen(source, 3, seed=1)
    firsts = [many[i] for label in (0, 1) for i in np.flatnonzero(labels == label)[:3]]
    assert set(few) == set(firsts)


def test_a_small_class_gives_all_it_has():
    source, _, _ = tiny_source([2, 20])
    _, labels = chosen(source, 5, seed=0)
    assert np.bincount(labels).tolist() == [2, 5]


def test_reading_ends_when_every_class_is_full():
    source, _, _ = tiny_source([200, 200], size=2)
    ids, _ = chosen(source, 2, seed=0)
    assert len(ids) == 4
    # The four are read once more as examples; a class is as likely as the other.
    assert 8 <= len(source.examples.read) < 60


def test_every_image_is_as_likely_to_be_chosen():
    source, _, _ = tiny_source([10, 10], size=2)
    counts = np.bincount(np.concatenate([chosen(source, 2, seed)[0] for seed in range(500)]))
    # Each is one of ten, drawn twice in 500 choices: 100 times, with a deviation of 8.9.
    assert np.abs(counts - 100).max() < 5 * 8.9
