"""The drawn shapes, and what is said of them beforehand."""

import numpy as np
import pytest
from PIL import Image

from experiments import segmentation as experiment
from vit_jax import config_files
from vit_jax.config import check_config
from vit_jax.errors import UserError


def test_shapes_are_where_their_masks_say():
    for seed in range(20):
        image, mask = experiment.draw(np.random.default_rng(seed), 48, colored=True)
        assert image.shape == (48, 48, 3) and mask.shape == (48, 48)
        assert 0.02 < (mask > 0).mean() < 0.6
        for label in np.unique(mask[mask > 0]):
            color = image[mask == label].mean(0)
            np.testing.assert_allclose(color, experiment.COLORS[label - 1], atol=12)


def test_a_shape_has_the_area_of_its_kind():
    rows, columns = np.mgrid[:200, :200] + 0.5 - 100
    for label, area in ((1, np.pi), (2, (2 * 0.85) ** 2), (3, 0.55 * 1.8**2)):
        inside = experiment._inside(label, rows, columns, 50.0)
        assert inside.sum() == pytest.approx(area * 50**2, rel=0.03)


def test_what_is_drawn_is_a_function_of_the_split(tmp_path):
    for name in ("a", "b"):
        experiment.write_folder(tmp_path / name, {"train": 2, "test": 1}, 32)
    for path in (tmp_path / "a").rglob("*.png"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()
    first, second = (Image.open(tmp_path / f"a/train/images/000{i}.png") for i in (0, 1))
    assert np.asarray(first).tolist() != np.asarray(second).tolist()


def test_images_are_written_whole_or_not_at_all_and_once(tmp_path, monkeypatch):
    original, calls = experiment.draw, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(experiment, "draw", interrupted)
    folder = tmp_path / "runs" / "shapes"
    with pytest.raises(KeyboardInterrupt):
        experiment.write_folder(folder, {"train": 4}, 32)
    assert not folder.exists() and not [*folder.parent.iterdir()]
    experiment.write_folder(folder, {"train": 4}, 32)
    assert len([*folder.rglob("*.png")]) == 8
    drawn = len(calls)
    experiment.write_folder(folder, {"train": 4}, 32)
    assert len(calls) == drawn


def test_runs_of_other_images_lie_apart(tmp_path, monkeypatch):
    written = []

    def stop(folder, counts, side, colored):
        written.append((folder.relative_to(tmp_path).as_posix(), counts["train"], side, colored))
        raise UserError("enough")

    monkeypatch.setattr(experiment, "write_folder", stop)
    for flags in ([], ["--small"], ["--small", "--images", "7"]):
        with pytest.raises(UserError, match="enough"):
            experiment.main(["--workdir", str(tmp_path), *flags])
    assert written == [
        ("2000/shapes", 2000, 48, False),
        ("small-500/shapes", 500, 32, True),
        ("small-7/shapes", 7, 32, True),
    ]


def test_the_ceiling_of_masks_that_follow_the_patches_is_one():
    coarse = np.random.default_rng(0).integers(0, 4, (3, 1, 1))
    whole = np.broadcast_to(coarse, (3, 16, 16)).astype(np.uint8)
    assert experiment.ceilings(whole, 4) == (1.0, 1.0)
    # A line of one pixel is less than half of a patch.
    line = np.zeros((1, 16, 16), np.uint8)
    line[:, :, 6] = 1
    shares, fitted = experiment.ceilings(line, 4)
    assert shares == pytest.approx((15 / 16) / 2)  # The line is missed, the rest is right.
    assert fitted >= shares


@pytest.mark.parametrize("spec", ["tiny,folder:shapes", "ViT-S/16,folder:a", "b16,oxford_iiit_pet"])
def test_the_config_is_one_of_segmentation(spec):
    config = config_files.load(f"segmentation:{spec}").config
    assert config.objective == "segmentation"
    check_config(config, may_lack=True)


def test_the_recipe_is_that_of_segmenter():
    # segm/config.yml of rstrudel/segmenter: 64 epochs of ADE20K's 20,210 images by 8.
    config = config_files.load("segmentation:ViT-B/16,folder:ade").config
    assert (config.batch_size, config.schedule.base_lr) == (8, 0.001)
    assert config.duration == "160000 steps"
    assert abs(160_000 / (64 * 20_210 / 8) - 1) < 0.02
    assert config.dataset.image_size == 512
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("sgd", 0.0)
    assert (config.model.stochastic_depth, config.model.dropout_rate) == (0.1, 0.0)


def test_a_spec_without_a_data_set_is_refused():
    with pytest.raises(UserError, match="names no data set: for example tiny,folder:PATH"):
        config_files.load("segmentation:tiny")
