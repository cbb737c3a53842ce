"""Views: what a model sees of an encoded image, in training and in evaluation.

The protocol chooses a box (see `protocols`), and one resampling takes exactly that box to the view.
Augmentation is drawn from a generator, so a view is a pure function of the image and its seed.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

from vit_jax.data.images import open_image, preprocess
from vit_jax.data.masks import check_indices, open_mask, sample_nearest
from vit_jax.data.protocols import (
    JITTERS,
    Preprocessing,
    eval_box,
    evaluation,
    fitting_sides,
    squashed_sides,
    whole_pixels,
)
from vit_jax.data.randaugment import randaugment
from vit_jax.data.resampling import (
    Box,
    by_channel,
    letterbox,
    resize,
    resize_and_crop,
    resize_area,
    sample_box,
)
from vit_jax.image_size import ImageSize, sides
from vit_jax.pixel_classes import MOST_CLASSES

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
    channels: int = 3,
) -> np.ndarray:
    """Returns one view of an image, uint8 [height, width, channels].

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
        channels: likewise; only those of three are for RandAugment.

    Raises:
        UserError: the image cannot be decoded; it is called "the image" there.
    """
    view, _ = located_view(
        encoded,
        rng,
        image_size=image_size,
        protocol=protocol,
        jpeg_dct=jpeg_dct,
        random_crop=random_crop,
        random_flip=random_flip,
        turn=turn,
        channels=channels,
    )
    if num_operations:
        view = randaugment(
            view, rng, num_operations=num_operations, magnitude=magnitude, contrast=contrast
        )
    return view


def train_pair(
    encoded: bytes,
    mask: bytes,
    rng: np.random.Generator,
    *,
    num_classes: int = MOST_CLASSES,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `train_view` does, and the same view of a mask, uint8 [height, width].

    Of the mask the nearest pixels are taken, and what lies beyond it is `pixel_classes.IGNORED`.

    Args:
        encoded: the image.
        mask: its mask, a PNG of indices of the same size.
        rng: as in `train_view`.
        num_classes: the whole mask may have these alone.
        **options: as in `train_view`, but for RandAugment, which would move the pixels of the image
            and not those of its mask.

    Raises:
        UserError: as in `train_view`, or the mask cannot be read, is of another size or has other
            classes; it is called "the mask" there.
    """
    view, geometry = located_view(encoded, rng, **options)
    return view, _view_of_mask(mask, geometry, options["image_size"], num_classes)


class Geometry(NamedTuple):
    """The part of an image that a view shows.

    Attributes:
        height: of the image, in pixels.
        width: likewise.
        box: what is shown, in pixels of the image; beyond it the view is black.
        is_mirrored: whether the view is.
    """

    height: int
    width: int
    box: Box
    is_mirrored: bool = False


def located_view(
    encoded: bytes,
    rng: np.random.Generator,
    *,
    image_size: ImageSize,
    protocol: str,
    jpeg_dct: str = "accurate",
    random_crop: bool = False,
    random_flip: bool = False,
    turn: bool = True,
    channels: int = 3,
) -> tuple[np.ndarray, Geometry]:
    """Returns what `train_view` does without RandAugment, and where in the image it lies.

    Arguments and errors are those of `train_view`.
    """
    with open_image("the image", encoded, jpeg_dct, turn=turn, channels=channels) as image:
        height, width = image.shape[:2]
        if random_crop:
            drawn = _draw((height, width), protocol, image_size, rng)
            pixels = _take(image, protocol, image_size, drawn)
            box = _box_of(drawn, (height, width), protocol, image_size)
        else:
            preprocessing = evaluation(protocol, image_size)
            pixels = _eval_crop(image, preprocessing)
            box = box_of_evaluation(preprocessing, height, width)
        del image  # Only the view is worked on from here on.
    # To the nearest, half to even; of what is bilinear nothing lies beyond 0 and 255.
    view = by_channel(cv2.convertScaleAbs, pixels) if pixels.dtype != np.uint8 else pixels
    is_mirrored = random_flip and rng.random() < 0.5
    if is_mirrored:
        view = by_channel(lambda x: cv2.flip(x, 1), view)
    return view, Geometry(height, width, box, is_mirrored)


def _view_of_mask(
    encoded: bytes, geometry: Geometry, size: ImageSize, num_classes: int
) -> np.ndarray:
    height, width, box, is_mirrored = geometry
    with open_mask("the mask", encoded, (height, width)) as mask:
        check_indices("the mask", mask, num_classes)
        view = sample_nearest(mask, box, sides(size))
    return np.ascontiguousarray(view[:, ::-1]) if is_mirrored else view


def eval_view(
    encoded: bytes, preprocessing: Preprocessing, *, border: int = 0, turn: bool = True
) -> np.ndarray:
    """Returns what evaluation sees of an image, float32 [height, width, channels].

    Args:
        encoded: as in `train_view`.
        preprocessing: of the model.
        border: pixels to be cut off every side first.
        turn: see `images.read_image`.

    Raises:
        UserError: as in `train_view`.
    """
    channels = preprocessing.channels
    with open_image(
        "the image", encoded, preprocessing.jpeg_dct, turn=turn, channels=channels
    ) as image:
        height, width = image.shape[:2]
        return preprocess(image[border : height - border, border : width - border], preprocessing)


def eval_pair(
    encoded: bytes,
    mask: bytes,
    preprocessing: Preprocessing,
    *,
    turn: bool = True,
    num_classes: int = MOST_CLASSES,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `eval_view` does, and the same view of a mask, uint8 [height, width].

    Args:
        encoded: the image.
        mask: its mask, a PNG of indices of the same size.
        preprocessing: of the model.
        turn: see `images.read_image`.
        num_classes: as in `train_pair`.

    Raises:
        UserError: as in `train_pair`.
    """
    channels = preprocessing.channels
    with open_image(
        "the image", encoded, preprocessing.jpeg_dct, turn=turn, channels=channels
    ) as image:
        height, width = image.shape[:2]
        view = preprocess(image, preprocessing)
    geometry = Geometry(height, width, box_of_evaluation(preprocessing, height, width))
    return view, _view_of_mask(mask, geometry, preprocessing.image_size, num_classes)


def onto_image(
    view: np.ndarray, preprocessing: Preprocessing, height: int, width: int
) -> np.ndarray:
    """A mask of what evaluation sees of an image, as one of the image, uint8 [height, width].

    What evaluation does not see is `pixel_classes.IGNORED`.

    Args:
        view: uint8, of the size of the model's input.
        preprocessing: of the model.
        height: of the image, in pixels.
        width: likewise.
    """
    top, left, tall, wide = box_of_evaluation(preprocessing, height, width)
    y, x = view.shape[0] / tall, view.shape[1] / wide
    return sample_nearest(view, (-top * y, -left * x, height * y, width * x), (height, width))


def box_of_evaluation(preprocessing: Preprocessing, height: int, width: int) -> Box:
    """The part of an image that evaluation sees, whatever its rule of resizing."""
    if preprocessing.resize == "box":
        return eval_box(preprocessing, height, width)
    resized = whole_pixels(preprocessing, height, width)
    return _box_of_resized(resized, (height, width), preprocessing.image_size)


def _box_of_resized(
    resized: tuple[int, int, int, int], image: tuple[int, int], size: ImageSize
) -> Box:
    """The box of a crop of a resized image: height and width of that, top and left of the crop."""
    height, width, top, left = resized
    y, x = image[0] / height, image[1] / width
    tall, wide = sides(size)
    return top * y, left * x, tall * y, wide * x


def _eval_crop(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    if preprocessing.resize == "box":
        box = eval_box(preprocessing, *image.shape[:2])
        return sample_box(image, box, preprocessing.image_size)
    return resize_and_crop(image, preprocessing)


# What is drawn of a random crop, see `_draw`.
_Drawn = tuple[float, float, float, float]


def _draw(
    image: tuple[int, int], protocol: str, size: ImageSize, rng: np.random.Generator
) -> _Drawn:
    """Draws the crop of an image of a height and width, which `_take` makes.

    It is a box in its pixels; with `transfer` and letterboxes height and width of the resized
    image, and top and left of the crop in it; with `pad` the pixels by which it moves down and to
    the right.
    """
    height, width = image
    if protocol in ("bit", "bit_hyperrule"):
        return _box_of_squashed(image, squashed_sides(protocol, size), sides(size), rng)
    if protocol == "transfer":
        height, width, _, _ = whole_pixels(evaluation(protocol, size), height, width)
        tall, wide = sides(size)
        top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
        return height, width, int(top), int(left)
    if protocol in JITTERS:
        height, width = fitting_sides(image, sides(size), rng.uniform(*JITTERS[protocol]))
        tall, wide = sides(size)
        top, left = rng.integers(max(height - tall, 0) + 1), rng.integers(max(width - wide, 0) + 1)
        return height, width, int(top), int(left)
    if protocol == "pad":
        rows, columns = height // 8, width // 8
        down, right = rows - rng.integers(2 * rows + 1), columns - rng.integers(2 * columns + 1)
        return int(down), int(right), height, width
    return inception_window(height, width, rng)


def _take(image: np.ndarray, protocol: str, size: ImageSize, drawn: _Drawn) -> np.ndarray:
    if protocol in ("bit", "bit_hyperrule"):
        return sample_box(image, drawn, size)
    y, x, h, w = map(int, drawn)
    if protocol == "transfer":
        return resize_area(image, (y, x, h, w), size)
    if protocol in JITTERS:
        return letterbox(image, (y, x, h, w), size)
    # The published code crops before it resizes: nothing outside the crop is seen.
    image = _shifted(image, y, x) if protocol == "pad" else image[y : y + h, x : x + w]
    return resize(image, size)


def _box_of(drawn: _Drawn, image: tuple[int, int], protocol: str, size: ImageSize) -> Box:
    """The part of an image of a height and width that a drawn crop shows."""
    y, x, height, width = drawn
    if protocol == "transfer" or protocol in JITTERS:
        return _box_of_resized((int(y), int(x), int(height), int(width)), image, size)
    return (-y, -x, height, width) if protocol == "pad" else drawn


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


def _shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image moved by so many pixels, black where it was not."""
    height, width = image.shape[:2]
    moved = np.zeros_like(image)
    moved[_overlap(down, height), _overlap(right, width)] = image[
        _overlap(-down, height), _overlap(-right, width)
    ]
    return moved


def _overlap(shift: int, length: int) -> slice:
    """The part of an axis that is covered by the same axis, moved."""
    return slice(max(shift, 0), length + min(shift, 0))
