"""RandAugment (Cubuk et al., 2020) with stateless randomness: the same seed, the same image.

Operations are those of PIL, 8-bit images in and out. Their choice and how a magnitude becomes their
arguments are those of the TensorFlow code that AugReg (Steiner et al., 2021) was trained with, the
tables below. Magnitude 10 was once the largest there; larger ones extrapolate. Contrast is not
PIL's there: it takes height * width / 256 for the mean of the image, see `enhance`. Two things are
not as there: pixels are fractions of the image's side, which at 224 pixels, AugReg's, is the same;
and an operation rounds as PIL's does.
"""

import functools
import math

import tensorflow as tf

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
_MAX_MAGNITUDE = 10
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 100 / 224  # of the side
_MAX_CUTOUT = 40 / 224  # of the side, from the center to the edge


def randaugment(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    num_operations: int,
    magnitude: float,
    contrast: str = "augreg",
) -> tf.Tensor:
    """Applies operations, each drawn from `OPERATIONS` with equal probability, one after the other.

    Args:
        image: [height, width, 3] of whole numbers from 0 to 255, of any type.
        seed: int64 [2], the source of all randomness.
        num_operations: how many; N of the paper.
        magnitude: how strong each is; M of the paper.
        contrast: one of `augmentation.CONTRASTS`.

    Returns:
        int32 [height, width, 3], from 0 to 255.
    """
    image = tf.cast(image, tf.int32)
    for layer in tf.unstack(tf.random.split(seed, num_operations), num_operations):
        choice_seed, argument_seed = tf.unstack(tf.random.split(layer, 2))
        choice = tf.random.stateless_uniform([], choice_seed, 0, len(OPERATIONS), tf.int32)
        branches = [
            functools.partial(apply_operation, name, image, argument_seed, magnitude, contrast)
            for name in OPERATIONS
        ]
        image = tf.ensure_shape(tf.switch_case(choice, branches), image.shape)
    return image


def apply_operation(
    name: str,
    image: tf.Tensor,
    seed: tf.Tensor,
    magnitude: float = _MAX_MAGNITUDE,
    contrast: str = "augreg",
) -> tf.Tensor:
    """Applies one of `OPERATIONS`.

    Args:
        name: of the operation.
        image: int32 [height, width, 3] from 0 to 255.
        seed: int64 [2]; decides the direction of a geometric operation and where Cutout cuts.
        magnitude: see `randaugment`.
        contrast: likewise.

    Returns:
        int32 [height, width, 3] from 0 to 255.
    """
    level = magnitude / _MAX_MAGNITUDE
    sign = tf.where(tf.random.stateless_uniform([], seed) < 0.5, -1.0, 1.0)
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    if name == "AutoContrast":
        return autocontrast(image)
    if name == "Equalize":
        return equalize(image)
    if name == "Invert":
        return tf.subtract(255, image)
    if name == "Rotate":
        return rotate(image, sign * (level * _MAX_DEGREES))
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
    if name == "ShearX":
        return affine(image, [1.0, sign * (level * _MAX_SHEAR), 0.0, 0.0, 1.0, 0.0])
    if name == "ShearY":
        return affine(image, [1.0, 0.0, 0.0, sign * (level * _MAX_SHEAR), 1.0, 0.0])
    if name == "TranslateX":
        shift = tf.round(level * _MAX_TRANSLATION * width)
        return affine(image, [1.0, 0.0, sign * shift, 0.0, 1.0, 0.0])
    if name == "TranslateY":
        shift = tf.round(level * _MAX_TRANSLATION * height)
        return affine(image, [1.0, 0.0, 0.0, 0.0, 1.0, sign * shift])
    if name == "Cutout":
        size = tf.cast(level * _MAX_CUTOUT * tf.minimum(height, width), tf.int32)
        return cutout(image, seed, size)
    raise ValueError(f"operation {name!r} is none of {', '.join(OPERATIONS)}")


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to from 0 to 255; a channel of one value stays."""
    low = tf.reduce_min(image, (0, 1))
    spread = tf.reduce_max(image, (0, 1)) - low
    return tf.where(spread > 0, (image - low) * 255 // tf.maximum(spread, 1), image)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Makes the histogram of each channel as flat as a table of 256 values can."""

    def one(channel):
        count = tf.math.bincount(tf.reshape(channel, [-1]), minlength=256)
        step = (tf.size(channel) - count[tf.reduce_max(channel)]) // 255
        below = tf.cumsum(count, exclusive=True)
        table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
        return tf.where(step > 0, tf.gather(table, channel), channel)

    return tf.stack([one(channel) for channel in tf.unstack(image, 3, -1)], -1)


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the highest bits of each value."""
    return image - image % 2 ** (8 - bits)


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts the values from the threshold on."""
    return tf.where(tf.less(image, threshold), image, tf.subtract(255, image))


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
    """Adds to the values below 128."""
    added = tf.clip_by_value(tf.add(image, addition), 0, 255)
    return tf.where(tf.less(image, 128), added, image)


def enhance(name: str, image: tf.Tensor, factor: float, contrast: str = "augreg") -> tf.Tensor:
    """Goes from what an image is without a property, at factor 0, through the image, at factor 1.

    Args:
        name: "Color" (without: gray), "Contrast" (one gray), "Brightness" (black), "Sharpness"
            (smoothed).
        image: int32 [height, width, 3].
        factor: beyond 1 the property becomes stronger.
        contrast: which gray is without contrast. "augreg": height * width / 256, at most 255, the
            same for every image: the published code sums a histogram, which is the number of
            pixels, and divides by its bins. At 224 pixels it is 196. "pil": the image's mean.
    """
    without = {
        "Color": _gray,
        "Contrast": {"augreg": _histogram_gray, "pil": _mean_gray}[contrast],
        "Brightness": tf.zeros_like,
        "Sharpness": _smooth,
    }[name](image)
    start, end = tf.cast(without, tf.float32), tf.cast(image, tf.float32)
    return tf.cast(tf.clip_by_value(start + factor * (end - start), 0.0, 255.0), tf.int32)


def _gray(image):
    # ITU-R 601-2 in 16-bit fixed point.
    weights = tf.constant([19595, 38470, 7471])
    return (tf.reduce_sum(image * weights, -1, keepdims=True) + 2**15) // 2**16


def _histogram_gray(image):
    return tf.minimum(tf.size(image[..., 0]) // 256, 255)


def _mean_gray(image):
    return tf.cast(tf.reduce_mean(tf.cast(_gray(image), tf.float32)) + 0.5, tf.int32)


def _smooth(image):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)
    kernel = tf.tile(tf.reshape(kernel, [3, 3, 1, 1]), [1, 1, 3, 1])
    pixels = tf.cast(image, tf.float32)[None]
    total = tf.nn.depthwise_conv2d(pixels, kernel, [1, 1, 1, 1], "VALID")
    inner = (tf.cast(tf.squeeze(total, 0), tf.int32) + 6) // 13
    # The pixels at the border have no neighbors there: they stay.
    inside = tf.pad(tf.ones_like(inner, tf.bool), [[1, 1], [1, 1], [0, 0]])
    return tf.where(inside, tf.pad(inner, [[1, 1], [1, 1], [0, 0]]), image)


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
    """Rotates counterclockwise about the center."""
    radians = tf.multiply(degrees, math.pi / 180)
    cos, sin = tf.cos(radians), tf.sin(radians)
    last = tf.cast(tf.shape(image)[:2] - 1, tf.float32)
    y, x = last[0] / 2, last[1] / 2
    return affine(image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y])


def affine(image: tf.Tensor, matrix: list[tf.Tensor | float]) -> tf.Tensor:
    """Takes each pixel from the nearest one to where a matrix says, gray from beyond the edge.

    Args:
        image: int32 [height, width, 3].
        matrix: a, b, c, d, e, f: the pixel in column x, row y comes from column a x + b y + c, row
            d x + e y + f.
    """
    transform = tf.stack([tf.cast(value, tf.float32) for value in [*matrix, 0.0, 0.0]])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.expand_dims(image, 0),
        transforms=tf.expand_dims(transform, 0),
        output_shape=tf.shape(image)[:2],
        interpolation="NEAREST",
        fill_mode="CONSTANT",
        fill_value=float(GRAY),
    )[0]


def cutout(image: tf.Tensor, seed: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Makes a square gray: `size` pixels to each side of a point that may be anywhere in the image.

    Args:
        image: int32 [height, width, 3].
        seed: int64 [2].
        size: int32 scalar; the square has 2 * size pixels a side.
    """
    shape = tf.shape(image)
    center = tf.random.stateless_uniform([2], seed, dtype=tf.float32)
    y, x = tf.unstack(tf.cast(center * tf.cast(shape[:2], tf.float32), tf.int32))
    rows, columns = tf.range(shape[0]), tf.range(shape[1])
    in_rows = (rows >= y - size) & (rows < y + size)
    in_columns = (columns >= x - size) & (columns < x + size)
    inside = (in_rows[:, None] & in_columns)[..., None]
    return tf.where(inside, GRAY, image)
