"""Resizing of pixels: boxes sampled in fractions of pixels, and the rules of whole pixels.

Kernels are separable. What is asked for most, bilinear without antialiasing of an image of common
size, is OpenCV's; all else is a product with a sparse matrix for each axis.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from scipy.sparse import csr_array

from vit_jax.data.protocols import Preprocessing, whole_pixels

cv2.setNumThreads(1)  # The threads are those of who calls.

# OpenCV counts pixels in 16 bits, and is given a copy in floats: larger images are not for it.
_MAX_SIDE = 1024

# What a product with a matrix may read and write at a time, in numbers.
_MAX_NUMBERS = 2**22

# What may lie between two passes of PIL's resize, in pixels.
_MAX_BETWEEN = 2**26

Box = tuple[float, float, float, float]  # y, x, height, width in source pixels


class _Taps(NamedTuple):
    """What the output pixels of one axis read: source pixels and their weights, [size, taps]."""

    source: np.ndarray
    weights: np.ndarray


def sample_box(
    image: np.ndarray,
    box: Box,
    size: int,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> np.ndarray:
    """Samples a box with half-pixel centers, float32 [size, size, 3].

    The weights are normalized where the kernel reaches beyond the image: TensorFlow's
    ScaleAndTranslate, and with `antialias` PIL's resize without its rounding.

    Args:
        image: uint8 [height, width, 3].
        box: lies in the image. Pixels of the image around it are read, too.
        size: of the output, in pixels.
        interpolation: "bilinear" or "bicubic" (Keys, a = -0.5).
        antialias: the kernel widens where the image shrinks.
    """
    y, x, height, width = box
    if interpolation == "bilinear" and not antialias and max(height, width) <= _MAX_SIDE:
        return _sample_with_opencv(image, box, size)
    rows = _taps(y, height, image.shape[0], size, interpolation, antialias)
    columns = _taps(x, width, image.shape[1], size, interpolation, antialias)
    return _resample(image, rows, columns)


def resize_and_crop(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Returns what evaluation sees by a rule of whole pixels, uint8 [image_size, image_size, 3].

    Args:
        image: uint8 [height, width, 3].
        preprocessing: of the model; its resize is not box.
    """
    resized = whole_pixels(preprocessing, *image.shape[:2])
    if preprocessing.resize == "big_vision":
        return _area(image, resized, preprocessing.image_size)
    return _resize_with_pil(image, resized, preprocessing)


def _sample_with_opencv(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    if box == (0, 0, *image.shape[:2]):
        return cv2.resize(image.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    y, x, height, width = box
    top, left = max(math.floor(y) - 1, 0), max(math.floor(x) - 1, 0)
    window = image[top : math.ceil(y + height) + 1, left : math.ceil(x + width) + 1]
    # OpenCV's coordinates are of a pixel's center.
    y_scale, x_scale = height / size, width / size
    y_first, x_first = y - top + (y_scale - 1) / 2, x - left + (x_scale - 1) / 2
    return cv2.warpAffine(
        window.astype(np.float32),
        np.array([[x_scale, 0, x_first], [0, y_scale, y_first]]),
        (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - x)


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    # Keys, "Cubic convolution interpolation for digital image processing", 1981, Eq. 15.
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# The kernels, and how far they reach in pixels of the coarser grid.
_KERNELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_keys_cubic, 2),
}


def _taps(
    begin: float, extent: float, length: int, size: int, interpolation: str, antialias: bool
) -> _Taps:
    kernel, radius = _KERNELS[interpolation]
    scale = max(extent / size, 1.0) if antialias else 1.0
    reach = radius * scale
    # In 32 bits and from where its window begins, as TensorFlow: between two pixels of a sharp
    # edge the rounding of a large image's coordinates can be seen.
    origin = max(math.floor(begin) - math.ceil(reach), 0)
    step, offset = np.float32(extent / size), np.float32(begin - origin)
    centers = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * step + offset
    centers = origin + centers.astype(np.float64)[:, None]
    # Source pixel i has its center at i + 0.5.
    source = np.ceil(centers - reach - 0.5).astype(int) + np.arange(math.floor(2 * reach) + 1)
    weights = kernel(np.abs(source + 0.5 - centers) / scale)
    weights[(source < 0) | (source >= length)] = 0
    weights /= weights.sum(1, keepdims=True)
    return _Taps(np.clip(source, 0, length - 1), weights.astype(np.float32))


def _area(image: np.ndarray, resized: tuple[int, int, int, int], size: int) -> np.ndarray:
    """TensorFlow's ResizeArea and a crop, cut down to 8 bits, in the order of its operations.

    A mean of equal values may be one place of a float short of them, and is cut down to one less:
    so the order matters.
    """
    height, width, top, left = resized
    rows, row_scale = _areas(image.shape[0], height, top, size)
    columns, column_scale = _areas(image.shape[1], width, left, size)
    total = _resample(image, rows, columns)
    total *= np.float32(1) / (row_scale * column_scale)
    return total.astype(np.uint8)


def _areas(length: int, resized: int, first: int, size: int) -> tuple[_Taps, np.float32]:
    """The shares of source pixels in those of one axis, and what they add up to."""
    # Beyond 2^24 a float tells pixels no longer apart; TensorFlow could not hold such an image.
    kind = np.float32 if resized < 2**24 else np.float64
    scale = kind(length) / kind(resized)
    position = np.arange(first, first + size + 1).astype(kind)
    begin, end = position[:-1, None] * scale, position[1:, None] * scale
    start = np.floor(begin).astype(int)
    source = start + np.arange((np.ceil(end).astype(int) - start).max())
    at = source.astype(kind)
    shares = np.where(
        at < begin,
        np.where(at + 1 > end, scale, at + 1 - begin),
        np.where(at + 1 > end, end - at, 1),
    )
    shares = np.where(source < np.ceil(end), shares, 0).astype(np.float32)
    return _Taps(np.clip(source, 0, length - 1), shares), np.float32(scale)


def _resample(image: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
    """Sums over the columns, then over the rows, float32 [size, size, 3].

    The products are added in the order of the taps, one after the other.
    """
    size = len(rows.source)
    output = np.empty((size, len(columns.source), 3), np.float32)
    # Of a long strip what lies in between would be huge.
    numbers = 3 * (np.ptp(rows.source) + 1) * (image.shape[1] + size)
    for part in np.array_split(np.arange(size), min(1 + numbers // _MAX_NUMBERS, size)):
        used, source = np.unique(rows.source[part], return_inverse=True)
        between = _sum(cv2.transpose(image[used]), columns)
        output[part] = _sum(cv2.transpose(between), _Taps(source, rows.weights[part]))
    return output


def _sum(pixels: np.ndarray, taps: _Taps) -> np.ndarray:
    """Sums over the first axis of [length, width, 3], float32 [size, width, 3]."""
    size, count = taps.source.shape
    used, source = np.unique(taps.source, return_inverse=True)
    flat = pixels[used].reshape(len(used), -1).astype(np.float32, copy=False)
    begins = np.arange(0, (size + 1) * count, count)
    matrix = csr_array((taps.weights.ravel(), source.ravel(), begins), (size, len(used)))
    return (matrix @ flat).reshape(size, -1, 3)


def _resize_with_pil(
    image: np.ndarray, resized: tuple[int, int, int, int], preprocessing: Preprocessing
) -> np.ndarray:
    height, width, top, left = resized
    size = preprocessing.image_size
    kernel = Image.Resampling[preprocessing.interpolation.upper()]
    if height * width > _MAX_BETWEEN:
        # Of a long strip only what is kept, which PIL may round otherwise here and there.
        y, x = image.shape[0] / height, image.shape[1] / width
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return np.asarray(Image.fromarray(image).resize((size, size), kernel, box))
    if image.shape[0] * width > _MAX_BETWEEN:  # A tall one: columns first, likewise.
        turned = image.swapaxes(0, 1)
        return _resize_with_pil(turned, (width, height, left, top), preprocessing).swapaxes(0, 1)
    pixels = np.asarray(Image.fromarray(image).resize((width, height), kernel))
    return pixels[top : top + size, left : left + size]
