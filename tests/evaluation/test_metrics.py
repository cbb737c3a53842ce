import functools
import math

import jax
import numpy as np
import pytest
from sklearn import metrics

from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import (
    mean_metrics,
    multilabel_accuracy,
    one_ahead,
    real_accuracy,
)
from vit_jax.models import create_model
from vit_jax.sharding import make_mesh
from vit_jax.steps import classification, eval_step

from .scoring import scored


@pytest.mark.parametrize("batch_size", [1, 4, 5, 16])
def test_every_image_counts_once_whatever_the_batch_size(batch_size):
    model = create_model(
        {"architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "mlp_dim": 8,
         "num_heads": 2, "num_classes": 3}
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (11, 4, 4, 3)).astype(np.float32)
    labels = rng.integers(0, 3, 11).astype(np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)

    def batches():
        for start in range(0, 11, batch_size):
            image, label = images[start : start + batch_size], labels[start : start + batch_size]
            pad = batch_size - len(label)
            yield {
                "image": np.pad(image, ((0, pad), (0, 0), (0, 0), (0, 0))),
                "label": np.pad(label, (0, pad)),
                "mask": np.pad(np.ones(len(label), np.float32), (0, pad)),
            }

    step = jax.jit(functools.partial(eval_step, objective=classification(model, "softmax")))
    result = mean_metrics(step, params, batches(), make_mesh())
    logits = np.asarray(jax.jit(model.apply)({"params": params}, images), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert result["examples"] == 11
    assert result["accuracy"] == np.mean(logits.argmax(-1) == labels)
    assert result["loss"] == pytest.approx(-np.log(p[np.arange(11), labels]).mean(), rel=1e-5)


def random_logits(images=203, classes=9, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 1, images).astype(np.int32)  # The last class is never true.
    logits = rng.normal(0, 2, (images, classes)).astype(np.float32)
    logits[np.arange(images), labels] += 2
    return logits, labels


@pytest.mark.parametrize("batch_size", [1, 7, 29, 203, 256])
def test_measures_agree_with_scikit_learn_at_any_batch_size(batch_size):
    logits, labels = random_logits()
    found = scored(logits, labels, batch_size)
    classes = np.arange(9)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    predicted = p.argmax(1)
    assert found.accuracy == metrics.accuracy_score(labels, predicted)
    assert found.top5_accuracy == metrics.top_k_accuracy_score(labels, logits, k=5, labels=classes)
    assert found.loss == pytest.approx(metrics.log_loss(labels, p, labels=classes), rel=1e-12)
    expected = metrics.confusion_matrix(labels, predicted, labels=classes)
    np.testing.assert_array_equal(found.confusion(), expected)
    scores = found.per_class()
    *expected, images = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    assert scores.images.tolist() == images.tolist()
    np.testing.assert_allclose(scores[:3], expected, rtol=1e-12)
    assert math.isnan(scores.recall[-1])
    np.testing.assert_allclose(found.losses, -np.log(p[np.arange(203), labels]), rtol=1e-9)
    np.testing.assert_allclose(found.confidences, p.max(1), rtol=1e-9)


def expected_calibration_error(confidence, correct):
    """Guo et al. (2017), Eqs. 1 to 3, word by word."""
    total = 0.0
    for m in range(1, 16):
        members = ((m - 1) / 15 < confidence) & (confidence <= m / 15)
        if members.any():
            gap = correct[members].mean() - confidence[members].mean()
            total += members.sum() / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("batch_size", [7, 256])
def test_calibration_error_is_that_of_its_definition(batch_size):
    logits, labels = random_logits()
    p = np.exp(logits.astype(np.float64))
    confidence = p.max(1) / p.sum(1)
    expected = expected_calibration_error(confidence, logits.argmax(1) == labels)
    found = scored(logits, labels, batch_size)
    assert found.calibration_error == pytest.approx(expected, rel=1e-9)
    assert expected > 0.02


def test_a_bin_of_the_calibration_error_has_its_upper_edge():
    # Certain and wrong, and right at 0.95: both in (14/15, 1], where they are right half the time.
    logits = np.array([[90, -90], [np.log(0.95 / 0.05), 0]], np.float32)
    found = scored(logits, np.array([1, 0], np.int32), 2)
    assert found.calibration_error == pytest.approx((1 + 0.95) / 2 - 0.5, rel=1e-6)


def test_calibration_error_by_hand():
    # Two classes at 0.8, of four images one is right: |1/4 - 4/5|.
    logits = np.tile(np.log([[0.8, 0.2]]), (4, 1)).astype(np.float32)
    found = scored(logits, np.array([0, 1, 1, 1], np.int32), 4)
    assert found.calibration_error == pytest.approx(0.55, rel=1e-6)
    # Quite sure and right: nothing is wrong, and the last bin has room for 1.
    sure = scored(np.array([[90.0, -90.0]], np.float32), np.array([0], np.int32), 4)
    assert sure.calibration_error == pytest.approx(0, abs=1e-12)


def test_loss_and_confidence_of_a_sigmoid_model():
    logits, labels = random_logits()
    found = scored(logits, labels, 50, loss="sigmoid")
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    target = np.eye(9)[labels]
    losses = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-9)
    expected = expected_calibration_error(p.max(1), logits.argmax(1) == labels)
    assert found.calibration_error == pytest.approx(expected, rel=1e-9)


def test_a_sigmoid_model_that_believes_in_no_class():
    found = scored(np.full((3, 4), -1000, np.float32), np.zeros(3, np.int32), 2, loss="sigmoid")
    assert (found.accuracy, found.calibration_error) == (1, 1)


@pytest.mark.parametrize(("place", "top5"), [(3, True), (4, True), (5, False), (8, False)])
def test_of_equal_logits_the_first_classes_are_the_top_five(place, top5):
    found = scored(np.zeros((1, 9), np.float32), np.array([place], np.int32), 1)
    assert found.predicted.tolist() == [0]
    assert found.top5_accuracy == top5


def test_top_five_of_few_classes_is_everything():
    logits, labels = random_logits(classes=4)
    assert scored(logits, labels, 50).top5_accuracy == 1


def test_confusion_is_true_by_predicted():
    found = scored(np.eye(3, dtype=np.float32)[[2, 2, 0]], np.array([0, 0, 1], np.int32), 2)
    assert found.confusion().tolist() == [[0, 0, 2], [1, 0, 0], [0, 0, 0]]


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="logits are not finite"):
        scored(np.array([[np.nan, 0]], np.float32), np.array([0], np.int32), 1)


def test_images_without_a_label_are_refused():
    with pytest.raises(UserError, match="without a label"):
        scored(np.zeros((2, 3), np.float32), np.array([0, -1], np.int32), 2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_real_counts_images_with_a_label_only(batch_size):
    predicted = [0, 1, 2, 3, 0]
    sets = [{0, 3}, {0, 2}, set(), {3}, set()]  # Right, wrong, -, right, -.
    labels = np.array([[c in labels for c in range(4)] for labels in sets], np.int32)
    logits = np.eye(4, dtype=np.float32)[predicted]
    assert scored(logits, labels, batch_size, real_accuracy) == (2 / 3, 3)


def test_real_without_any_label_is_refused():
    with pytest.raises(UserError, match="no image of the split has a label of ReaL"):
        scored(np.eye(3, dtype=np.float32), np.zeros((3, 3), np.int32), 2, real_accuracy)


def test_several_label_accuracy_is_that_of_a_loop_at_any_batch_size():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(53, 12)).round(1).astype(np.float32)  # With equal ones.
    labels = (rng.random((53, 12)) < 0.15).astype(np.int32)
    top1 = top5 = 0
    for row, right in zip(logits, labels, strict=True):
        ranking = sorted(range(12), key=lambda i: (-row[i], i))
        top1 += right[ranking[0]]
        top5 += right[ranking[:5]].any()
    for batch_size in (1, 7, 64):
        found = scored(logits, labels, batch_size, multilabel_accuracy)
        assert found == {"examples": 53, "accuracy": top1 / 53, "top5_accuracy": top5 / 53}
    logits[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        scored(logits, labels, 8, multilabel_accuracy)


def test_the_next_batch_is_started_before_the_present_one_is_waited_for():
    events = []

    def start():
        for number in range(3):
            events.append(f"start {number}")
            yield number

    for number in one_ahead(start()):
        events.append(f"wait {number}")
    assert events == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]
