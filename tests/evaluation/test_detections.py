"""Non-maximum suppression, and the way from the cells of a view back into an image."""

import numpy as np
import pytest

from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.evaluation.detections import (
    LEAST_SCORE,
    MOST_OBJECTS,
    MOST_OVERLAP,
    in_original,
    overlap,
    select,
)
from vit_jax.models.detection import Found


def drawn(count=400, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    begin = rng.uniform(0, 60, (count, 2))
    corners = np.concatenate([begin, begin + rng.uniform(5, 40, (count, 2))], axis=1)
    scores = rng.permutation(np.linspace(0.01, 0.99, count)).astype(np.float32)
    return scores, rng.integers(0, classes, count).astype(np.int32), corners.astype(np.float32)


def in_a_loop(scores, classes, corners):
    """The rule, candidate by candidate."""
    kept = []
    for index in np.argsort(-scores):

        def covers(other, index=index):
            (a, b, c, d), (e, f, g, h) = corners[index].astype(float), corners[other].astype(float)
            both = max(min(c, g) - max(a, e), 0) * max(min(d, h) - max(b, f), 0)
            union = (c - a) * (d - b) + (g - e) * (h - f) - both
            return classes[index] == classes[other] and both / union > MOST_OVERLAP

        if scores[index] >= LEAST_SCORE and not any(map(covers, kept)):
            kept.append(index)
    return kept[:MOST_OBJECTS]


@pytest.mark.parametrize(("count", "classes"), [(400, 3), (60, 1), (800, 20), (0, 1), (1, 1)])
def test_what_overlaps_with_a_better_one_of_its_class_goes(count, classes):
    scores, labels, corners = drawn(count, classes)
    found = select(scores, labels, corners)
    assert found.tolist() == in_a_loop(scores, labels, corners)
    assert len(found) <= MOST_OBJECTS


@pytest.mark.versions
def test_it_keeps_what_torchvision_keeps():
    torch = pytest.importorskip("torch")
    nms = pytest.importorskip("torchvision.ops").batched_nms
    scores, classes, corners = drawn(1000, 5, seed=1)
    probable = scores >= LEAST_SCORE
    tensors = (torch.from_numpy(x[probable]) for x in (corners, scores, classes.astype(np.int64)))
    expected = np.flatnonzero(probable)[nms(*tensors, MOST_OVERLAP).numpy()][:MOST_OBJECTS]
    np.testing.assert_array_equal(select(scores, classes, corners), expected)


def test_overlaps_are_shares_of_what_both_cover():
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 0, 0]], float)
    np.testing.assert_allclose(overlap(others[0], others), [1, 1 / 3, 0, 0])
    np.testing.assert_array_equal(overlap(others[3], others), 0)


def test_objects_are_put_back_into_the_image_they_are_of():
    found = Found(
        np.array([0.9, 0.8, 0.7, 0.02], np.float32),
        np.array([1, 0, 0, 0], np.int32),
        np.array([[0, 0, 32, 16], [8, 4, 40, 30], [2, 20, 9, 30], [0, 0, 1, 1]], np.float32),
    )
    each = in_original(found, evaluation("letterbox", 32), 100, 200)
    # The image covers 16 x 32 pixels of the view; the third lies in the black below it.
    np.testing.assert_allclose(each.corners, [[0, 0, 200, 100], [50, 25, 200, 100]])
    np.testing.assert_array_equal(each.classes, [1, 0])
    assert len(each.above(0.85).scores) == 1 == len(each.above(0.85).corners)


@pytest.mark.parametrize("field", ["scores", "corners"])
def test_outputs_that_are_not_finite_are_refused(field):
    found = Found(*(x[:4] for x in drawn()))
    broken = found._replace(**{field: np.full_like(getattr(found, field), np.nan)})
    with pytest.raises(UserError, match="the model's outputs are not finite"):
        in_original(broken, evaluation("letterbox", 32), 32, 32)
