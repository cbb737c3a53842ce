"""RandAugment (Cubuk et al., 2020), drawn from a generator: the same seed, the same image.

Operations are those of PIL, 8-bit images in and out. Their choice and how a magnitude becomes their
arguments are those of the TensorFlow code that AugReg (Steiner et al., 2021) was trained with, the
tables below. Magnitude 10 was once the largest there; larger ones extrapolate. Contrast is not
PIL's there: it takes height * width / 256 for the mean of the image, see `enhance`. Two things are
not as there: pixels are fractions of the image's side, which at 224 pixels, AugReg's, is the same;
and an operation rounds as PIL's does.
"""

import cv2
import numpy as np
from PIL import Image, ImageEnhance

GRAY = 128  # of what a geometric operation or Cutout leaves empty
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
_ENHANCE = ("Color", "Contrast", "Brightness", "Sharpness")
_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
_MAX_MAGNITUDE = 10
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 100 / 224  # of the side
_MAX_CUTOUT = 40 / 224  # of the side, from the center to the edge

_LEVELS = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def randaugment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    num_operations: int,
    magnitude: float,
    contrast: str = "augreg",
) -> np.ndarray:
    """Applies operations, each drawn from `OPERATIONS` with equal probability, one after the other.

    Args:
        image: uint8 [height, width, 3].
        rng: the source of all randomness.
        num_operations: how many; N of the paper.
        magnitude: how strong each is; M of the paper.
        contrast: one of `augmentation.CONTRASTS`.

    Returns:
        uint8 [height, width, 3].
    """
    for _ in range(num_operations):
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        image = apply_operation(name, image, rng, magnitude, contrast)
    return image


def apply_operation(
    name: str,
    image: np.ndarray,
    rng: np.random.Generator,
    magnitude: float = _MAX_MAGNITUDE,
    contrast: str = "augreg",
) -> np.ndarray:
    """Applies one of `OPERATIONS`.

    Args:
        name: of the operation.
        image: uint8 [height, width, 3]; stays as it is.
        rng: decides the direction of a geometric operation and where Cutout cuts.
        magnitude: see `randaugment`.
        contrast: likewise.

    Returns:
        uint8 [height, width, 3].
    """
    level = magnitude / _MAX_MAGNITUDE
    if name == "AutoContrast":
        return autocontrast(image)
    if name == "Equalize":
        return equalize(image)
    if name == "Invert":
        return cv2.bitwise_not(image)
    if name == "Posterize":
        # A shift by all 8 bits is one by 7 there: the highest bit always stays.
        return posterize(image, min(max(int(level * 4), 1), 8))
    if name == "Solarize":
        # The threshold is an 8-bit number there: 256 is 0, and 384, of magnitude 15, is 128.
        return solarize(image, int(level * 256) % 256)
    if name == "SolarizeAdd":
        return solarize_add(image, int(level * 110))
    if name in _ENHANCE:
        return enhance(name, image, level * 1.8 + 0.1, contrast)
    if name == "Cutout":
        return cutout(image, rng, int(level * _MAX_CUTOUT * min(image.shape[:2])))
    if name not in _GEOMETRIC:
        raise ValueError(f"operation {name!r} is none of {', '.join(OPERATIONS)}")
    return _move(name, image, level if rng.random() < 0.5 else -level)


def _move(name: str, image: np.ndarray, level: float) -> np.ndarray:
    height, width = image.shape[:2]
    if name == "Rotate":
        return rotate(image, level * _MAX_DEGREES)
    if name == "ShearX":
        return affine(image, (1, level * _MAX_SHEAR, 0, 0, 1, 0))
    if name == "ShearY":
        return affine(image, (1, 0, 0, level * _MAX_SHEAR, 1, 0))
    if name == "TranslateX":
        return affine(image, (1, 0, round(level * _MAX_TRANSLATION * width), 0, 1, 0))
    return affine(image, (1, 0, 0, 0, 1, round(level * _MAX_TRANSLATION * height)))


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to from 0 to 255; a channel of one value stays."""
    # Over rows first: NumPy is slow along an axis of three.
    low = image.min(0).min(0).astype(int)
    spread = image.max(0).max(0) - low
    stretched = (_LEVELS[:, None] - low) * 255 // np.maximum(spread, 1)
    return _look_up(image, np.where(spread > 0, stretched, _LEVELS[:, None]))


def equalize(image: np.ndarray) -> np.ndarray:
    """Makes the histogram of each channel as flat as a table of 256 values can."""

    def one(count):
        step = (count.sum() - count[np.flatnonzero(count)[-1]]) // 255
        below = np.cumsum(count) - count
        return (below + step // 2) // step if step > 0 else _LEVELS

    histograms = [cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]
    return _look_up(image, np.stack([one(h.ravel().astype(int)) for h in histograms], -1))


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest bits of each value."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values from the threshold on."""
    return _look_up(image, np.where(np.less(_LEVELS, threshold), _LEVELS, 255 - _LEVELS))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds to the values below 128."""
    return _look_up(image, np.where(np.less(_LEVELS, 128), _LEVELS + addition, _LEVELS))


def enhance(name: str, image: np.ndarray, factor: float, contrast: str = "augreg") -> np.ndarray:
    """Goes from what an image is without a property, at factor 0, through the image, at factor 1.

    Args:
        name: "Color" (without: gray), "Contrast" (one gray), "Brightness" (black), "Sharpness"
            (smoothed).
        image: uint8 [height, width, 3].
        factor: beyond 1 the property becomes stronger.
        contrast: which gray is without contrast. "augreg": height * width / 256, at most 255, the
            same for every image: the published code sums a histogram, which is the number of
            pixels, and divides by its bins. At 224 pixels it is 196. "pil": the image's mean.
    """
    if name == "Color":
        return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))
    if name == "Sharpness":
        ends = (Image.fromarray(end) for end in (_smooth(image), image))
        return np.asarray(Image.blend(*ends, factor))
    gray = 0
    if name == "Contrast":
        gray = _mean_gray(image) if contrast == "pil" else min(image[..., 0].size // 256, 255)
    # In 32 bits and cut off, as PIL.
    start = np.float32(gray)
    return _look_up(image, start + np.float32(factor) * (_LEVELS.astype(np.float32) - start))


def _smooth(image: np.ndarray) -> np.ndarray:
    smooth = image.copy()
    # The pixels at the border have no neighbors there: they stay.
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return smooth


def _mean_gray(image: np.ndarray) -> int:
    return int(np.asarray(Image.fromarray(image).convert("L")).mean() + 0.5)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The values of a table, [256] or [256, 3] of any range, in the place of each value."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table.reshape(1, 256, -1))


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates counterclockwise about the center."""
    return np.asarray(Image.fromarray(image).rotate(degrees, fillcolor=(GRAY,) * 3))


def affine(
    image: np.ndarray, matrix: tuple[float, float, float, float, float, float]
) -> np.ndarray:
    """Takes each pixel from the nearest one to where a matrix says, gray from beyond the edge.

    Args:
        image: uint8 [height, width, 3].
        matrix: a, b, c, d, e, f: the pixel in column x, row y comes from column a x + b y + c, row
            d x + e y + f.
    """
    a, b, c, d, e, f = matrix
    # PIL's coordinates are of a pixel's corner: its center is half a pixel further.
    c, f = c + (1 - a - b) / 2, f + (1 - d - e) / 2
    source = Image.fromarray(image)
    moved = source.transform(
        source.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=(GRAY,) * 3
    )
    return np.asarray(moved)


def cutout(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Makes a square gray: `size` pixels to each side of a point that may be anywhere in the image.

    Args:
        image: uint8 [height, width, 3]; stays as it is.
        rng: decides the point.
        size: the square has 2 * size pixels a side.
    """
    y, x = (int(rng.integers(side)) for side in image.shape[:2])
    image = image.copy()
    image[max(y - size, 0) : y + size, max(x - size, 0) : x + size] = GRAY
    return image
