"""Decoding and resizing, each once, of an encoded image to the pixels that a model sees.

The protocol chooses a box (see `protocols`); only the window of the image that covers the box is
decoded, and one resampling takes exactly that box to the output. Augmentation is drawn with
stateless operations, so a view is a pure function of the image and its seed. Evaluation may follow
another rule of resizing, with PIL's images by PIL itself.
"""

import functools

import tensorflow as tf

from vit_jax.data import images
from vit_jax.data.protocols import BIT_RESIZE, Preprocessing, eval_box, evaluation, resized_side
from vit_jax.data.randaugment import randaugment

# The kernels of ScaleAndTranslate, and how far they reach in pixels of the coarser grid.
_KERNELS = {"bilinear": ("triangle", 1), "bicubic": ("keyscubic", 2)}

_DCT = {"accurate": "INTEGER_ACCURATE", "fast": "INTEGER_FAST"}

# Of an image that is longer than this many times its width, all of it at the size that it is to be
# resized to would be huge.
_LONG = 16


def train_view(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    *,
    image_size: int,
    protocol: str,
    jpeg_dct: str = "accurate",
    random_crop: bool = False,
    random_flip: bool = False,
    num_operations: int = 0,
    magnitude: float = 0,
    contrast: str = "augreg",
    decode_with_pil: tf.Tensor | bool = False,
) -> tf.Tensor:
    """Returns one view of an image, float32 [image_size, image_size, 3] in [-1, 1].

    Args:
        encoded: scalar string; a JPEG, PNG, BMP, GIF or WebP (of animations the first frame) of
            any color type. Gray becomes RGB, transparency is dropped.
        seed: int64 [2], the source of all randomness; not read where nothing is random.
        image_size: of the view, in pixels.
        protocol: one of `protocols.PROTOCOLS`.
        jpeg_dct: one of `protocols.JPEG_DCTS`.
        random_crop: take a random box, as the protocol does in training.
        random_flip: mirror every other view.
        num_operations: of RandAugment. It comes last, after crop and flip (as in AugReg's code), on
            the view in 8 bits, whatever the size of the source image.
        magnitude: of RandAugment.
        contrast: of RandAugment, one of `augmentation.CONTRASTS`.
        decode_with_pil: scalar bool; decode with PIL what TensorFlow could decode, too: PIL alone
            turns an image as its EXIF orientation says.

    Raises:
        tf.errors.InvalidArgumentError: when run on bytes that cannot be decoded.
    """
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    if not random_crop:
        preprocessing = evaluation(protocol, image_size, jpeg_dct)
        image = eval_view(encoded, preprocessing, decode_with_pil=decode_with_pil)
    else:
        preprocessing = Preprocessing(image_size, jpeg_dct=jpeg_dct)
        choose = functools.partial(
            _random_box, seed=crop_seed, protocol=protocol, preprocessing=preprocessing
        )
        image = _preprocess(encoded, choose, preprocessing, decode_with_pil)
    if random_flip:
        mirrored = tf.random.stateless_uniform([], flip_seed) < 0.5
        image = tf.cond(mirrored, lambda: tf.reverse(image, [1]), lambda: image)
    if num_operations:
        levels = tf.round(tf.multiply(tf.add(image, 1), 127.5))
        # A seed that is none of the two above, so that without RandAugment these stay the same.
        levels = randaugment(
            levels,
            tf.random.fold_in(seed, 1),
            num_operations=num_operations,
            magnitude=magnitude,
            contrast=contrast,
        )
        image = tf.cast(levels, tf.float32) / 127.5 - 1
    return image


def eval_view(
    encoded: tf.Tensor,
    preprocessing: Preprocessing,
    *,
    border: int = 0,
    decode_with_pil: tf.Tensor | bool = False,
) -> tf.Tensor:
    """Returns what evaluation sees of an image, float32 [image_size, image_size, 3].

    Args:
        encoded: as in `train_view`.
        preprocessing: of the model.
        border: pixels to be cut off every side first.
        decode_with_pil: as in `train_view`.

    Raises:
        tf.errors.InvalidArgumentError: when run on bytes that cannot be decoded.
    """

    def choose(height, width):
        height, width = height - 2 * border, width - 2 * border
        if preprocessing.resize == "box":
            sides = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
            box, window = _with_window(
                eval_box(preprocessing, *sides), height, width, preprocessing
            )
        else:  # To whole pixels goes the whole image.
            window = tf.stack([0, 0, height, width])
            box = tf.cast(window, tf.float32)
        return box + [border, border, 0, 0], window + [border, border, 0, 0]

    return _preprocess(encoded, choose, preprocessing, decode_with_pil)


def _preprocess(encoded, choose, preprocessing, decode_with_pil):
    """Decodes the window of the box that `choose` returns, resamples and normalizes it."""
    pixels, box, window = tf.cond(
        tf.io.is_jpeg(encoded) & ~tf.convert_to_tensor(decode_with_pil),
        lambda: _decode_jpeg(encoded, choose, preprocessing.jpeg_dct),
        lambda: _decode_other(encoded, choose, decode_with_pil),
    )
    if preprocessing.resize == "box":
        image = _resample(pixels, box, window, preprocessing)
    else:
        image = tf.cast(_resize_and_crop(pixels, preprocessing), tf.float32)
    mean, std = (
        tf.constant([255 * x for x in values], tf.float32)
        for values in (preprocessing.mean, preprocessing.std)
    )
    size = preprocessing.image_size
    return tf.ensure_shape((image - mean) / std, [size, size, 3])


def _random_box(height, width, seed, protocol, preprocessing):
    """A box that training crops under a protocol, and the window to decode for it."""
    if protocol == "bit":
        box = _bit_box(height, width, preprocessing.image_size, seed)
    elif protocol == "pad":
        box = _shifted_box(height, width, seed)
    else:
        window = _inception_window(height, width, seed)
        # The published code crops before it resizes: nothing outside the crop is seen.
        return tf.cast(window, tf.float32), window
    return _with_window(box, height, width, preprocessing)


def _inception_window(height, width, seed):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.stack([height, width, 3]),
        tf.zeros([0, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.05, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], 0)


def _bit_box(height, width, image_size, seed):
    # What is left of the resized image by a crop at an integer offset, in source pixels.
    resized = round(image_size * BIT_RESIZE)
    offset = tf.random.stateless_uniform([2], seed, maxval=resized - image_size + 1, dtype=tf.int32)
    size = tf.cast(tf.stack([height, width]), tf.float32)
    y, x = tf.unstack(size * tf.cast(offset, tf.float32) / resized)
    h, w = tf.unstack(size * image_size / resized)
    return y, x, h, w


def _shifted_box(height, width, seed):
    # Resampling gives 0 outside of the image, which is black.
    limit = tf.cast(tf.stack([height, width]) // 8, tf.float32)
    shift = tf.floor(tf.random.stateless_uniform([2], seed) * (2 * limit + 1)) - limit
    return shift[0], shift[1], height, width


def _with_window(box, height, width, preprocessing):
    """The box, and the window of whole pixels that resampling it reads."""
    box = tf.stack([tf.cast(edge, tf.float32) for edge in box])
    _, radius = _KERNELS[preprocessing.interpolation]
    margin = tf.constant([radius, radius])
    if preprocessing.antialias:
        shrinkage = tf.maximum(box[2:] / preprocessing.image_size, 1.0)
        margin = tf.cast(tf.math.ceil(radius * shrinkage), tf.int32)
    limit = tf.stack([height, width])
    begin = tf.maximum(tf.cast(tf.floor(box[:2]), tf.int32) - margin, 0)
    end = tf.minimum(tf.cast(tf.math.ceil(box[:2] + box[2:]), tf.int32) + margin, limit)
    return box, tf.concat([begin, end - begin], 0)


def _resample(pixels, box, window, preprocessing):
    size = [preprocessing.image_size] * 2
    window = tf.cast(window, tf.float32)
    scale = preprocessing.image_size / box[2:]
    kernel, _ = _KERNELS[preprocessing.interpolation]

    def sample_box():
        return tf.raw_ops.ScaleAndTranslate(
            images=tf.cast(pixels, tf.float32)[None],
            size=size,
            scale=scale,
            translation=(window[:2] - box[:2]) * scale,
            kernel_type=kernel,
            antialias=preprocessing.antialias,
        )[0]

    if kernel != "triangle" or preprocessing.antialias:
        return sample_box()
    # Both sample alike; resize is faster, but knows no box.
    is_whole = tf.reduce_all(box == window)
    return tf.cond(is_whole, lambda: tf.image.resize(pixels, size), sample_box)


def _resize_and_crop(pixels, preprocessing):
    """Evaluation by a rule of whole pixels, uint8 [image_size, image_size, 3]."""

    def in_numpy():
        function = functools.partial(images.resize_and_crop, preprocessing=preprocessing)
        return tf.numpy_function(function, [pixels], tf.uint8)

    def in_tensorflow():  # Where Python's lock does not slow down many at a time.
        size, side = preprocessing.image_size, resized_side(preprocessing)
        resized = tf.constant([side, side])
        if not (preprocessing.squash or preprocessing.center_crop is None):
            resized = tf.cast(tf.round(sides * (side / shorter)), tf.int32)
        y, x = tf.unstack((resized - size) // 2)
        levels = tf.image.resize(pixels, resized, method="area")[y : y + size, x : x + size]
        return tf.cast(levels, tf.uint8)  # which cuts off, as there

    if preprocessing.resize != "big_vision":
        return in_numpy()
    sides = tf.cast(tf.shape(pixels)[:2], tf.float32)
    shorter = tf.reduce_min(sides)
    return tf.cond(tf.reduce_max(sides) > _LONG * shorter, in_numpy, in_tensorflow)


def _decode_jpeg(encoded, choose, jpeg_dct):
    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
    box, window = choose(height, width)
    # The decoder interpolates chroma from both sides, but not beyond what it is asked for: a
    # column more on either side, to be dropped.
    y, x, h, w = tf.unstack(window)
    left = tf.maximum(x - 1, 0)
    right = tf.minimum(x + w + 1, width)
    pixels = tf.io.decode_and_crop_jpeg(
        encoded, tf.stack([y, left, h, right - left]), channels=3, dct_method=_DCT[jpeg_dct]
    )
    return pixels[:, x - left : x - left + w], box, window


def _read_image(encoded):
    return images.read_image("the image", encoded.numpy())


def _decode_other(encoded, choose, decode_with_pil):
    # TensorFlow 2.21 takes the indices of a BMP's palette for gray, writes all frames of an
    # animated WebP where there is room for one, beyond its memory, and knows no other formats.
    is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
    is_gif = tf.strings.substr(encoded, 0, 4) == b"GIF8"
    image = tf.cond(
        (is_png | is_gif) & ~tf.convert_to_tensor(decode_with_pil),
        lambda: tf.io.decode_image(encoded, expand_animations=False),
        lambda: tf.ensure_shape(tf.py_function(_read_image, [encoded], tf.uint8), [None] * 3),
    )
    height, width, channels = tf.unstack(tf.shape(image))
    image = tf.cond(channels < 3, lambda: tf.repeat(image[..., :1], 3, -1), lambda: image)
    box, window = choose(height, width)
    y, x, h, w = tf.unstack(window)
    return image[y : y + h, x : x + w, :3], box, window
