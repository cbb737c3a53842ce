"""Views: what a model sees of an encoded image, in training and in evaluation.

The protocol chooses a box (see `protocols`), and one resampling takes exactly that box to the view.
Augmentation is drawn from a generator, so a view is a pure function of the image and its seed.
"""

import functools

import cv2
import numpy as np

from vit_jax.data.images import open_image, preprocess
from vit_jax.data.protocols import (
    Preprocessing,
    eval_box,
    evaluation,
    squashed_sides,
    whole_pixels,
)
from vit_jax.data.randaugment import randaugment
from vit_jax.data.resampling import resize, resize_and_crop, resize_area, sample_box
from vit_jax.image_size import ImageSize, sides

_ASPECTS = (3 / 4, 4 / 3)  # of an inception crop, width / height
_AREAS = (0.05, 1.0)  # of an inception crop, of the image's
_ATTEMPTS = 100  # at an inception crop; then the whole image is taken


def train_view(
    encoded: bytes,
    rng: np.random.Generator,
    *,
    image_size: ImageSize,
    protocol: str,
    jpeg_dct: str = "accurate",
    random_crop: bool = False,
    random_flip: bool = False,
    num_operations: int = 0,
    magnitude: float = 0,
    contrast: str = "augreg",
    turn: bool = True,
) -> np.ndarray:
    """Returns one view of an image, uint8 [height, width, 3].

    Each value is the nearest to the resampled one: it is off by half a gray level at most.

    Args:
        encoded: an image in one of `images.FORMATS`, see `images.read_image`.
        rng: the source of all randomness; not read where nothing is random.
        image_size: of the view.
        protocol: one of `protocols.PROTOCOLS`.
        jpeg_dct: one of `protocols.JPEG_DCTS`.
        random_crop: take a random box, as the protocol does in training.
        random_flip: mirror every other view.
        num_operations: of RandAugment. It comes last, after crop and flip (as in AugReg's code), on
            the view, whatever the size of the source image.
        magnitude: of RandAugment.
        contrast: of RandAugment, one of `augmentation.CONTRASTS`.
        turn: see `images.read_image`.

    Raises:
        UserError: the image cannot be decoded; it is called "the image" there.
    """
    resize_view = functools.partial(_random_crop, rng=rng) if random_crop else _eval_crop
    with open_image("the image", encoded, jpeg_dct, turn=turn) as image:
        pixels = resize_view(image, protocol=protocol, size=image_size)
        del image  # Only the view is worked on from here on.
    # To the nearest, half to even; of what is bilinear nothing lies beyond 0 and 255.
    view = cv2.convertScaleAbs(pixels) if pixels.dtype != np.uint8 else pixels
    if random_flip and rng.random() < 0.5:
        view = cv2.flip(view, 1)
    if num_operations:
        view = randaugment(
            view, rng, num_operations=num_operations, magnitude=magnitude, contrast=contrast
        )
    return view


def eval_view(
    encoded: bytes, preprocessing: Preprocessing, *, border: int = 0, turn: bool = True
) -> np.ndarray:
    """Returns what evaluation sees of an image, float32 [height, width, 3].

    Args:
        encoded: as in `train_view`.
        preprocessing: of the model.
        border: pixels to be cut off every side first.
        turn: see `images.read_image`.

    Raises:
        UserError: as in `train_view`.
    """
    with open_image("the image", encoded, preprocessing.jpeg_dct, turn=turn) as image:
        height, width = image.shape[:2]
        return preprocess(image[border : height - border, border : width - border], preprocessing)


def _eval_crop(image: np.ndarray, protocol: str, size: ImageSize) -> np.ndarray:
    preprocessing = evaluation(protocol, size)
    if preprocessing.resize == "box":
        return sample_box(image, eval_box(preprocessing, *image.shape[:2]), size)
    return resize_and_crop(image, preprocessing)


def _random_crop(
    image: np.ndarray, protocol: str, size: ImageSize, rng: np.random.Generator
) -> np.ndarray:
    height, width = image.shape[:2]
    if protocol in ("bit", "bit_hyperrule"):
        box = _box_of_squashed((height, width), squashed_sides(protocol, size), sides(size), rng)
        return sample_box(image, box, size)
    if protocol == "transfer":
        height, width, _, _ = whole_pixels(evaluation(protocol, size), height, width)
        tall, wide = sides(size)
        top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
        return resize_area(image, (height, width, int(top), int(left)), size)
    if protocol == "pad":
        image = _shifted(image, rng)
    else:
        # The published code crops before it resizes: nothing outside the crop is seen.
        y, x, h, w = inception_window(height, width, rng)
        image = image[y : y + h, x : x + w]
    return resize(image, size)


def inception_window(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws an inception crop (Szegedy et al., 2015): y, x, height, width in whole pixels.

    The algorithm is that of `tf.image.sample_distorted_bounding_box`, with which the published
    code crops: the aspect ratio is uniform in [3/4, 4/3], then the height in all that gives 5% to
    100% of the area and fits in, then the place in the image.

    Args:
        height: of the image, in pixels.
        width: likewise.
        rng: of all randomness.
    """
    least, most = (share * height * width for share in _AREAS)
    for _ in range(_ATTEMPTS):
        aspect = rng.uniform(*_ASPECTS)
        shortest, tallest = (round((area / aspect) ** 0.5) for area in (least, most))
        if round(tallest * aspect) > width:
            tallest = int((width + 0.5 - 1e-7) / aspect)
            tallest -= round(tallest * aspect) > width
        tallest = min(tallest, height)
        h = int(rng.integers(min(shortest, tallest), tallest + 1))
        w = round(h * aspect)
        # What rounding did to the area: first a pixel more, then one less.
        if h * w < least:
            h, w = h + 1, round((h + 1) * aspect)
        if h * w > most:
            h, w = h - 1, round((h - 1) * aspect)
        if least <= h * w <= most and 0 < w <= width and 0 < h <= height:
            # The last place is never drawn there, either.
            y, x = rng.integers(max(height - h, 1)), rng.integers(max(width - w, 1))
            return int(y), int(x), h, w
    return 0, 0, height, width


def _box_of_squashed(
    image: tuple[int, int],
    resized: tuple[int, int],
    view: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[float, float, float, float]:
    # What is left of the resized image by a crop at an integer offset, in source pixels.
    height, width = image
    y, x = (rng.integers(a - b + 1) / a for a, b in zip(resized, view, strict=True))
    tall, wide = (b / a for a, b in zip(resized, view, strict=True))
    return y * height, x * width, tall * height, wide * width


def _shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image moved by up to an eighth of each side, black where it was not."""
    height, width = image.shape[:2]
    rows, columns = height // 8, width // 8
    down, right = rows - rng.integers(2 * rows + 1), columns - rng.integers(2 * columns + 1)
    moved = np.zeros_like(image)
    moved[_overlap(down, height), _overlap(right, width)] = image[
        _overlap(-down, height), _overlap(-right, width)
    ]
    return moved


def _overlap(shift: int, length: int) -> slice:
    """The part of an axis that is covered by the same axis, moved."""
    return slice(max(shift, 0), length + min(shift, 0))
