"""Evaluation's view by TensorFlow's own ops, and PIL's, to compare with."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image

from vit_jax.data.protocols import eval_box, resized_sides

_KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic"}
_REACH = {"bilinear": 1, "bicubic": 2}


def decode(encoded, dct_method="INTEGER_ACCURATE"):
    """The pixels of an image, uint8 [height, width, 3]: a JPEG, PNG or GIF; PIL's of others."""
    if tf.io.is_jpeg(encoded):
        return tf.io.decode_jpeg(encoded, channels=3, dct_method=dct_method).numpy()
    if encoded[:4] not in (b"\x89PNG", b"GIF8"):
        # Of a BMP TensorFlow 2.21 takes a palette's indices for gray, of an animated WebP it writes
        # all frames where there is room for one, beyond its memory.
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    image = tf.io.decode_image(encoded, expand_animations=False).numpy()
    return (image if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, -1))[..., :3]


def eval_view(image, preprocessing):
    """What evaluation sees of uint8 [height, width, 3]."""
    rules = {"box": sample_box, "big_vision": resize_small_and_central_crop}
    rule = rules.get(preprocessing.resize, resize_and_crop_of_pil)
    mean, std = (255 * np.float32(values) for values in (preprocessing.mean, preprocessing.std))
    return (tf.cast(rule(image, preprocessing), tf.float32) - mean) / std


def sample_box(image, preprocessing):
    """ScaleAndTranslate of the box; what it cannot reach is cut off first, for speed."""
    size, sides = preprocessing.image_size, np.array(image.shape[:2])
    box = np.array(eval_box(preprocessing, *image.shape[:2]), np.float32)
    shrinkage = np.maximum(box[2:] / size, 1) if preprocessing.antialias else 1
    margin = np.ceil(_REACH[preprocessing.interpolation] * shrinkage).astype(int)
    begin = np.maximum(np.floor(box[:2]).astype(int) - margin, 0)
    end = np.minimum(np.ceil(box[:2] + box[2:]).astype(int) + margin, sides)
    window = image[begin[0] : end[0], begin[1] : end[1]].astype(np.float32)
    scale = np.float32(size) / box[2:]
    return tf.raw_ops.ScaleAndTranslate(
        images=window[None],
        size=[size, size],
        scale=scale,
        translation=(begin.astype(np.float32) - box[:2]) * scale,
        kernel_type=_KERNELS[preprocessing.interpolation],
        antialias=preprocessing.antialias,
    )[0]


def resize_small_and_central_crop(image, preprocessing):
    """Those ops of big_vision, on an image of 8 bits; without a crop, its `resize`."""
    size, (side, _) = preprocessing.image_size, resized_sides(preprocessing)
    sides = [side, side]
    if not (preprocessing.squash or preprocessing.center_crop is None):
        factor = tf.constant(side, tf.float32) / tf.constant(min(image.shape[:2]), tf.float32)
        sides = [tf.cast(tf.round(x * factor), tf.int32) for x in image.shape[:2]]
    whole = tf.image.resize(image, sides, method="area", antialias=False)
    whole = tf.cast(tf.clip_by_value(whole, 0, 255), tf.uint8)
    y, x = ((side - size) // 2 for side in sides)
    return tf.image.crop_to_bounding_box(whole, y, x, size, size)


def resize_and_crop_of_pil(image, preprocessing):
    """The Resize and CenterCrop of torchvision, or of Transformers."""
    size, (side, _) = preprocessing.image_size, resized_sides(preprocessing)
    sides = [side, side]
    if not (preprocessing.squash or preprocessing.center_crop is None):
        sides = [int(side * x / min(image.shape[:2])) for x in image.shape[:2]]
    kind = Image.Resampling[preprocessing.interpolation.upper()]
    resized = np.asarray(Image.fromarray(image).resize(sides[::-1], kind))
    half = round if preprocessing.resize == "timm" else int
    y, x = (half((x - size) / 2) for x in sides)
    return resized[y : y + size, x : x + size]
