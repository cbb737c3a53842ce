"""Masks are read as indices, and move with their images."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.masks import check_indices, read_mask, sample_nearest
from vit_jax.data.preprocess import eval_pair, eval_view, onto_image, train_pair, train_view
from vit_jax.data.protocols import PROTOCOLS, Preprocessing, evaluation
from vit_jax.errors import UserError

from ..sources import png

LEVELS = np.array([40, 100, 160, 220], np.uint8)  # of the classes in the images


def blocks(height=96, width=128, seed=0):
    """A mask of blocks of 32 pixels, and an image whose gray levels tell the classes."""
    coarse = np.random.default_rng(seed).integers(0, 4, (height // 32, width // 32))
    mask = np.kron(coarse, np.ones((32, 32), int)).astype(np.uint8)
    return png(np.repeat(LEVELS[mask][..., None], 3, -1)), png(mask), mask


def assert_aligned(view, mask, reach=1, least=50):
    """Away from the edges of blocks the gray level is that of the class, or black beyond."""
    steps = range(-reach, reach + 1)
    around = np.stack([np.roll(mask, (i, j), (0, 1)) for i in steps for j in steps])
    inside = (around == mask).all(0)
    inside[:reach] = inside[-reach:] = inside[:, :reach] = inside[:, -reach:] = False
    levels = np.zeros(256)
    levels[:4] = LEVELS
    assert inside.sum() >= least
    np.testing.assert_allclose(view[inside].mean(-1), levels[mask[inside]], atol=1.5)


@pytest.mark.parametrize("size", [32, (24, 40)])
@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_image_and_mask_stay_aligned_in_training(protocol, random_crop, random_flip, size):
    size = size if isinstance(size, int) else f"{size[0]}x{size[1]}"
    image, mask, _ = blocks()
    options = {"image_size": size, "protocol": protocol}
    options |= {"random_crop": random_crop, "random_flip": random_flip}
    seen = set()
    for seed in range(8):
        view, labels = train_pair(image, mask, np.random.default_rng(seed), **options)
        alone = train_view(image, np.random.default_rng(seed), **options)
        np.testing.assert_array_equal(view, alone)
        assert labels.dtype == np.uint8 and labels.shape == view.shape[:2]
        assert_aligned(view, labels)
        seen.add(labels.tobytes())
    assert (len(seen) > 1) == (random_crop or random_flip)


RULES = [
    *(evaluation(protocol, 32) for protocol in PROTOCOLS),
    evaluation("inception", "24x40"),
    Preprocessing(32, center_crop=0.9, interpolation="bicubic", antialias=True, resize="timm"),
    Preprocessing(32, center_crop=0.8, antialias=True, resize="huggingface"),
    Preprocessing(32, center_crop=0.8, squash=True),
]


@pytest.mark.parametrize("rule", RULES)
def test_image_and_mask_stay_aligned_in_evaluation(rule):
    image, mask, _ = blocks()
    view, labels = eval_pair(image, mask, rule)
    np.testing.assert_array_equal(view, eval_view(image, rule))
    assert_aligned(rule.to_pixels(view) * 255, labels, reach=2)  # As far as bicubic kernels.


def test_a_mask_turned_with_its_image_is_of_the_turned_image():
    pixels, _, mask = blocks()
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # The camera was turned: what is stored is 90 degrees off.
    Image.open(io.BytesIO(pixels)).rotate(90, expand=True).save(buffer, "JPEG", exif=exif)
    view, labels = eval_pair(buffer.getvalue(), png(mask), evaluation("inception", 32))
    assert_aligned((view + 1) * 127.5, labels)


def test_a_mask_goes_back_onto_the_image():
    image, encoded, mask = blocks()
    for rule in (evaluation("inception", "96x128"), evaluation("pretrain", "96x128")):
        _, view = eval_pair(image, encoded, rule)
        whole = onto_image(view, rule, *mask.shape)
        there = whole != 255
        assert there.mean() > (0.99 if rule.center_crop is None else 0.7)
        assert (whole[there] == mask[there]).mean() > 0.95
    assert 0 < (whole == 255).mean() < 0.3  # Beyond a central crop nothing is known.


def test_what_is_beyond_a_mask_is_ignored():
    found = sample_nearest(np.array([[1, 2], [3, 4]], np.uint8), (-1, 0, 3, 2), (3, 4))
    np.testing.assert_array_equal(found, [[255] * 4, [1, 1, 2, 2], [3, 3, 4, 4]])


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_indices_are_read_and_not_colors(mode):
    mask = np.array([[0, 1, 0], [1, 1, 0]], np.uint8)
    image = Image.fromarray(mask * 255).convert("1") if mode == "1" else Image.fromarray(mask)
    if mode == "P":
        image.putpalette([9, 9, 9, 200, 0, 0])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert Image.open(io.BytesIO(buffer.getvalue())).mode == mode
    np.testing.assert_array_equal(read_mask("mask.png", buffer.getvalue()), mask)


def test_what_is_no_mask_is_refused_in_one_line(tmp_path):
    rgb = png(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a.png has pixels of mode RGB, which are no indices"):
        read_mask("a.png", rgb)
    with pytest.raises(UserError, match=r"a.png is damaged \(.*\): fetch it again"):
        read_mask("a.png", png(np.zeros((64, 64), np.uint8))[:-30])
    with pytest.raises(UserError, match=r"a.png is no PNG: save the mask as one, JPEG changes"):
        read_mask("a.png", b"\xff\xd8\xff")
    with pytest.raises(UserError, match="none.png cannot be opened: No such file"):
        read_mask(str(tmp_path / "none.png"))


def test_an_index_beyond_the_classes_is_refused():
    check_indices("a.png", np.array([[0, 3, 255]], np.uint8), 4)
    with pytest.raises(UserError, match=r"a.png has class 4, and there are 4, from 0 to 3: mend"):
        check_indices("a.png", np.array([[0, 4, 255]], np.uint8), 4)


def test_a_mask_of_another_size_is_refused():
    image, _, _ = blocks()
    rule = evaluation("inception", 32)
    with pytest.raises(UserError, match="the mask has 4 x 5 pixels, and the image 96 x 128"):
        eval_pair(image, png(np.zeros((4, 5), np.uint8)), rule)
