"""The linear probe against scikit-learn's solver, and CLIP's search for its regularization."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

from vit_jax.evaluation import probe
from vit_jax.evaluation.probe import Score, hold_out, score_head, search, train_probe
from vit_jax.sharding import make_mesh

CLASSES = 4


def problem(images=300, width=20, seed=0):
    """Features of very different means and scales, whose classes overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images)
    centers = np.random.default_rng(1).normal(size=(CLASSES, width))
    x = centers[labels] + rng.normal(0, 1.5, (images, width))
    features = x * np.geomspace(0.1, 30, width) + np.linspace(-3, 3, width)
    return features.astype(np.float32), labels


def reference(features, labels, c):
    """scikit-learn's head for features as they are, from one for standardized ones."""
    mean, std = features.mean(0, np.float64), features.std(0, dtype=np.float64) + 1e-5
    found = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit((features - mean) / std, labels)
    kernel = found.coef_.T / std[:, None]
    return kernel, found.intercept_ - mean @ kernel


def train(features, labels, c=None):
    return train_probe(features, labels, CLASSES, hold_out(labels), make_mesh(), c)


@pytest.mark.parametrize("c", [1e-4, 0.05, 1.0])
def test_the_head_is_that_of_scikit_learn(c):
    features, labels = problem()
    found = train(features, labels, c)
    kernel, bias = reference(features, labels, c)
    std = features.std(0)[:, None]
    np.testing.assert_allclose(found.head.kernel * std, kernel * std, atol=1e-3)
    # A constant that is added to all biases changes no probability.
    logits = features @ found.head.kernel + found.head.bias
    expected = features @ kernel + bias
    logits, expected = (x - x.mean(1, keepdims=True) for x in (logits, expected))
    np.testing.assert_allclose(logits, expected, atol=5e-3)
    assert found.c == c and list(found.tried) == [c]


def test_scores_are_accuracy_and_mean_cross_entropy():
    features, labels = problem()
    others, other_labels = problem(seed=3)
    found = train(features, labels, 0.1)
    for score, x, y in (
        (found.train, features, labels),
        (score_head(found.head, others, other_labels, make_mesh()), others, other_labels),
    ):
        logits = x.astype(np.float64) @ found.head.kernel + found.head.bias
        probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        assert score.accuracy == pytest.approx(accuracy_score(y, logits.argmax(1)), abs=1e-7)
        assert score.loss == pytest.approx(log_loss(y, probabilities), rel=1e-4)
    assert 0.4 < found.train.accuracy < 1


def test_c_is_chosen_on_images_that_were_held_out():
    features, labels = problem()
    found = train(features, labels)
    held_out = hold_out(labels)
    # Features are standardized by all images, also while some are held out.
    mean, std = features.mean(0), features.std(0) + 1e-5
    x = (features - mean) / std
    for c in (0.01, found.c):
        kept = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(
            x[~held_out], labels[~held_out]
        )
        score = found.tried[c]
        assert score.accuracy == pytest.approx(kept.score(x[held_out], labels[held_out]), abs=1e-7)
        loss = log_loss(labels[held_out], kept.predict_proba(x[held_out]))
        assert score.loss == pytest.approx(loss, rel=1e-3)
    assert found.tried[found.c].accuracy == max(x.accuracy for x in found.tried.values())
    kernel, _ = reference(features, labels, found.c)
    np.testing.assert_allclose(found.head.kernel, kernel, atol=1e-3 * np.abs(kernel).max())


def test_images_may_be_gone_through_in_blocks(monkeypatch):
    features, labels = problem()
    whole = train(features, labels, 1.0)
    monkeypatch.setattr(probe, "_ROWS", 64)  # Five blocks of 60 rows.
    parts = train(features, labels, 1.0)
    std = features.std(0)[:, None]
    np.testing.assert_allclose(parts.head.kernel * std, whole.head.kernel * std, atol=1e-3)
    assert parts.train.accuracy == whole.train.accuracy


def test_a_feature_that_is_always_the_same_gets_no_weight():
    features, labels = problem()
    features[:, 3] = 0.1
    head = train(features, labels, 1.0).head
    assert np.isfinite(head.kernel).all() and np.abs(head.kernel[3]).max() < 1e-3


def test_without_held_out_images_all_are_learned_from():
    features, labels = problem()
    found = train_probe(features, labels, CLASSES, np.zeros(len(labels), bool), make_mesh(), 1.0)
    assert found.tried == {}
    kernel, _ = reference(features, labels, 1.0)
    std = features.std(0)[:, None]
    np.testing.assert_allclose(found.head.kernel * std, kernel * std, atol=1e-3)


@pytest.mark.parametrize("place", [-48, -41, -8, 0, 3, 29, 48])
def test_the_search_finds_every_peak_with_few_fits(place):
    calls = []

    def score(c):
        calls.append(c)
        return Score(1 - 0.01 * abs(8 * np.log10(c) - place), 1.0)

    tried = search(score)
    best = max(tried, key=lambda c: tried[c].accuracy)
    assert best == pytest.approx(10 ** (place / 8))
    assert len(calls) == len(tried) <= 15
    assert list(tried) == sorted(tried)
    # CLIP, Appendix A.3.
    starts = [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6]
    assert calls[:7] == pytest.approx(starts)


def test_of_equal_accuracies_the_lower_loss_is_taken():
    tried = search(lambda c: Score(0.9, abs(np.log10(c) - 1)))
    assert min(tried, key=lambda c: tried[c].loss) == pytest.approx(10)


def test_of_several_labels_some_with_a_label_are_held_out_or_none():
    labels = np.zeros((20, 3), np.int32)
    labels[4:14, 1] = 1
    held_out = hold_out(labels)
    assert held_out.sum() == 4 and labels[held_out].any(axis=1).sum() == 2
    labels[5:] = 0
    assert not hold_out(labels).any()


def test_images_of_every_class_are_held_out():
    labels = np.repeat([0, 1, 2, 3, 5], [100, 10, 2, 1, 3])
    labels = np.random.default_rng(0).permutation(labels)
    held_out = hold_out(labels, 0.2)
    assert np.bincount(labels[held_out], minlength=6).tolist() == [20, 2, 1, 0, 0, 1]
    assert (hold_out(labels, 0.2) == held_out).all()
    assert (hold_out(labels, 0.2, seed=1) != held_out).any()


@pytest.mark.slow
def test_many_devices_find_the_same_head():
    program = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
import jax, numpy as np
from vit_jax.evaluation.probe import train_probe
from vit_jax.sharding import make_mesh
rng = np.random.default_rng(0)
labels = rng.integers(0, 3, 100)
features = np.float32(rng.normal(size=(100, 7)) + np.eye(3, 7)[labels])
heads = [
    train_probe(features, labels, 3, np.arange(100) < 20, make_mesh(devices=devices), 1.0).head
    for devices in (jax.devices()[:1], jax.devices())
]
assert len(jax.devices()) == 3
for one, other in zip(*heads):
    np.testing.assert_allclose(one, other, atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
