"""Masks are read as indices, and move with their images."""

import io
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import images, masks
from vit_jax.data.masks import check_indices, indices_of, open_mask, sample_nearest
from vit_jax.data.preprocess import eval_pair, eval_view, onto_image, train_pair, train_view
from vit_jax.data.protocols import PROTOCOLS, Preprocessing, evaluation
from vit_jax.errors import UserError

from ..sources import packed_png, png, png_of

LEVELS = np.array([40, 100, 160, 220], np.uint8)  # of the classes in the images


def read_mask(*args):
    with open_mask(*args) as mask:
        return mask


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


@pytest.mark.parametrize("kind", [0, 3], ids=["gray", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_indices_of_any_number_of_bits_are_not_stretched(bits, kind):
    indices = np.arange(16).reshape(2, 8) % min(2**bits, 16)
    found = read_mask("mask.png", packed_png(indices, bits, kind))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, indices)


@pytest.mark.parametrize(("mode", "shown"), [("I;16", "I"), ("RGBA", "RGBA"), ("LA", "LA")])
def test_other_pixels_than_indices_are_refused(mode, shown):
    buffer = io.BytesIO()
    Image.new(mode, (3, 2)).save(buffer, "PNG")
    with pytest.raises(UserError, match=f"^a.png has pixels of mode {shown}.*, which are no indic"):
        read_mask("a.png", buffer.getvalue())


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png is not a file: give a PNG"):
        read_mask(str(tmp_path / "a.png"))


def test_of_a_large_file_that_is_no_png_only_the_begin_is_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**28)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="a.png is no PNG"):
            read_mask(str(tmp_path / "a.png"))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_bomb_is_refused_by_its_number_of_pixels():
    bomb = png_of([b"\0"], 8, 0, 200_000_000)
    with pytest.raises(UserError, match=r"^a.png has more than 178,956,970 pixels: make it small"):
        read_mask("a.png", bomb)


def test_another_size_is_refused_before_a_pixel_is_decoded():
    cut_off = png(np.zeros((64, 80), np.uint8))[:-30]
    with pytest.raises(UserError, match="a.png has 80 x 64 pixels, and its image 8 x 9"):
        read_mask("a.png", cut_off, (9, 8))
    with pytest.raises(UserError, match="a.png is damaged"):
        read_mask("a.png", cut_off, (64, 80))


def test_masks_take_of_the_room_that_images_have(monkeypatch):
    room = images._Room(100)
    monkeypatch.setattr(images, "_room", room)
    with masks.open_mask("a.png", png(np.zeros((6, 10), np.uint8))):
        assert room._free == 40
    assert room._free == 100
    noise = np.random.default_rng(0).integers(0, 9, (9, 10)).astype(np.uint8)
    with pytest.raises(UserError, match="damaged"):
        read_mask("a.png", png(noise)[:-40])
    assert room._free == 100


def test_the_indices_of_a_mask_are_those_that_a_pixel_has():
    mask = np.random.default_rng(0).choice([3, 7, 255, 0, 254], (9, 11)).astype(np.uint8)
    assert list(indices_of(mask)) == sorted({*mask.ravel().tolist()} - {255})
    assert indices_of(np.full((2, 2), 255, np.uint8)) == b""


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
    with pytest.raises(UserError, match="the mask has 5 x 4 pixels, and its image 128 x 96"):
        eval_pair(image, png(np.zeros((4, 5), np.uint8)), rule)


@pytest.mark.parametrize("training", [True, False])
def test_an_index_beyond_the_classes_is_found_where_no_crop_shows_it(training):
    image, _, mask = blocks()
    mask[0, 0] = 9  # Beyond the central crop.
    rule = evaluation("pretrain", 32)
    with pytest.raises(UserError, match="the mask has class 9, and there are 4"):
        if training:
            options = {"image_size": 32, "protocol": "pretrain", "num_classes": 4}
            train_pair(image, png(mask), np.random.default_rng(0), **options)
        else:
            eval_pair(image, png(mask), rule, num_classes=4)
    _, view = eval_pair(image, png(mask), rule)
    assert 9 not in view
