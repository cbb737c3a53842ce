"""Views against NumPy, PIL and crops of fully resized images."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vit_jax.data import preprocess
from vit_jax.data.protocols import Preprocessing, eval_box, evaluation, fewshot_view
from vit_jax.data.randaugment import randaugment
from vit_jax.errors import UserError

SEED = tf.constant([3, 5], tf.int64)


def noise_image(height, width, channels=3):
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encode(image, file_format, mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    (image.convert(mode) if mode else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(view):
    return np.asarray(view) * 127.5 + 127.5


def bilinear(image, box, size):
    """Samples `box` with half-pixel centers in float64, clamped to the image."""

    def matrix(begin, extent, length):
        centers = np.clip(begin + (np.arange(size) + 0.5) * extent / size - 0.5, 0, length - 1)
        return np.maximum(0, 1 - np.abs(centers[:, None] - np.arange(length)))

    y, x, h, w = (float(edge) for edge in box)
    rows, columns = matrix(y, h, image.shape[0]), matrix(x, w, image.shape[1])
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns)


@pytest.mark.parametrize("shape", [(8, 8), (37, 91), (300, 200), (1, 5)])
@pytest.mark.parametrize("protocol", ["inception", "bit", "pad"])
def test_evaluation_resizes_the_whole_image(shape, protocol):
    image = noise_image(*shape)
    view = preprocess.train_view(encode(image, "PNG"), SEED, image_size=32, protocol=protocol)
    np.testing.assert_allclose(pixels(view), bilinear(image, (0, 0, *shape), 32), atol=0.01)


@pytest.mark.parametrize("shape", [(96, 64), (50, 123)])
def test_pretrain_evaluation_crops_the_center_of_the_resized_image(shape):
    image = noise_image(*shape)
    view = preprocess.train_view(encode(image, "PNG"), SEED, image_size=56, protocol="pretrain")
    scale = 64 / min(shape)  # 56 * 256 / 224
    y, x = [(side - 56 / scale) / 2 for side in shape]
    expected = bilinear(image, (y, x, 56 / scale, 56 / scale), 56)
    np.testing.assert_allclose(pixels(view), expected, atol=0.02)


def test_pretrain_evaluation_equals_resizing_to_256_and_cropping_224():
    image = noise_image(512, 640)
    view = preprocess.train_view(encode(image, "PNG"), SEED, image_size=224, protocol="pretrain")
    resized = tf.image.resize(image, [256, 320])[16:240, 48:272]
    np.testing.assert_allclose(pixels(view), resized, atol=0.1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(256, 512), (375, 300), (64, 40)])
def test_fewshot_resizes_to_256_whatever_the_aspect_and_crops_224(shape, interpolation):
    image = noise_image(*shape)
    for model in (Preprocessing(224, None, interpolation), Preprocessing(224, 0.5, interpolation)):
        view = preprocess.eval_view(encode(image, "PNG"), fewshot_view(model))
        resized = tf.image.resize(image, [256, 256], method=interpolation)
        np.testing.assert_allclose(pixels(view), resized[16:240, 16:240], atol=0.1)


def big_vision(image, resized, size):
    """Its ops resize_small and central_crop, on an image of 8 bits."""
    height, width = image.shape[:2]
    factor = tf.constant(resized, tf.float32) / tf.constant(min(height, width), tf.float32)
    sides = [tf.cast(tf.round(tf.cast(x, tf.float32) * factor), tf.int32) for x in (height, width)]
    whole = tf.image.resize(image, sides, method="area", antialias=False)
    whole = tf.cast(tf.clip_by_value(whole, 0, 255), tf.uint8)
    y, x = (sides[0] - size) // 2, (sides[1] - size) // 2
    return tf.image.crop_to_bounding_box(whole, y, x, size, size).numpy()


@pytest.mark.parametrize("size, resized", [(224, 256), (56, 64), (384, 439)])
@pytest.mark.parametrize("shape", [(375, 500), (501, 334), (256, 256), (33, 90), (700, 3)])
def test_big_vision_evaluation_is_resize_small_and_central_crop(shape, size, resized):
    image = noise_image(*shape)
    view = preprocess.train_view(encode(image, "PNG"), SEED, image_size=size, protocol="big_vision")
    np.testing.assert_allclose(pixels(view), big_vision(image, resized, size), atol=1e-4)


def test_few_shot_images_of_a_big_vision_model_are_bilinear():
    image = noise_image(300, 400)
    model = evaluation("big_vision", 224)
    view = preprocess.eval_view(encode(image, "PNG"), fewshot_view(model))
    resized = tf.image.resize(image, [256, 256])[16:240, 16:240]
    np.testing.assert_allclose(pixels(view), resized, atol=0.1)


@pytest.mark.parametrize("resize, left", [("timm", 2), ("huggingface", 1)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_of_pil_are_resized_and_cropped_by_pil(resize, left, interpolation):
    image = noise_image(80, 84)
    kind = Image.Resampling[interpolation.upper()]
    # The longer side becomes 62 * 84 / 80 = 65.1. Half of the 3 columns too many is rounded to even
    # by torchvision, down by Transformers.
    resized = np.asarray(Image.fromarray(image).resize((65, 62), kind))
    preprocessing = Preprocessing(62, 1.0, interpolation, antialias=True, resize=resize)
    view = preprocess.eval_view(encode(image, "PNG"), preprocessing)
    np.testing.assert_allclose(pixels(view), resized[:, left : left + 62], atol=1e-4)
    squashed = np.asarray(Image.fromarray(image).resize((64, 64), kind))[4:60, 4:60]
    fewshot = fewshot_view(Preprocessing(56, None, interpolation, antialias=True, resize=resize))
    view = preprocess.eval_view(encode(image, "PNG"), fewshot)
    np.testing.assert_allclose(pixels(view), squashed, atol=1e-4)


@pytest.mark.parametrize("protocol", ["inception", "bit", "pretrain", "big_vision", "pad"])
def test_the_dct_of_jpeg_is_the_one_that_is_asked_for(protocol):
    encoded = encode(noise_image(64, 64), "JPEG", quality=80)
    views = {}
    for jpeg_dct, dct_method in (("accurate", "INTEGER_ACCURATE"), ("fast", "")):  # "": its default
        decoded = tf.io.decode_jpeg(encoded, channels=3, dct_method=dct_method)
        png = tf.io.encode_png(decoded)
        for random_crop in (False, True):
            options = {"image_size": 24, "protocol": protocol, "random_crop": random_crop}
            view = preprocess.train_view(encoded, SEED, jpeg_dct=jpeg_dct, **options)
            np.testing.assert_array_equal(view, preprocess.train_view(png, SEED, **options))
            views[jpeg_dct, random_crop] = view
    for random_crop in (False, True):
        accurate, fast = pixels(views["accurate", random_crop]), pixels(views["fast", random_crop])
        assert 0 < np.abs(accurate - fast).max() < 10


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(300, 375), (40, 32)])
def test_antialiased_evaluation_is_the_resize_and_crop_of_pil(shape, interpolation):
    # Smooth, because PIL rounds to whole values between its two passes.
    image = Image.fromarray(noise_image(*shape)).resize((9, 7)).resize(shape[::-1])
    view = preprocess.eval_view(
        encode(np.asarray(image), "PNG"), Preprocessing(56, 56 / 64, interpolation, antialias=True)
    )
    height, width = (64 * side // min(shape) for side in shape)
    resized = np.asarray(image.resize((width, height), Image.Resampling[interpolation.upper()]))
    y, x = (height - 56) // 2, (width - 56) // 2
    np.testing.assert_allclose(pixels(view), resized[y : y + 56, x : x + 56], atol=1.5)


def test_mean_and_std_are_those_of_pixels_from_0_to_1():
    image = noise_image(8, 8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    view = preprocess.eval_view(encode(image, "PNG"), Preprocessing(8, mean=mean, std=std))
    np.testing.assert_allclose(view, (image / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_size": 0}, "image_size 0"),
        ({"center_crop": 1.5}, "center_crop 1.5"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is none of bilinear, bicubic"),
        ({"interpolation": "area"}, "interpolation 'area' does not go with resize 'box'"),
        ({"resize": "big_vision"}, "interpolation 'bilinear' does not go with resize 'big_vision'"),
        ({"resize": "pil"}, "resize 'pil' is none of box, big_vision, timm, huggingface"),
        ({"resize": "timm"}, "resize 'timm' has antialias true only: set it so"),
        ({"squash": "yes"}, "squash 'yes' is none of False, True"),
        ({"jpeg_dct": "best"}, "jpeg_dct 'best' is none of accurate, fast"),
        ({"std": (0.5, 0.0, 0.5)}, "is not positive"),
        ({"mean": (0.5,)}, "is not three numbers"),
    ],
)
def test_a_preprocessing_out_of_range_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**{"image_size": 8, **wrong})


@pytest.mark.parametrize("shape", [(60, 80), (20, 14)])
def test_bit_training_crops_the_resized_image_at_an_integer_offset(shape):
    image = noise_image(*shape)
    resized = tf.image.resize(image, [56, 56]).numpy()
    offsets = set()
    for seed in range(20):
        view = preprocess.train_view(
            encode(image, "PNG"),
            tf.constant([seed, 0], tf.int64),
            image_size=48,
            protocol="bit",
            random_crop=True,
        )
        errors = {
            (y, x): np.abs(resized[y : y + 48, x : x + 48] - pixels(view)).max()
            for y in range(9)
            for x in range(9)
        }
        offset = min(errors, key=errors.get)
        assert errors[offset] < 0.1
        offsets.add(offset)
    assert len(offsets) > 10


def test_pad_training_crops_the_image_padded_by_an_eighth_with_black():
    image = noise_image(16, 16)
    padded = np.pad(image, [(2, 2), (2, 2), (0, 0)])
    offsets = set()
    for seed in range(60):
        view = preprocess.train_view(
            encode(image, "PNG"),
            tf.constant([seed, 3], tf.int64),
            image_size=16,
            protocol="pad",
            random_crop=True,
        )
        (offset,) = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.abs(padded[y : y + 16, x : x + 16] - pixels(view)).max() < 0.01
        ]
        offsets.add(offset)
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(5))


@pytest.mark.parametrize("protocol", ["inception", "pretrain", "big_vision"])
def test_inception_training_is_the_published_crop_then_resize(protocol):
    image = noise_image(120, 90)
    for seed in range(10):
        seeds = tf.constant([seed, 1], tf.int64)
        view = preprocess.train_view(
            encode(image, "PNG"), seeds, image_size=32, protocol=protocol, random_crop=True
        )
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            image.shape,
            tf.zeros([0, 0, 4]),
            tf.random.split(seeds, 2)[0],
            min_object_covered=0,
            aspect_ratio_range=(0.75, 4 / 3),
            area_range=(0.05, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        expected = tf.image.resize(tf.slice(image, begin, size), [32, 32])
        np.testing.assert_allclose(pixels(view), expected, atol=1e-3)


def test_inception_crops_cover_5_to_100_percent_at_3_4_to_4_3():
    boxes = np.array(
        [
            preprocess._inception_window(400, 400, tf.constant([0, seed], tf.int64))
            for seed in range(300)
        ]
    )
    area, aspect = boxes[:, 2] * boxes[:, 3] / 400**2, boxes[:, 3] / boxes[:, 2]
    assert 0.045 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    assert (boxes[:, :2] + boxes[:, 2:] <= 400).all()


@pytest.mark.parametrize("subsampling", [0, 2])  # 4:4:4 and 4:2:0
@pytest.mark.parametrize("protocol", ["inception", "bit", "pretrain", "big_vision"])
def test_jpeg_decoded_in_its_window_equals_full_decode(subsampling, protocol):
    image = noise_image(201, 323)
    jpeg = encode(image, "JPEG", quality=90, subsampling=subsampling)
    png = encode(np.asarray(Image.open(io.BytesIO(jpeg))), "PNG")
    for random_crop in [False, True]:
        for seed in range(8):
            from_jpeg, from_png = (
                preprocess.train_view(
                    data,
                    tf.constant([seed, 2], tf.int64),
                    image_size=64,
                    protocol=protocol,
                    random_crop=random_crop,
                )
                for data in [jpeg, png]
            )
            np.testing.assert_array_equal(from_jpeg, from_png)


def test_flip_mirrors_about_half_of_the_views():
    image = noise_image(16, 16)
    plain = bilinear(image, (0, 0, 16, 16), 16)
    mirrored = 0
    for seed in range(60):
        view = preprocess.train_view(
            encode(image, "PNG"),
            tf.constant([0, seed], tf.int64),
            image_size=16,
            protocol="inception",
            random_flip=True,
        )
        is_mirrored = np.allclose(pixels(view), plain[:, ::-1], atol=0.01)
        assert is_mirrored or np.allclose(pixels(view), plain, atol=0.01)
        mirrored += is_mirrored
    assert 15 < mirrored < 45


def test_values_reach_from_minus_one_to_one():
    image = np.zeros((4, 4, 3), np.uint8)
    image[2:] = 255
    view = preprocess.train_view(encode(image, "PNG"), SEED, image_size=4, protocol="inception")
    assert view.dtype == tf.float32
    assert view.shape == (4, 4, 3)
    np.testing.assert_array_equal(view[0], -1)
    np.testing.assert_array_equal(view[3], 1)


RGB, GRAY = noise_image(20, 24), noise_image(20, 24, 1)


@pytest.mark.parametrize(
    "encoded",
    [
        encode(GRAY, "PNG"),
        encode(GRAY, "JPEG"),
        encode(GRAY, "PNG", "LA"),
        encode(RGB, "PNG", "RGBA"),
        encode(RGB, "PNG", "P"),
        encode(RGB, "BMP"),
        encode(RGB, "BMP", "RGBA"),
        encode(RGB, "BMP", "P"),
        encode(RGB, "BMP", "1"),
        encode(RGB, "WEBP", lossless=True),
        encode(RGB, "GIF"),
        encode(RGB, "JPEG", "CMYK"),
    ],
    ids=[
        "gray png",
        "gray jpeg",
        "la",
        "rgba",
        "palette",
        "bmp",
        "bmp32",
        "bmp palette",
        "bmp 1",
        "webp",
        "gif",
        "cmyk",
    ],
)
def test_every_color_type_becomes_rgb_as_in_pil(encoded):
    view = preprocess.train_view(tf.constant(encoded), SEED, image_size=20, protocol="inception")
    rgb = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    expected = bilinear(rgb, (0, 0, 20, 24), 20)
    np.testing.assert_allclose(pixels(view), expected, atol=1.5)


def test_16_bit_png_keeps_its_high_byte():
    deep = tf.io.encode_png(RGB.astype(np.uint16) * 257)
    view = preprocess.train_view(deep, SEED, image_size=20, protocol="inception")
    np.testing.assert_allclose(pixels(view), bilinear(RGB, (0, 0, 20, 24), 20), atol=0.01)


def test_eval_box_takes_ints_and_tensors():
    assert eval_box(Preprocessing(224), 30, 40) == (0, 0, 30, 40)
    central = Preprocessing(224, 0.875)
    assert eval_box(central, 256, 320) == (16, 48, 224, 224)
    box = eval_box(central, tf.constant(320.0), tf.constant(256.0))
    assert [float(edge) for edge in box] == [48, 16, 224, 224]
    squashed = Preprocessing(224, 0.875, squash=True)
    assert eval_box(squashed, 256, 512) == (16, 32, 224, 448)
    box = eval_box(squashed, tf.constant(512.0), tf.constant(256.0))
    assert [float(edge) for edge in box] == [32, 16, 448, 224]


def test_randaugment_comes_after_crop_and_flip_on_8_bits():
    encoded = encode(noise_image(60, 40), "JPEG")
    options = {"image_size": 32, "protocol": "inception", "random_crop": True, "random_flip": True}
    for position in range(8):
        seed = tf.constant([2, position], tf.int64)
        plain = tf.round((preprocess.train_view(encoded, seed, **options) + 1) * 127.5)
        found = preprocess.train_view(encoded, seed, **options, num_operations=2, magnitude=15)
        assert found.dtype == tf.float32 and found.shape == (32, 32, 3)
        expected = randaugment(plain, tf.random.fold_in(seed, 1), num_operations=2, magnitude=15)
        np.testing.assert_allclose(pixels(found), expected, atol=1e-4)
