"""Resizing of pixels: boxes sampled in fractions of pixels, and the rules of whole pixels.

Kernels are separable. What is asked for most, bilinear without antialiasing of an image of common
size, is OpenCV's; all else is a product with a sparse matrix for each axis.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from vit_jax.data.protocols import Preprocessing, whole_pixels
from vit_jax.image_size import ImageSize, sides

cv2.setNumThreads(1)  # The threads are those of who calls.

# OpenCV counts pixels in 16 bits, and is given a copy in floats: larger images are not for it.
_MAX_SIDE = 1024

# What a product with a matrix reads at a time, in numbers: more would be memory that the system
# hands out anew for every image, which takes twice as long, and too much of a long strip.
_MAX_NUMBERS = 2**17

# Of a strip of more numbers only the part that is read is transposed, another is at once.
_MAX_TURNED = 2**24

# A strip that is longer, in pixels, is summed in another order than TensorFlow's.
_LONG = 2**16

# What may lie between two passes of PIL's resize, in pixels.
_MAX_BETWEEN = 2**26

# PIL's resize gets a copy, of 4 bytes a pixel; of an image of more numbers a channel at a time.
_MAX_COPY = 2**27

Box = tuple[float, float, float, float]  # y, x, height, width in source pixels


class _Taps(NamedTuple):
    """Source pixels that the output pixels of one axis read, and their weights, [size, taps]."""

    source: np.ndarray
    weights: np.ndarray


def sample_box(
    image: np.ndarray,
    box: Box,
    size: ImageSize,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> np.ndarray:
    """Samples a box with half-pixel centers, float32 [height, width, channels] of a size.

    The weights are normalized where the kernel reaches beyond the image: TensorFlow's
    ScaleAndTranslate, and with `antialias` PIL's resize without its rounding.

    Args:
        image: uint8 [height, width, channels].
        box: lies in the image. Pixels of the image around it are read, too.
        size: of the output.
        interpolation: "bilinear" or "bicubic" (Keys, a = -0.5).
        antialias: the kernel widens where the image shrinks.
    """
    y, x, height, width = box
    if interpolation == "bilinear" and not antialias and max(height, width) <= _MAX_SIDE:
        return _sample_with_opencv(image, box, size)
    tall, wide = sides(size)
    rows = _taps(y, height, image.shape[0], tall, interpolation, antialias)
    columns = _taps(x, width, image.shape[1], wide, interpolation, antialias)
    return _resample(image, rows, columns)


def by_channel(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Applies what knows images of three channels to each channel of others.

    OpenCV drops the axis of a single one and does not take any number, and PIL takes the last of
    two or four for the transparency of the others.
    """
    if image.shape[-1] == 3:
        return function(image)
    channels = [function(image[..., channel]) for channel in range(image.shape[-1])]
    return np.stack(channels, axis=-1)


def resize_and_crop(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Returns what evaluation sees by a rule of whole pixels.

    Args:
        image: uint8 [height, width, channels].
        preprocessing: of the model; its resize is not box.

    Returns:
        uint8 [height, width, channels].
    """
    resized = whole_pixels(preprocessing, *image.shape[:2])
    if preprocessing.resize == "big_vision":
        return resize_area(image, resized, preprocessing.image_size)
    if preprocessing.resize == "letterbox":
        return letterbox(image, resized, preprocessing.image_size)
    kernel = Image.Resampling[preprocessing.interpolation.upper()]
    return _resize_with_pil(image, resized, sides(preprocessing.image_size), kernel)


def resize_area(
    image: np.ndarray, resized: tuple[int, int, int, int], size: ImageSize
) -> np.ndarray:
    """TensorFlow's ResizeArea and a crop, cut down to 8 bits, in the order of its operations.

    A mean of equal values may be one place of a float short of them, and is cut down to one less:
    so the order matters.

    Args:
        image: uint8 [height, width, channels].
        resized: height and width to resize to, and top and left of the crop, in pixels.
        size: of the crop.

    Returns:
        uint8 [height, width, channels] of that size.
    """
    height, width, top, left = resized
    tall, wide = sides(size)
    rows, row_scale = _areas(image.shape[0], height, top, tall)
    columns, column_scale = _areas(image.shape[1], width, left, wide)
    if len(image) > _LONG:  # Rows first: its columns at their new width would take minutes.
        total = _resample(image.swapaxes(0, 1), columns, rows).swapaxes(0, 1)
    else:
        total = _resample(image, rows, columns)
    total *= np.float32(1) / (row_scale * column_scale)
    return total.astype(np.uint8)


def letterbox(image: np.ndarray, resized: tuple[int, int, int, int], size: ImageSize) -> np.ndarray:
    """Resizes as PIL does, bilinear and antialiased, and crops; beyond the image it is black.

    Args:
        image: uint8 [height, width, channels].
        resized: height and width to resize to, and top and left of the crop, in pixels.
        size: of the crop, which lies at the top left where it is larger.

    Returns:
        uint8 [height, width, channels] of that size.
    """
    height, width, top, left = resized
    tall, wide = sides(size)
    shown = min(tall, height - top), min(wide, width - left)
    view = np.zeros((tall, wide, image.shape[-1]), np.uint8)
    view[: shown[0], : shown[1]] = _resize_with_pil(
        image, resized, shown, Image.Resampling.BILINEAR
    )
    return view


def resize(image: np.ndarray, size: ImageSize) -> np.ndarray:
    """Resizes an image as `sample_box` does, in half the time, float32 [height, width, channels].

    Args:
        image: uint8 [height, width, channels].
        size: of the output.
    """
    if max(image.shape) > _MAX_SIDE:
        return sample_box(image, (0, 0, *image.shape[:2]), size)
    wanted = sides(size)[::-1]
    return by_channel(
        lambda x: cv2.resize(x, wanted, interpolation=cv2.INTER_LINEAR), image.astype(np.float32)
    )


def _sample_with_opencv(image: np.ndarray, box: Box, size: ImageSize) -> np.ndarray:
    y, x, height, width = box
    tall, wide = sides(size)
    (top, rows), (left, columns) = _centers(y, height, tall, 1), _centers(x, width, wide, 1)
    window = image[top : math.ceil(y + height) + 1, left : math.ceil(x + width) + 1]
    # OpenCV's coordinates are 0 in the center of a pixel.
    x_of, y_of = np.meshgrid(columns - np.float32(0.5), rows - np.float32(0.5))
    return by_channel(
        lambda x: cv2.remap(x, x_of, y_of, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE),
        window.astype(np.float32),
    )


def _centers(begin: float, extent: float, size: int, reach: float) -> tuple[int, np.ndarray]:
    """The first pixel of a window, and the centers of the output pixels in it, float32 [size]."""
    # In 32 bits and from where its window begins, as TensorFlow: between two pixels of a sharp
    # edge the rounding of a large image's coordinates can be seen.
    origin = max(math.floor(begin) - math.ceil(reach), 0)
    step, offset = np.float32(extent / size), np.float32(begin - origin)
    return origin, (np.arange(size, dtype=np.float32) + np.float32(0.5)) * step + offset


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
    origin, centers = _centers(begin, extent, size, reach)
    centers = origin + centers.astype(np.float64)[:, None]
    # Source pixel i has its center at i + 0.5.
    source = np.ceil(centers - reach - 0.5).astype(int) + np.arange(math.floor(2 * reach) + 1)
    weights = kernel(np.abs(source + 0.5 - centers) / scale)
    weights[(source < 0) | (source >= length)] = 0
    weights /= weights.sum(1, keepdims=True)
    return _Taps(np.clip(source, 0, length - 1), weights.astype(np.float32))


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
    """Sums over the columns, then over the rows, float32 [rows, columns, channels].

    The products are added in the order of the taps, one after the other.
    """
    channels = image.shape[-1]
    output = np.empty((len(rows.source), len(columns.source), channels), np.float32)
    for part in _parts(rows, channels * len(columns.source)):
        used, source = np.unique(rows.source[part], return_inverse=True)
        between = _sum(image[_slice_of(used)], columns)
        output[part] = _sum(between, _Taps(source, rows.weights[part]))
    return output


def _sum(pixels: np.ndarray, taps: _Taps) -> np.ndarray:
    """Sums over the second axis of [width, length, channels], float32 [size, width, channels]."""
    from scipy.sparse import csr_array  # Half a second, which a start need not wait for.

    channels = pixels.shape[-1]
    sums = np.empty((len(taps.source), channels * len(pixels)), np.float32)
    is_strip, first = pixels.size > _MAX_TURNED, 0
    turned = pixels if is_strip else by_channel(cv2.transpose, pixels)
    for part in _parts(taps, channels * len(pixels)):
        used, source = np.unique(taps.source[part], return_inverse=True)
        if is_strip:
            first = used[0]
            turned = by_channel(cv2.transpose, pixels[:, first : used[-1] + 1])
        flat = turned.reshape(len(turned), -1)[_slice_of(used - first)]
        begins = np.arange(0, source.size + 1, source.shape[1])
        terms = (taps.weights[part].ravel(), source.ravel(), begins)
        sums[part] = csr_array(terms, (len(source), len(used))) @ flat.astype(np.float32)
    return sums.reshape(len(sums), -1, channels)


def _slice_of(indices: np.ndarray) -> np.ndarray | slice:
    """Indices in their order, as a slice where they leave none out: a slice copies nothing."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _parts(taps: _Taps, numbers: int) -> list[slice]:
    """Parts of an axis that each read a bounded part of an image, which may be a long strip."""
    size = len(taps.source)
    count = min(1 + int(np.ptp(taps.source)) * numbers // _MAX_NUMBERS, size)
    edges = [size * part // count for part in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _resize_with_pil(
    image: np.ndarray,
    resized: tuple[int, int, int, int],
    view: tuple[int, int],
    kernel: Image.Resampling,
) -> np.ndarray:
    height, width, top, left = resized
    tall, wide = view
    if height * width > _MAX_BETWEEN:
        # Of a long strip only what is kept, which PIL may round otherwise here and there.
        y, x = image.shape[0] / height, image.shape[1] / width
        box = (left * x, top * y, (left + wide) * x, (top + tall) * y)
        return _pil_resize(image, (wide, tall), kernel, box)
    if image.shape[0] * width > _MAX_BETWEEN:  # A tall one: columns first, likewise.
        turned, resized, view = image.swapaxes(0, 1), (width, height, left, top), (wide, tall)
        return _resize_with_pil(turned, resized, view, kernel).swapaxes(0, 1)
    pixels = _pil_resize(image, (width, height), kernel)
    return pixels[top : top + tall, left : left + wide]


def _pil_resize(
    image: np.ndarray,
    size: tuple[int, int],
    kernel: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    def resized(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize(size, kernel, box))

    if image.size <= _MAX_COPY:
        return by_channel(resized, image)
    return np.dstack([resized(image[..., channel]) for channel in range(image.shape[-1])])
