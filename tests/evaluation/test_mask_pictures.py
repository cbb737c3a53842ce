"""Pictures of masks: their colors, and the files that a report consists of."""

import csv

import numpy as np
import pytest
from PIL import Image

from vit_jax.evaluation import mask_pictures
from vit_jax.evaluation.mask_pictures import overlay, palette, save_mask, write_report


def test_the_palette_is_that_of_pascal_voc():
    # The colors of VOC's devkit: aeroplane, bicycle, boat, person, tv monitor, and the border.
    known = {1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 15: (192, 128, 128)}
    known |= {0: (0, 0, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    for index, color in known.items():
        assert tuple(palette()[index]) == color
    assert len({tuple(color) for color in palette()}) == 256


def test_a_written_mask_has_the_indices_and_shows_the_colors(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save_mask(tmp_path / "a.png", mask)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), mask)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), palette()[mask])


def test_an_overlay_is_half_of_each():
    image, mask = np.full((1, 2, 3), 101, np.uint8), np.array([[0, 1]], np.uint8)
    np.testing.assert_array_equal(overlay(image, mask), [[[51] * 3, [115, 51, 51]]])


@pytest.fixture
def sheet(monkeypatch):
    shown, original = [], mask_pictures.contact_sheet

    def spy(images, title):
        shown.extend(images)
        return original(images, title)

    monkeypatch.setattr(mask_pictures, "contact_sheet", spy)
    return shown


def test_masks_are_made_smaller_without_new_colors(tmp_path, sheet):
    rng = np.random.default_rng(0)
    masks = [rng.choice([1, 2, 255], (500, 400)).astype(np.uint8) for _ in range(2)]
    pixels = rng.integers(0, 256, (500, 400, 3)).astype(np.uint8)
    rows = [{"name": "=1+1", "iou": 0.5, "pixels": 3}]
    paths = write_report(tmp_path / "report", "a title", [("a/b.jpg", pixels, *masks)], rows)
    assert [path.name for path in paths] == ["masks.png", "per_class.csv"]
    allowed = {tuple(palette()[index]) for index in (1, 2, 255)}
    for each in sheet[1:]:
        assert max(each.pixels.shape) == 192
        assert {tuple(color) for color in each.pixels.reshape(-1, 3)} <= allowed
    assert sheet[0].lines[0] == "b.jpg"
    with (tmp_path / "report/per_class.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert not row["name"].startswith("=")
