"""The choice of the support set."""

import numpy as np
import tensorflow as tf

from vit_jax.data import support

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


def test_reading_ends_when_every_class_is_full(monkeypatch):
    # A shuffle buffer of one example: what is read is what was asked for.
    monkeypatch.setattr(support, "_SHUFFLE_LIMIT", 1)
    seen = []
    source, _, _ = tiny_source([200, 200], size=2)
    examples = source.examples

    def counting(seed=None):
        def note(example):
            tf.py_function(lambda: seen.append(1), [], [])
            return example

        return examples(seed).map(note)

    object.__setattr__(source, "examples", counting)
    assert len(chosen(source, 2, seed=0)[0]) == 4
    assert 4 <= len(seen) < 60
