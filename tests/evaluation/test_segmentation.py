"""mIoU and what goes with it, against scikit-learn."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from vit_jax.errors import UserError
from vit_jax.evaluation.segmentation import (
    SegmentationMetrics,
    make_counting,
    segmentation_metrics,
)
from vit_jax.sharding import make_mesh

CLASSES = 6


class Given(nn.Module):
    """Stands for a model: the image is the logits."""

    @nn.compact
    def __call__(self, images):
        return jnp.asarray(images)


def batches(logits, labels, rows=4):
    """Padded batches whose padding would count if it could."""
    for begin in range(0, len(logits), rows):
        part, truth = logits[begin : begin + rows], labels[begin : begin + rows]
        filling = rows - len(part)
        yield {
            "image": np.concatenate([part, np.ones((filling, *part.shape[1:]), np.float32)]),
            "label": np.concatenate([truth, np.zeros((filling, *truth.shape[1:]), np.uint8)]),
            "mask": np.float32([1] * len(part) + [0] * filling),
        }


def measure(logits, labels):
    mesh = make_mesh()
    return segmentation_metrics(make_counting(Given(), mesh), {}, batches(logits, labels), mesh)


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (7, 8, 9)).astype(np.uint8)  # Classes 4 and 5 are nowhere.
    logits = rng.normal(size=(7, 8, 9, CLASSES)).astype(np.float32)
    logits[..., :4] += 2 * (labels[..., None] == np.arange(4))
    logits[..., 5] = -9  # Class 4 is predicted, class 5 not even that.
    labels[rng.random(labels.shape) < 0.1] = 255
    return logits, labels


def test_the_scores_are_those_of_scikit_learn(drawn):
    logits, labels = drawn
    found, there = measure(*drawn), labels != 255
    truth, predicted = labels[there], logits.argmax(-1)[there]
    expected = sklearn_metrics.confusion_matrix(truth, predicted, labels=range(CLASSES))
    np.testing.assert_array_equal(found.confusion, expected)
    iou = sklearn_metrics.jaccard_score(truth, predicted, labels=range(5), average=None)
    np.testing.assert_allclose(found.iou[:5], iou, rtol=1e-12)
    assert iou[4] == 0 and np.isnan(found.iou[5])
    scalars = found.scalars()
    assert scalars["mIoU"] == pytest.approx(iou.mean(), rel=1e-12)
    accuracy = sklearn_metrics.accuracy_score(truth, predicted)
    assert scalars["pixel_accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert scalars["examples"] == 7
    losses = [
        sklearn_metrics.log_loss(
            y[y != 255], softmax(x[y != 255].astype(np.float64)), labels=range(CLASSES)
        )
        for x, y in zip(logits, labels, strict=True)
    ]
    assert scalars["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def softmax(x):
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_the_scores_of_each_class_have_its_pixels():
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    rows = SegmentationMetrics(confusion, 0.5, 2).per_class(["a", "b", "c"])
    assert rows == [
        {"name": "a", "iou": 3 / 6, "pixels": 4},
        {"name": "b", "iou": 4 / 7, "pixels": 6},
        {"name": "c", "iou": None, "pixels": 0},
    ]


def test_masks_without_a_class_are_refused(drawn):
    logits, labels = drawn
    with pytest.raises(UserError, match="no pixel of the split has a class, all are 255"):
        measure(logits, np.full_like(labels, 255))


def test_logits_that_are_not_finite_are_refused(drawn):
    logits, labels = drawn
    logits[3, 2, 2] = np.nan
    labels[3, 2, 2] = 0
    with pytest.raises(UserError, match="the model's logits are not finite"):
        measure(logits, labels)
