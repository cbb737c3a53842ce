"""Scores of single classes against scikit-learn's, and which classes are confused."""

import numpy as np
import pytest
from sklearn import metrics

from vit_jax.evaluation.per_class import (
    class_scores,
    confused_classes,
    confusion_among,
    most_confused,
)

RNG = np.random.default_rng(3)
# Class 4 is never there, class 5 never predicted, class 6 neither.
LABELS = RNG.choice([0, 1, 2, 3, 5], 300)
PREDICTED = np.where(RNG.random(300) < 0.6, LABELS, RNG.choice([0, 1, 2, 3, 4], 300))
PREDICTED[PREDICTED == 5] = 0


def test_scores_are_those_of_scikit_learn():
    counts = (LABELS[LABELS == PREDICTED], PREDICTED, LABELS)
    found = class_scores(*(np.bincount(x, minlength=7) for x in counts))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        LABELS, PREDICTED, labels=np.arange(7), zero_division=np.nan
    )
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.f1, f1)
    np.testing.assert_array_equal(found.images, support)
    assert found.row(6) == {"precision": None, "recall": None, "f1": None, "examples": 0}
    assert found.row(0)["recall"] == pytest.approx(recall[0])


def test_the_most_confused_pairs_are_the_largest_cells_off_the_diagonal():
    matrix = metrics.confusion_matrix(LABELS, PREDICTED, labels=np.arange(7))
    cells = sorted(
        (-matrix[i, j], i, j) for i in range(7) for j in range(7) if i != j and matrix[i, j]
    )
    found = most_confused(LABELS, PREDICTED, 5)
    assert [tuple(x) for x in found] == [(i, j, -count) for count, i, j in cells[:5]]
    assert most_confused(LABELS, LABELS, 5) == []


def test_of_many_classes_those_are_chosen_that_are_confused():
    labels = np.array([7, 7, 7, 900, 900, 3, 5])
    predicted = np.array([9, 9, 7, 12, 900, 5, 5])
    np.testing.assert_array_equal(confused_classes(labels, predicted, 1000, 2), [7, 9])
    chosen = confused_classes(labels, predicted, 1000, 6)
    np.testing.assert_array_equal(chosen, [3, 5, 7, 9, 12, 900])
    whole = metrics.confusion_matrix(labels, predicted, labels=np.arange(1000))
    expected = whole[np.ix_(chosen, chosen)]
    np.testing.assert_array_equal(confusion_among(labels, predicted, chosen), expected)
    assert len(confused_classes(labels, labels, 1000, 30)) == 30
    np.testing.assert_array_equal(confused_classes(LABELS, PREDICTED, 7, 30), np.arange(7))
