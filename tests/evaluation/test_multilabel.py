"""Scores of several labels an image against scikit-learn and the definition, with ties."""

import numpy as np
import pytest
from sklearn import metrics

from vit_jax.errors import UserError
from vit_jax.evaluation.multilabel import multilabel_metrics

from .scoring import scored

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, (37, 6))
LABELS[:, 4] = 0  # A class without an image, and one that is neither there nor predicted.
LABELS[:, 5] = 0
# Halves: many are equal.
LOGITS = (np.rint(2 * RNG.normal(0, 1, LABELS.shape) + LABELS) / 2).astype(np.float32)
LOGITS[:, 5] = -1


def average_precision(labels, scores):
    """The sum over the thresholds of (R_n - R_(n-1)) P_n, from its definition."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        recall = (chosen & (labels == 1)).sum() / labels.sum()
        precision = (chosen & (labels == 1)).sum() / chosen.sum()
        total += (recall - recall_before) * precision
        recall_before = recall
    return total


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_measures_are_those_of_scikit_learn_at_any_batch_size(batch_size):
    found = scored(LOGITS, LABELS.astype(np.float32), batch_size, multilabel_metrics).scalars()
    assert found["examples"] == 37
    by_hand = [average_precision(LABELS[:, i], LOGITS[:, i]) for i in range(4)]
    assert found["mAP"] == pytest.approx(np.mean(by_hand))
    there = LABELS[:, :4], LOGITS[:, :4]
    assert found["mAP"] == pytest.approx(metrics.average_precision_score(*there, average="macro"))
    predicted = LOGITS > 0
    # What is neither there nor predicted has no F1.
    macro = metrics.f1_score(LABELS, predicted, average="macro", zero_division=np.nan)
    assert found["f1_macro"] == pytest.approx(macro)
    micro = metrics.f1_score(LABELS, predicted, average="micro")
    assert found["f1_micro"] == pytest.approx(micro)
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    each = [metrics.log_loss(LABELS[:, i], p[:, i], labels=[0, 1]) for i in range(6)]
    assert found["loss"] == pytest.approx(sum(each))


def test_a_head_may_have_more_classes_than_the_data_set():
    whole = scored(LOGITS, LABELS.astype(np.float32), 8, multilabel_metrics)
    fewer = scored(LOGITS, LABELS[:, :5].astype(np.float32), 8, multilabel_metrics)
    assert fewer.scalars() == whole.scalars()


def test_damaged_logits_and_images_without_any_label_are_refused():
    broken = LOGITS.copy()
    broken[3, 2] = np.nan
    with pytest.raises(UserError, match="logits are not finite"):
        scored(broken, LABELS.astype(np.float32), 8, multilabel_metrics)
    with pytest.raises(UserError, match="no image of the split has a label"):
        scored(LOGITS, np.zeros(LABELS.shape, np.float32), 8, multilabel_metrics).scalars()
