"""COCO's average precision: of what is known to be right, and computed by hand."""

import importlib.util

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.evaluation import detection
from vit_jax.evaluation.detection import check_installed, detection_metrics
from vit_jax.evaluation.detections import Detections

from ..detectors import boxes_of

needs_pycocotools = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
)


def found_in(corners, scores, classes=None, size=(400, 400)):
    corners = np.array(corners, np.float64).reshape(-1, 4)
    classes = np.zeros(len(corners), np.int32) if classes is None else np.array(classes, np.int32)
    return Detections(*size, np.array(scores, np.float32), classes, corners)


@needs_pycocotools
def test_of_the_objects_themselves_it_is_one():
    rng = np.random.default_rng(0)
    truth, found = [], []
    for _ in range(5):
        begin = rng.uniform(0, 200, (6, 2))
        corners = np.concatenate([begin, begin + rng.uniform(5, 190, (6, 2))], axis=1)
        classes = rng.integers(0, 3, 6)
        truth.append(boxes_of(corners, classes))
        found.append(found_in(corners, rng.uniform(0.1, 1, 6), classes))
    metrics = detection_metrics(found, truth, ["a", "b", "c", "d"])
    scalars = metrics.scalars()
    assert scalars.pop("examples") == 5
    assert {"AP", "AP50", "AP75", "AP_large"} <= scalars.keys()
    assert list(scalars.values()) == pytest.approx([1] * len(scalars), rel=1e-12)
    rows = metrics.per_class(["a", "b", "c", "d"])
    assert [row["AP"] for row in rows[:3]] == pytest.approx([1] * 3, rel=1e-12)
    assert rows[3]["AP"] is None
    assert sum(row["objects"] for row in rows) == 30 and rows[3]["objects"] == 0


def by_hand(overlaps):
    """The AP of the case below, where detections match with these overlaps."""
    values = []
    for threshold in np.arange(0.5, 0.96, 0.05):
        first, third = (overlap >= threshold for overlap in overlaps)
        # Precision by recall, at recalls of 0, 0.01 and so on: 51 are up to the first of two.
        if first and third:
            values.append((51 * 1 + 50 * 2 / 3) / 101)
        else:
            values.append(51 / 101 if first else 0)
    return values


@needs_pycocotools
def test_it_is_what_one_computes_by_hand():
    truth = [boxes_of([[0, 0, 100, 100], [200, 200, 300, 300]])]
    corners = [[0, 0, 100, 82], [0, 200, 90, 290], [200, 200, 262, 300]]
    values = by_hand((0.82, 0.62))
    scalars = detection_metrics([found_in(corners, [0.9, 0.8, 0.7])], truth, ["a"]).scalars()
    assert scalars["AP"] == pytest.approx(np.mean(values), rel=1e-9)
    assert scalars["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101, rel=1e-9)
    assert scalars["AP75"] == pytest.approx(51 / 101, rel=1e-9)
    # The one that is wrong covers less than 96 x 96 pixels, so it counts for nothing there.
    assert scalars["AP_large"] == pytest.approx((3 * 1 + 4 * 51 / 101) / 10, rel=1e-9)
    assert "AP_small" not in scalars and "AP_medium" not in scalars  # There is none to find.


@needs_pycocotools
def test_sizes_are_those_of_the_areas_that_are_said():
    truth = [boxes_of([[0, 0, 100, 100], [200, 200, 300, 300]], areas=[20.0, 5000.0])]
    found = [found_in([[0, 0, 100, 100]], [0.9])]
    scalars = detection_metrics(found, truth, ["a"]).scalars()
    assert scalars["AP_small"] == pytest.approx(1) and scalars["AP_medium"] == 0
    assert "AP_large" not in scalars


@needs_pycocotools
def test_what_is_found_in_a_crowd_counts_for_nothing():
    crowded = boxes_of([[0, 0, 100, 100], [200, 200, 400, 400]], crowd=[False, True])
    corners = [[0, 0, 100, 100], [210, 210, 250, 250], [300, 300, 340, 340]]
    found = found_in(corners, [0.5, 0.9, 0.8])
    assert detection_metrics([found], [crowded], ["a"]).scalars()["AP"] == pytest.approx(1)
    plain = boxes_of([[0, 0, 100, 100]])
    assert detection_metrics([found], [plain], ["a"]).scalars()["AP"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="no image of the split has an object"):
        alone = boxes_of([[200, 200, 400, 400]], crowd=[True])
        detection_metrics([found], [alone], ["a"])


@needs_pycocotools
def test_shares_are_of_the_image_that_was_looked_at():
    truth = [boxes_of([[0.25, 0.25, 0.5, 0.75]], is_relative=True)]
    found = [found_in([[50, 50, 100, 150]], [0.9], size=(200, 200))]
    assert detection_metrics(found, truth, ["a"]).scalars()["AP"] == pytest.approx(1)


@needs_pycocotools
def test_what_is_found_at_the_edge_of_an_image_is_right_where_the_object_lies_beyond_it():
    # The best that can be found: training shows no more of it.
    truth = [boxes_of([[-300, 10, 50, 60]])]
    metrics = detection_metrics([found_in([[0, 10, 50, 60]], [0.9])], truth, ["a"])
    scalars = metrics.scalars()
    assert scalars["AP"] == pytest.approx(1)
    assert scalars["AP_medium"] == pytest.approx(1) and "AP_large" not in scalars


@needs_pycocotools
def test_nothing_found_is_zero():
    nothing = found_in([], [])
    truth = [boxes_of([[0, 0, 100, 100]])]
    assert detection_metrics([nothing], truth, ["a"]).scalars()["AP"] == 0


@needs_pycocotools
def test_it_prints_nothing(capsys):
    truth = [boxes_of([[0, 0, 100, 100]])]
    detection_metrics([found_in([[0, 0, 100, 100]], [0.9])], truth, ["a"])
    assert capsys.readouterr().out == ""


def test_without_pycocotools_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(detection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="run `pip install pycocotools`, or in a clone") as error:
        check_installed()
    assert "\n" not in str(error.value)


@needs_pycocotools
def test_every_image_must_have_been_looked_at():
    with pytest.raises(ValueError, match="1 images were looked at, and there are 0"):
        detection_metrics([found_in([], [])], [], ["a"])
