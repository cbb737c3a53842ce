"""The drawn shapes with boxes, and what is said of them beforehand."""

import importlib.util
import json

import numpy as np
import pytest

from experiments import detection as experiment
from experiments.segmentation import COLORS
from vit_jax import config_files
from vit_jax.config import check_config
from vit_jax.data.datasets import open_evaluation
from vit_jax.errors import UserError

from ..detectors import boxes_of


def test_boxes_surround_the_shapes_just():
    for seed in range(20):
        image, boxes = experiment.draw(np.random.default_rng(seed), 64, colored=True)
        assert image.shape == (64, 64, 3) and 1 <= len(boxes) <= 3
        for (left, top, right, bottom), label, area in zip(
            boxes.corners.astype(int), boxes.classes, boxes.areas, strict=True
        ):
            inside = image[top:bottom, left:right].astype(float)
            near = np.abs(inside - COLORS[label]).mean(-1) < 60
            assert near.sum() > 0.9 * area and 0.4 < area / near.size <= 1
            # Noise is far from the color of the shape as a rule: each side touches it.
            for edge in (near[0], near[-1], near[:, 0], near[:, -1]):
                assert edge.any()


def test_annotations_are_read_as_they_were_drawn(tmp_path):
    experiment.write_folder(tmp_path / "shapes", {"train": 4, "test": 3}, 32)
    source = open_evaluation(f"folder:{tmp_path / 'shapes'}", split="train", has_boxes=True)
    assert source.class_names == experiment.CLASSES == ("disc", "square", "triangle")
    rng = np.random.default_rng(0)
    drawn = {f"{i:04}.png": experiment.draw(rng, 32).boxes for i in range(4)}
    for index, name in enumerate(source.ids()):
        expected = drawn[name.rpartition("/")[2]]
        np.testing.assert_array_equal(source.boxes(index).corners, expected.corners)
        np.testing.assert_array_equal(source.boxes(index).classes, expected.classes)
    (file,) = (tmp_path / "shapes").glob("annotations/instances_test.json")
    assert [x["id"] for x in json.loads(file.read_text())["categories"]] == [3, 10, 17]


@pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
)
def test_the_ceiling_is_one_unless_an_object_has_no_cell():
    apart = [boxes_of([[2, 3, 20, 25], [30, 30, 61, 50]], [0, 2])]
    assert experiment.ceiling(apart, (16, 16), 64).scalars()["AP"] == pytest.approx(1)
    # The second is smaller than a cell and between two middles.
    tiny = [boxes_of([[2, 3, 20, 25], [40.5, 40.5, 43.5, 43.5]], [0, 0])]
    # Recalls of 0, 0.01 and so on to 0.5 of the two objects are reached.
    assert experiment.ceiling(tiny, (8, 8), 64).scalars()["AP"] == pytest.approx(51 / 101)
    assert experiment.ceiling(tiny, (32, 32), 64).scalars()["AP"] == pytest.approx(1)


def test_runs_of_other_images_lie_apart(tmp_path, monkeypatch):
    written = []

    def stop(folder, counts, colored):
        written.append((folder.relative_to(tmp_path).as_posix(), counts["train"], colored))
        raise UserError("enough")

    monkeypatch.setattr(experiment, "write_folder", stop)
    for flags in ([], ["--small"], ["--small", "--images", "7"]):
        with pytest.raises(UserError, match="enough"):
            experiment.main(["--workdir", str(tmp_path), *flags])
    assert written == [
        ("2000/shapes", 2000, False),
        ("small-1000/shapes", 1000, True),
        ("small-7/shapes", 7, True),
    ]


@pytest.mark.parametrize("spec", ["tiny,folder:shapes", "ViT-S/16,folder:a", "b16,coco/2017"])
def test_the_config_is_one_of_detection(spec):
    config = config_files.load(f"detection:{spec}").config
    assert config.objective == "detection"
    check_config(config, may_lack=True)


def test_the_recipe_is_that_of_vitdet():
    # Detectron2's projects/ViTDet/configs: common/coco_loader_lsj.py, COCO/mask_rcnn_vitdet_b_100ep
    # and _l_100ep.
    config = config_files.load("detection:ViT-B/16,coco/2017").config
    assert (config.batch_size, config.duration) == (64, "100 epochs")
    assert (config.schedule.base_lr, config.schedule.warmup) == (1e-4, "250 steps")
    assert (config.schedule.decay, config.schedule.drops) == ("staircase", (0.889, 0.963))
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("adam", 0.1)
    assert (config.optimizer.layer_decay, config.model.stochastic_depth) == (0.7, 0.1)
    assert config.dataset.protocol == "letterbox_large"
    large = config_files.load("detection:ViT-L/16,coco/2017").config
    assert (large.optimizer.layer_decay, large.model.stochastic_depth) == (0.8, 0.4)


def test_a_spec_without_a_data_set_is_refused():
    with pytest.raises(UserError, match="names no data set: for example tiny,folder:PATH"):
        config_files.load("detection:tiny")
