"""Each operation against PIL, or loops in NumPy where PIL has none."""

import collections

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data import randaugment as ra
from vit_jax.data.augmentation import CONTRASTS

SEEDS = range(6)


def rng(seed):
    return np.random.default_rng((7, seed))


def photo(height=40, width=56):
    """Smooth, with edges and noise, of a different range in each channel."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    image = np.stack([30 + 3 * x, 200 - 4 * y + 40 * (x > 20), 90 + 40 * np.sin(x / 5)], -1)
    return np.clip(image + noise, 5, 240).astype(np.uint8)


def apply(name, magnitude, image, seed=SEEDS[0], **options):
    before = image.copy()
    result = ra.apply_operation(name, image, rng(seed), magnitude, **options)
    assert result.dtype == np.uint8 and result.shape == image.shape
    np.testing.assert_array_equal(image, before)
    return result.astype(int)


def pil(function, image, *arguments):
    return np.asarray(function(Image.fromarray(image), *arguments)).astype(int)


@pytest.mark.parametrize("image", [photo(), photo()[:1, :1], np.full((9, 9, 3), 77, np.uint8)])
def test_equalize_autocontrast_and_invert_are_pils(image):
    np.testing.assert_array_equal(apply("Equalize", 5, image), pil(ImageOps.equalize, image))
    np.testing.assert_array_equal(apply("Invert", 5, image), pil(ImageOps.invert, image))
    # PIL scales in floating point, and may round a whole number down.
    found, expected = apply("AutoContrast", 5, image), pil(ImageOps.autocontrast, image)
    np.testing.assert_allclose(found, expected, atol=1)
    assert (found == expected).mean() > 0.95


# Keeps int(0.4 M) bits, but no fewer than one and no more than all.
@pytest.mark.parametrize(("magnitude", "bits"), [(0, 1), (2, 1), (5, 2), (10, 4), (15, 6), (20, 8)])
def test_posterize_is_pils(magnitude, bits):
    expected = pil(ImageOps.posterize, photo(), bits)
    np.testing.assert_array_equal(apply("Posterize", magnitude, photo()), expected)


# int(25.6 M) as an 8-bit number.
@pytest.mark.parametrize(
    ("magnitude", "threshold"), [(0, 0), (3, 76), (9, 230), (10, 0), (15, 128), (20, 0)]
)
def test_solarize_is_pils(magnitude, threshold):
    expected = pil(ImageOps.solarize, photo(), threshold)
    np.testing.assert_array_equal(apply("Solarize", magnitude, photo()), expected)


def test_the_threshold_of_solarize_is_what_tensorflow_makes_of_the_number():
    @tf.function(autograph=False)
    def below(image, threshold):
        return image < threshold

    image = tf.range(256)
    for magnitude in (10, 15, 20, 25):
        literal = below(tf.cast(image, tf.uint8), int(magnitude / 10 * 256))
        expected = tf.where(literal, image, 255 - image)
        found = apply(
            "Solarize", magnitude, np.repeat(image.numpy()[None, :, None], 3, 2).astype(np.uint8)
        )
        np.testing.assert_array_equal(found[0, :, 0], expected)


@pytest.mark.parametrize(("magnitude", "addition"), [(0, 0), (5, 55), (10, 110), (15, 165)])
def test_solarize_add_is_numpys(magnitude, addition):
    image = photo().astype(int)
    expected = np.where(image < 128, np.minimum(image + addition, 255), image)
    np.testing.assert_array_equal(apply("SolarizeAdd", magnitude, photo()), expected)


# The factor is 0.18 M + 0.1.
@pytest.mark.parametrize(
    ("magnitude", "factor"), [(0, 0.1), (5, 1.0), (10, 1.9), (15, 2.8), (20, 3.7)]
)
@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_are_pils(name, magnitude, factor):
    expected = np.asarray(getattr(ImageEnhance, name)(Image.fromarray(photo())).enhance(factor))
    found = apply(name, magnitude, photo(), contrast="pil")
    np.testing.assert_allclose(found, expected.astype(int), atol=1)
    assert (found == expected).mean() > 0.98


# What AugReg's code takes for the mean of an image: its pixels over the 256 bins of a histogram, as
# an 8-bit number. 224 x 224 / 256 is 196.
@pytest.mark.parametrize(
    ("height", "width", "gray"), [(224, 224, 196), (384, 384, 255), (40, 56, 8), (15, 17, 0)]
)
@pytest.mark.parametrize(("magnitude", "factor"), [(0, 0.1), (10, 1.9), (15, 2.8)])
def test_the_contrast_of_augreg_goes_from_one_gray_for_every_image(
    height, width, gray, magnitude, factor
):
    image = photo(height, width)
    difference = image.astype(np.float32) - np.float32(gray)
    expected = np.trunc(np.clip(gray + np.float32(factor) * difference, 0, 255))
    np.testing.assert_array_equal(apply("Contrast", magnitude, image), expected)


def directions(name, magnitude, image):
    """What an operation makes of an image over several seeds: two different results."""
    results = [apply(name, magnitude, image, seed) for seed in SEEDS]
    distinct = {result.tobytes(): result for result in results}
    assert len(distinct) == 2
    return list(distinct.values())


def assert_both(found, expected, share):
    """Each of two results is one of the two expected ones, in the share of pixels given."""
    matches = [[(one == other).all(-1).mean() > share for other in expected] for one in found]
    assert matches in ([[True, False], [False, True]], [[False, True], [True, False]])


@pytest.mark.parametrize(("magnitude", "degrees"), [(4, 12.0), (10, 30.0), (14, 42.0)])
def test_rotate_is_pils_in_both_directions(magnitude, degrees):
    expected = [
        pil(lambda x, a=a: x.rotate(a, fillcolor=(128,) * 3), photo()) for a in (-degrees, degrees)
    ]
    # Where a coordinate falls between two pixels, rounding decides.
    assert_both(directions("Rotate", magnitude, photo()), expected, 0.98)


def test_a_positive_angle_is_counterclockwise():
    image = np.zeros((11, 11, 3), np.uint8)
    image[5, 9] = 255
    turned = ra.rotate(image, 90.0)
    assert np.argwhere(turned[..., 0]).tolist() == [[1, 5]]


@pytest.mark.parametrize(("magnitude", "shear"), [(4, 0.12), (9, 0.27), (20, 0.6)])
@pytest.mark.parametrize("axis", "XY")
def test_shear_is_pils_in_both_directions(axis, magnitude, shear):
    def transform(image, s):
        # PIL's coordinates are of a pixel's corner: its center is half a pixel further.
        matrix = (1, s, -s / 2, 0, 1, 0) if axis == "X" else (1, 0, 0, s, 1, -s / 2)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=(128,) * 3)

    expected = [pil(transform, photo(), s) for s in (-shear, shear)]
    assert_both(directions(f"Shear{axis}", magnitude, photo()), expected, 0.97)


@pytest.mark.parametrize(("magnitude", "pixels"), [(1, 10), (10, 100), (15, 150)])
@pytest.mark.parametrize("axis", "XY")
def test_translate_is_in_pixels_of_224(axis, magnitude, pixels):
    image = photo(224, 224)
    expected = []
    for sign in (1, -1):
        # NumPy: what moved in from beyond the edge is gray.
        moved = np.roll(image, sign * pixels, 1 if axis == "X" else 0).astype(int)
        empty = slice(0, pixels) if sign > 0 else slice(-pixels, None)
        moved[(slice(None), empty) if axis == "X" else (empty, slice(None))] = 128
        expected.append(moved)
    assert_both(directions(f"Translate{axis}", magnitude, image), expected, 0.9999)


def test_on_smaller_images_pixels_are_fewer_in_proportion():
    (left, right) = directions("TranslateX", 10, photo(28, 56))
    for result in (left, right):
        assert (result == 128).all((0, 2)).sum() == 25  # 100 of 224 is 25 of 56


@pytest.mark.parametrize(("magnitude", "size"), [(0, 0), (10, 40), (15, 60)])
def test_cutout_is_a_square_around_a_point_of_the_image(magnitude, size):
    image = np.full((224, 224, 3), 9, np.uint8)
    places = set()
    for seed in SEEDS:
        gray = (apply("Cutout", magnitude, image, seed) == 128).all(-1)
        rows, columns = np.flatnonzero(gray.any(1)), np.flatnonzero(gray.any(0))
        assert gray.sum() == len(rows) * len(columns)
        assert len(rows) <= 2 * size and len(columns) <= 2 * size
        # The point is inside: at least half of each side is, but at the very edge.
        assert len(rows) >= size and len(columns) >= size
        if size:
            places.add((rows[0], columns[0]))
    assert len(places) == (6 if size else 0)


def test_an_unknown_operation_raises():
    with pytest.raises(ValueError, match="'Blur' is none of AutoContrast, Equalize"):
        apply("Blur", 5, photo())


def run(image, seed, **options):
    return ra.randaugment(image, rng(seed), **options)


def test_the_same_seed_gives_the_same_image():
    options = {"num_operations": 2, "magnitude": 15}
    first = [run(photo(), seed, **options) for seed in range(20)]
    again = [run(photo(), seed, **options) for seed in range(20)]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({image.tobytes() for image in first}) > 15


def test_every_operation_is_drawn_equally_often():
    # Every operation makes another image of this one at this magnitude, whatever its direction.
    image = photo(16, 16)
    named = {}
    for name in ra.OPERATIONS:
        for seed in range(80):
            named[apply(name, 6, image, seed).astype(np.uint8).tobytes()] = name
    draws = rng(0)
    results = (
        ra.randaugment(image, draws, num_operations=1, magnitude=6).tobytes() for _ in range(1600)
    )
    counts = collections.Counter(named.get(result, "Cutout") for result in results)
    assert counts.keys() == set(ra.OPERATIONS) and len(counts) == 16
    # 100 each; the standard deviation is 9.7.
    assert min(counts.values()) > 60 and max(counts.values()) < 140


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_the_contrast_asked_for_is_the_one_applied(contrast):
    drawn = 0
    for seed in range(60):
        found = run(photo(), seed, num_operations=1, magnitude=15, contrast=contrast)
        if ra.OPERATIONS[rng(seed).integers(16)] != "Contrast":
            continue
        drawn += 1
        expected = apply("Contrast", 15, photo(), contrast=contrast)
        np.testing.assert_array_equal(found, expected)
        mean = ImageEnhance.Contrast(Image.fromarray(photo())).enhance(2.8)
        is_pils = np.abs(found.astype(int) - np.asarray(mean)).max() <= 1
        assert is_pils == (contrast == "pil")
    assert drawn


def test_operations_follow_one_another():
    draws = rng(8)
    image = photo()
    for _ in range(3):
        name = ra.OPERATIONS[draws.integers(16)]
        image = ra.apply_operation(name, image, draws, 10)
    np.testing.assert_array_equal(run(photo(), 8, num_operations=3, magnitude=10), image)
