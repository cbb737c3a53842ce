"""Views against NumPy, TensorFlow, PIL and crops of fully resized images."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from vit_jax.data import preprocess
from vit_jax.data.protocols import PROTOCOLS, Preprocessing, eval_box, evaluation, fewshot_view
from vit_jax.data.randaugment import randaugment
from vit_jax.errors import UserError
from vit_jax.image_size import sides

from . import tensorflow_views
from .orientations import UPRIGHT


def rng(seed=3):
    return np.random.default_rng(seed)


def noise_image(height, width, channels=3):
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encode(image, file_format, mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    (image.convert(mode) if mode else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(view):
    return view.astype(float) if view.dtype == np.uint8 else view * 127.5 + 127.5


def evaluation_views(encoded, protocol, size):
    """What evaluation and a training that is not random see of an image, and how exactly."""
    yield preprocess.eval_view(encoded, evaluation(protocol, size)), 0
    yield preprocess.train_view(encoded, rng(), image_size=size, protocol=protocol), 0.5


def bilinear(image, box, size):
    """Samples `box` with half-pixel centers in float64, clamped to the image."""

    def matrix(begin, extent, length):
        centers = np.clip(begin + (np.arange(size) + 0.5) * extent / size - 0.5, 0, length - 1)
        return np.maximum(0, 1 - np.abs(centers[:, None] - np.arange(length)))

    y, x, h, w = (float(edge) for edge in box)
    rows, columns = matrix(y, h, image.shape[0]), matrix(x, w, image.shape[1])
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns, optimize=True)


@pytest.mark.parametrize("shape", [(8, 8), (37, 91), (300, 200), (1, 5)])
@pytest.mark.parametrize("protocol", ["inception", "bit", "pad", "bit_hyperrule"])
def test_evaluation_resizes_the_whole_image(shape, protocol):
    image = noise_image(*shape)
    expected = bilinear(image, (0, 0, *shape), 32)
    for view, rounding in evaluation_views(encode(image, "PNG"), protocol, 32):
        np.testing.assert_allclose(pixels(view), expected, atol=0.01 + rounding)


def test_whole_images_are_resized_to_a_height_and_a_width():
    image = noise_image(37, 91)
    expected = tf.image.resize(image, [48, 72]).numpy()
    for protocol in ("inception", "bit", "pad", "bit_hyperrule"):
        for view, rounding in evaluation_views(encode(image, "PNG"), protocol, "48x72"):
            np.testing.assert_allclose(pixels(view), expected, atol=0.01 + rounding)


@pytest.mark.parametrize("shape", [(96, 64), (50, 123)])
def test_pretrain_evaluation_crops_the_center_of_the_resized_image(shape):
    image = noise_image(*shape)
    scale = 64 / min(shape)  # 56 * 256 / 224
    y, x = [(side - 56 / scale) / 2 for side in shape]
    expected = bilinear(image, (y, x, 56 / scale, 56 / scale), 56)
    for view, rounding in evaluation_views(encode(image, "PNG"), "pretrain", 56):
        np.testing.assert_allclose(pixels(view), expected, atol=0.02 + rounding)


def test_pretrain_evaluation_equals_resizing_to_256_and_cropping_224():
    image = noise_image(512, 640)
    resized = tf.image.resize(image, [256, 320])[16:240, 48:272]
    for view, rounding in evaluation_views(encode(image, "PNG"), "pretrain", 224):
        np.testing.assert_allclose(pixels(view), resized, atol=0.1 + rounding)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(256, 512), (375, 300), (64, 40)])
def test_fewshot_resizes_to_256_whatever_the_aspect_and_crops_224(shape, interpolation):
    image = noise_image(*shape)
    for model in (Preprocessing(224, None, interpolation), Preprocessing(224, 0.5, interpolation)):
        view = preprocess.eval_view(encode(image, "PNG"), fewshot_view(model))
        resized = tf.image.resize(image, [256, 256], method=interpolation)
        np.testing.assert_allclose(pixels(view), resized[16:240, 16:240], atol=0.1)


def resize_small(image, resized):
    """big_vision's op, on an image of 8 bits."""
    height, width = image.shape[:2]
    factor = tf.constant(resized, tf.float32) / tf.constant(min(height, width), tf.float32)
    sides = [tf.cast(tf.round(tf.cast(x, tf.float32) * factor), tf.int32) for x in (height, width)]
    whole = tf.image.resize(image, sides, method="area", antialias=False)
    return tf.cast(tf.clip_by_value(whole, 0, 255), tf.uint8).numpy()


def big_vision(image, resized, size):
    """Its ops resize_small and central_crop."""
    whole = resize_small(image, resized)
    y, x = ((side - size) // 2 for side in whole.shape[:2])
    return tf.image.crop_to_bounding_box(whole, y, x, size, size).numpy()


@pytest.mark.parametrize(
    "protocol, size, resized",
    [
        ("big_vision", 224, 256),
        ("big_vision", 56, 64),
        ("big_vision", 384, 439),
        ("transfer", 96, 112),
        ("transfer_inception", 54, 63),
    ],
)
@pytest.mark.parametrize("shape", [(375, 500), (501, 334), (256, 256), (33, 90), (700, 3)])
def test_big_vision_evaluation_is_resize_small_and_central_crop(shape, protocol, size, resized):
    image = noise_image(*shape)
    expected = big_vision(image, resized, size)
    for view, _ in evaluation_views(encode(image, "PNG"), protocol, size):
        np.testing.assert_allclose(pixels(view), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(375, 500), (60, 300), (300, 60)])
def test_what_keeps_its_aspect_covers_a_size_that_is_no_square(shape):
    image = noise_image(*shape)
    scale = max(np.float32(64) / np.float32(shape[0]), np.float32(96) / np.float32(shape[1]))
    resized = [round(float(np.float32(x) * scale)) for x in shape]
    whole = tf.image.resize(image, resized, method="area").numpy().astype(np.uint8)
    y, x = (resized[0] - 56) // 2, (resized[1] - 84) // 2
    for view, _ in evaluation_views(encode(image, "PNG"), "big_vision", "56x84"):
        np.testing.assert_allclose(pixels(view), whole[y : y + 56, x : x + 84], atol=1e-4)


def crops(image, protocol, size, whole, seeds):
    """The corners at which views of training lie in a resized image, and how far they are off."""
    height, width = sides(size)
    for seed in range(seeds):
        view = preprocess.train_view(
            encode(image, "PNG"), rng(seed), image_size=size, protocol=protocol, random_crop=True
        )
        errors = {
            (y, x): np.abs(whole[y : y + height, x : x + width] - pixels(view)).max()
            for y in range(whole.shape[0] - height + 1)
            for x in range(whole.shape[1] - width + 1)
        }
        corner = min(errors, key=errors.get)
        yield corner, errors[corner]


@pytest.mark.parametrize("shape, corners", [((60, 84), (8, 30)), ((9, 7), (24, 8)), ((80, 80), 8)])
def test_transfer_training_crops_what_resize_small_gives(shape, corners):
    image = noise_image(*shape)
    whole = resize_small(image, 56).astype(float)  # 48 * 448 / 384
    found, errors = zip(*crops(image, "transfer", 48, whole, 60), strict=True)
    assert max(errors) == 0
    for axis, last in zip(zip(*found, strict=True), np.broadcast_to(corners, 2), strict=True):
        assert (whole.shape[0] - 48, whole.shape[1] - 48) == tuple(np.broadcast_to(corners, 2))
        # Uniform from the first place to the last: 60 draws leave no third of them out.
        assert min(axis) < last / 3 and max(axis) > last * 2 / 3


def test_transfer_crops_of_a_size_that_is_no_square_are_of_what_covers_it():
    image = noise_image(60, 84)  # As it is: 56 x 84 are 48 x 72 enlarged.
    found, errors = zip(*crops(image, "transfer", "48x72", image.astype(float), 8), strict=True)
    assert max(errors) == 0 and len(set(found)) > 4


def test_transfer_crops_of_the_published_size_are_exact():
    image = noise_image(375, 500)
    whole = resize_small(image, 448)
    view = preprocess.train_view(
        encode(image, "PNG"), rng(), image_size=384, protocol="transfer", random_crop=True
    )
    draws = rng()
    y, x = draws.integers(448 - 384 + 1), draws.integers(whole.shape[1] - 384 + 1)
    np.testing.assert_array_equal(view, whole[y : y + 384, x : x + 384])


@pytest.mark.parametrize("protocol", ["big_vision", "transfer", "bit_hyperrule"])
def test_few_shot_images_of_every_model_are_bilinear(protocol):
    image = noise_image(300, 400)
    model = evaluation(protocol, 224)
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


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_dct_of_jpeg_is_the_one_that_is_asked_for(protocol):
    encoded = encode(noise_image(64, 64), "JPEG", quality=80)
    views = {}
    for jpeg_dct, dct_method in (("accurate", "INTEGER_ACCURATE"), ("fast", "")):  # "": its default
        decoded = tf.io.decode_jpeg(encoded, channels=3, dct_method=dct_method)
        png = tf.io.encode_png(decoded).numpy()
        for random_crop in (False, True):
            options = {"image_size": 24, "protocol": protocol, "random_crop": random_crop}
            view = preprocess.train_view(encoded, rng(), jpeg_dct=jpeg_dct, **options)
            np.testing.assert_array_equal(view, preprocess.train_view(png, rng(), **options))
            views[jpeg_dct, random_crop] = view
        evaluated, expected = (
            preprocess.eval_view(data, evaluation(protocol, 24, jpeg_dct))
            for data in (encoded, png)
        )
        np.testing.assert_array_equal(evaluated, expected)
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
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": "8x8"}, "image_size is '8x8': of a square it is one number, 8"),
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
@pytest.mark.parametrize(
    "protocol, size, resized",
    [("bit", 48, 56), ("bit_hyperrule", 48, 80), ("bit", "30x48", (35, 56))],
)
def test_bit_training_crops_the_resized_image_at_an_integer_offset(shape, protocol, size, resized):
    image = noise_image(*shape)
    whole = tf.image.resize(image, np.broadcast_to(resized, 2)).numpy()
    found, errors = zip(*crops(image, protocol, size, whole, 20), strict=True)
    assert max(errors) < 0.1 + 0.5
    assert len(set(found)) > 10


def test_pad_training_crops_the_image_padded_by_an_eighth_with_black():
    image = noise_image(16, 16)
    padded = np.pad(image, [(2, 2), (2, 2), (0, 0)])
    offsets = set()
    for seed in range(60):
        view = preprocess.train_view(
            encode(image, "PNG"),
            rng(seed),
            image_size=16,
            protocol="pad",
            random_crop=True,
        )
        (offset,) = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if (padded[y : y + 16, x : x + 16] == view).all()
        ]
        offsets.add(offset)
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(5))


@pytest.mark.parametrize("protocol", ["inception", "pretrain", "big_vision", "transfer_inception"])
def test_inception_training_is_the_published_crop_then_resize(protocol):
    image = noise_image(120, 90)
    for seed in range(10):
        options = {"image_size": 32, "protocol": protocol, "random_crop": True}
        view = preprocess.train_view(encode(image, "PNG"), rng(seed), **options)
        y, x, h, w = preprocess.inception_window(120, 90, rng(seed))
        crop = image[y : y + h, x : x + w]
        expected = tf.image.resize(crop, [32, 32])
        np.testing.assert_allclose(preprocess.resize(crop, 32), expected, atol=1e-3)
        np.testing.assert_allclose(pixels(view), expected, atol=1e-3 + 0.5)
    view = preprocess.train_view(encode(image, "PNG"), rng(9), **options | {"image_size": "32x48"})
    np.testing.assert_allclose(pixels(view), tf.image.resize(crop, [32, 48]), atol=1e-3 + 0.5)


@pytest.mark.parametrize("shape", [(375, 500), (90, 400), (500, 60), (9, 7)])
def test_inception_crops_are_distributed_as_those_of_tensorflow(shape):
    begin, size, _ = zip(
        *(
            tf.image.stateless_sample_distorted_bounding_box(
                (*shape, 3),
                tf.zeros([0, 0, 4]),
                (seed, 1),
                min_object_covered=0,
                aspect_ratio_range=(0.75, 4 / 3),
                area_range=(0.05, 1.0),
                use_image_if_no_bounding_boxes=True,
            )
            for seed in range(2000)
        ),
        strict=True,
    )
    expected = np.concatenate([np.array(begin)[:, :2], np.array(size)[:, :2]], 1)
    draws = rng()
    found = np.array([preprocess.inception_window(*shape, draws) for _ in range(4000)])
    for statistic in (
        lambda y, x, h, w: h * w,
        lambda y, x, h, w: w / h,
        lambda y, x, h, w: y / np.maximum(shape[0] - h, 1),
        lambda y, x, h, w: x / np.maximum(shape[1] - w, 1),
        lambda y, x, h, w: (h == shape[0]) + 2 * (w == shape[1]),
    ):
        assert stats.ks_2samp(statistic(*found.T), statistic(*expected.T)).pvalue > 0.002


def test_inception_crops_cover_5_to_100_percent_at_3_4_to_4_3():
    boxes = np.array([preprocess.inception_window(400, 400, rng(seed)) for seed in range(300)])
    area, aspect = boxes[:, 2] * boxes[:, 3] / 400**2, boxes[:, 3] / boxes[:, 2]
    assert 0.045 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    assert (boxes[:, :2] + boxes[:, 2:] <= 400).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 30)])
def test_where_no_inception_crop_fits_the_whole_image_is_taken(shape):
    y, x, h, w = preprocess.inception_window(*shape, rng())
    assert (y, x, h, w) == (0, 0, *shape) or 0.75 <= w / h <= 4 / 3


@pytest.mark.parametrize("subsampling", [0, 2])  # 4:4:4 and 4:2:0
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_jpeg_decoded_in_its_window_equals_full_decode(subsampling, protocol):
    image = noise_image(201, 323)
    jpeg = encode(image, "JPEG", quality=90, subsampling=subsampling)
    png = encode(np.asarray(Image.open(io.BytesIO(jpeg))), "PNG")
    for random_crop in [False, True]:
        for seed in range(8):
            from_jpeg, from_png = (
                preprocess.train_view(
                    data,
                    rng(seed),
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
            rng(seed),
            image_size=16,
            protocol="inception",
            random_flip=True,
        )
        is_mirrored = np.allclose(pixels(view), plain[:, ::-1], atol=0.51)
        assert is_mirrored or np.allclose(pixels(view), plain, atol=0.51)
        mirrored += is_mirrored
    assert 15 < mirrored < 45


def test_values_reach_from_0_to_255_and_from_minus_one_to_one():
    image = np.zeros((4, 4, 3), np.uint8)
    image[2:] = 255
    evaluated, trained = (
        view for view, _ in evaluation_views(encode(image, "PNG"), "inception", 4)
    )
    for view, kind, least, most in ((evaluated, np.float32, -1, 1), (trained, np.uint8, 0, 255)):
        assert view.dtype == kind
        assert view.shape == (4, 4, 3)
        np.testing.assert_array_equal(view[0], least)
        np.testing.assert_array_equal(view[3], most)


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
    rgb = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    expected = bilinear(rgb, (0, 0, 20, 24), 20)
    for view, _ in evaluation_views(encoded, "inception", 20):
        np.testing.assert_allclose(pixels(view), expected, atol=1.5)


def test_16_bit_png_keeps_its_high_byte():
    deep = tf.io.encode_png(RGB.astype(np.uint16) * 257).numpy()
    for view, rounding in evaluation_views(deep, "inception", 20):
        expected = bilinear(RGB, (0, 0, 20, 24), 20)
        np.testing.assert_allclose(pixels(view), expected, atol=0.01 + rounding)


def test_the_box_of_evaluation_in_source_pixels():
    assert eval_box(Preprocessing(224), 30, 40) == (0, 0, 30, 40)
    central = Preprocessing(224, 0.875)
    assert eval_box(central, 256, 320) == (16, 48, 224, 224)
    assert eval_box(central, 320, 256) == (48, 16, 224, 224)
    squashed = Preprocessing(224, 0.875, squash=True)
    assert eval_box(squashed, 256, 512) == (16, 32, 224, 448)
    assert eval_box(squashed, 512, 256) == (32, 16, 448, 224)
    wide = Preprocessing("64x96", 0.875)
    assert eval_box(wide, 100, 120) == (15, 7.5, 70, 105)
    assert eval_box(wide, 80, 240) == (5, 67.5, 70, 105)


def test_a_border_is_cut_off_before_anything_else():
    image = noise_image(40, 52)
    for preprocessing in (evaluation("pretrain", 16), evaluation("big_vision", 16)):
        view = preprocess.eval_view(encode(image, "PNG"), preprocessing, border=3)
        inner = preprocess.eval_view(encode(image[3:-3, 3:-3], "PNG"), preprocessing)
        np.testing.assert_array_equal(view, inner)


def with_segment(jpeg, marker, content):
    """A JPEG with one more segment, before all others."""
    return (
        jpeg[:2] + b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2) + content + jpeg[2:]
    )


def turned_jpegs(image):
    """JPEGs that tell in all places in how they are to be turned, and what undoes it."""
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        by_exif = encode(image, "JPEG", exif=exif)
        yield by_exif, upright
        yield with_segment(by_exif, 0xE2, bytes(60_000)), upright
        xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % orientation
        yield with_segment(encode(image, "JPEG"), 0xE1, xmp), upright


@pytest.mark.parametrize("jpeg_dct, dct_method", [("accurate", "INTEGER_ACCURATE"), ("fast", "")])
def test_a_photograph_is_turned_whatever_its_transform(jpeg_dct, dct_method):
    preprocessing = evaluation("bit", 16, jpeg_dct)
    for turned, upright in turned_jpegs(noise_image(24, 40)):
        meant = np.ascontiguousarray(upright(tensorflow_views.decode(turned, dct_method)))
        view = preprocess.eval_view(turned, preprocessing)
        expected = preprocess.eval_view(encode(meant, "PNG"), preprocessing)
        np.testing.assert_array_equal(view, expected)


def test_what_is_not_to_be_turned_is_as_tensorflow_decodes_it():
    preprocessing = evaluation("bit", 16)
    for turned, _ in turned_jpegs(noise_image(24, 40)):
        stored = encode(tensorflow_views.decode(turned, "INTEGER_ACCURATE"), "PNG")
        view = preprocess.eval_view(turned, preprocessing, turn=False)
        np.testing.assert_array_equal(view, preprocess.eval_view(stored, preprocessing))


@pytest.mark.parametrize(
    "encoded, message",
    [
        (b"no image", "the image is not an image: give one of JPEG"),
        (b"", "the image is an empty file"),
        (encode(noise_image(60, 60), "JPEG")[:-300], "the image is damaged"),
        (encode(noise_image(60, 60), "PNG")[:-300], "the image is damaged"),
    ],
    ids=["text", "empty", "jpeg", "png"],
)
def test_what_cannot_be_decoded_is_one_line(encoded, message):
    for see in (
        lambda: preprocess.eval_view(encoded, Preprocessing(8)),
        lambda: preprocess.train_view(encoded, rng(), image_size=8, protocol="bit"),
    ):
        with pytest.raises(UserError, match=message) as error:
            see()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", ["inception", "bit", "pad"])
def test_views_of_large_images_are_those_of_small_ones(protocol):
    # Larger ones than OpenCV is given.
    small = noise_image(4, 5)
    large = np.repeat(np.repeat(small, 280, 0), 280, 1)
    whole = bilinear(large, (0, 0, *large.shape[:2]), 8)
    for view, rounding in evaluation_views(encode(large, "PNG"), protocol, 8):
        np.testing.assert_allclose(pixels(view), whole, atol=0.01 + rounding)
    options = {"image_size": 8, "protocol": protocol, "random_crop": True}
    view = preprocess.train_view(encode(large, "PNG", compress_level=1), rng(), **options)
    assert view.dtype == np.uint8 and view.std() > 10


def test_threads_see_what_one_sees():
    encoded = [encode(noise_image(90 + i, 120), "JPEG") for i in range(8)]

    def see(index):
        return preprocess.train_view(
            encoded[index % 8],
            rng(index),
            image_size=32,
            protocol="inception",
            random_crop=True,
            random_flip=True,
            num_operations=2,
            magnitude=15,
        )

    expected = [see(index) for index in range(64)]
    with ThreadPoolExecutor(4) as pool:
        np.testing.assert_array_equal(list(pool.map(see, range(64))), expected)


def test_randaugment_comes_after_crop_and_flip():
    encoded = encode(noise_image(60, 40), "JPEG")
    options = {"image_size": 32, "protocol": "inception", "random_crop": True, "random_flip": True}
    for seed in range(8):
        draws = rng(seed)
        plain = preprocess.train_view(encoded, draws, **options)
        expected = randaugment(plain, draws, num_operations=2, magnitude=15)
        found = preprocess.train_view(encoded, rng(seed), **options, num_operations=2, magnitude=15)
        assert found.dtype == np.uint8 and found.shape == (32, 32, 3)
        np.testing.assert_array_equal(found, expected)
