"""Decoding and evaluation's view against TensorFlow and PIL, and files that are no images."""

import contextlib
import io
import itertools
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vit_jax.data import images, resampling
from vit_jax.data.image_files import read_batches
from vit_jax.data.images import MAX_PIXELS, preprocess, read_image
from vit_jax.data.preprocess import eval_view, train_view
from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.data.resampling import resize_and_crop
from vit_jax.errors import UserError

from ..sources import packed_png
from . import tensorflow_views
from .orientations import UPRIGHT


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


RGB, ALPHA = noise(20, 24, 3), noise(20, 24)
COLOR, GRAY = Image.fromarray(RGB), Image.fromarray(noise(20, 24))
RGBA = Image.fromarray(np.dstack([RGB, ALPHA]))
PALETTE = COLOR.quantize(16)
DEEP = noise(20, 24, 4, 2).view(np.uint16)[..., 0]


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    def write_file(data, name="image.png"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write_file


# What TensorFlow decodes to the same pixels.
LOSSLESS = {
    "rgb png": encode(COLOR, "PNG"),
    "gray png": encode(GRAY, "PNG"),
    "bilevel png": encode(GRAY.convert("1"), "PNG"),
    "palette png": encode(PALETTE, "PNG"),
    "rgba png": encode(RGBA, "PNG"),
    "gray and alpha png": encode(RGBA.convert("LA"), "PNG"),
    "palette png, one transparent": encode(PALETTE, "PNG", transparency=3),
    "palette png, all half transparent": encode(PALETTE, "PNG", transparency=bytes(range(16))),
    "gray png, one transparent": encode(GRAY, "PNG", transparency=int(np.asarray(GRAY)[0, 0])),
    "16-bit gray png": tf.io.encode_png(DEEP[..., :1]).numpy(),
    "16-bit gray and alpha png": tf.io.encode_png(DEEP[..., :2]).numpy(),
    "16-bit rgb png": tf.io.encode_png(DEEP[..., :3]).numpy(),
    "16-bit rgba png": tf.io.encode_png(DEEP).numpy(),
    "gif": encode(PALETTE, "GIF"),
    "gif, one transparent": encode(PALETTE, "GIF", transparency=3),
    "gif of two frames": encode(PALETTE, "GIF", save_all=True, append_images=[GRAY]),
    "bmp": encode(COLOR, "BMP"),
    "bmp with alpha": encode(RGBA, "BMP"),
    "bmp with a palette": encode(PALETTE, "BMP"),
    "bilevel bmp": encode(GRAY.convert("1"), "BMP"),
    "webp": encode(COLOR, "WEBP", lossless=True),
    "webp of two frames": encode(
        COLOR, "WEBP", lossless=True, save_all=True, append_images=[COLOR.rotate(180)]
    ),
}
JPEG = {
    "rgb jpeg": encode(COLOR, "JPEG", quality=95),
    "rgb jpeg 4:4:4": encode(COLOR, "JPEG", subsampling=0),
    "progressive jpeg": encode(COLOR, "JPEG", progressive=True),
    "gray jpeg": encode(GRAY, "JPEG"),
    "cmyk jpeg": encode(COLOR.convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("encoded", LOSSLESS.values(), ids=LOSSLESS)
def test_every_color_type_gives_the_view_of_tensorflow(encoded, write):
    preprocessing = Preprocessing(16, 0.9)
    view = preprocess(read_image(write(encoded)), preprocessing)
    expected = tensorflow_views.eval_view(tensorflow_views.decode(encoded), preprocessing)
    np.testing.assert_allclose(view, expected, atol=1e-4)


@pytest.mark.parametrize("encoded", JPEG.values(), ids=JPEG)
def test_jpeg_pixels_are_those_of_tensorflow_within_a_gray_level(encoded, write):
    pixels = read_image(write(encoded, "image.jpg")).astype(int)
    expected = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
    assert np.abs(pixels - expected.numpy()).max() <= 1


@pytest.mark.parametrize("kind", [0, 3], ids=["gray", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_png_of_few_bits_has_the_levels_of_eight(bits, kind, write):
    values = np.arange(16).reshape(2, 8) % 2**bits
    encoded = packed_png(values, bits, kind)
    path = write(encoded)
    np.testing.assert_array_equal(read_image(path), tf.io.decode_png(encoded, channels=3))
    if kind == 0:  # PNG specification, Section 13.12.
        levels = 255 * values // (2**bits - 1)
        np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], levels)


BEYOND = {
    "webp": encode(RGBA, "WEBP", lossless=True, exact=True),
    "tiff": encode(COLOR, "TIFF"),
    "tiff with alpha": encode(RGBA, "TIFF", compression="tiff_lzw"),
    "ppm": encode(COLOR, "PPM"),
    "gif": encode(PALETTE.convert("RGB"), "GIF"),
    "jpeg 2000": encode(COLOR, "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("encoded", BEYOND.values(), ids=BEYOND)
def test_formats_beyond_tensorflow_keep_their_pixels(encoded, write):
    expected = np.asarray(PALETTE.convert("RGB")) if encoded.startswith(b"GIF") else RGB
    np.testing.assert_array_equal(read_image(write(encoded, "no_suffix")), expected)


def test_avif_is_read_about_as_it_was(write):
    smooth = COLOR.resize((5, 4)).resize((64, 48))
    if not Image.registered_extensions().get(".avif"):
        pytest.skip("this Pillow has no AVIF")
    pixels = read_image(write(encode(smooth, "AVIF", quality=95), "image.avif"))
    np.testing.assert_allclose(pixels, np.asarray(smooth), atol=12)


def test_16_bit_tiff_keeps_its_high_byte(write):
    deep = Image.fromarray(DEEP[..., 0])
    pixels = read_image(write(encode(deep, "TIFF"), "image.tif"))
    np.testing.assert_array_equal(pixels, np.repeat(DEEP[..., :1] >> 8, 3, -1))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("tile", [2**22, 50])
def test_exif_orientation_is_respected(orientation, file_format, tile, write, monkeypatch):
    monkeypatch.setattr(images, "_TILE", tile)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    pixels = read_image(write(encode(COLOR, file_format, exif=exif, **options)))
    np.testing.assert_array_equal(pixels, UPRIGHT[orientation](RGB))


def test_damaged_exif_does_not_cost_the_image(write):
    broken = encode(COLOR, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01\x02")
    np.testing.assert_array_equal(read_image(write(broken)), RGB)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("center_crop", [None, 0.875, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(8, 8), (37, 91), (300, 200), (600, 800), (1, 5), (5, 1)])
def test_preprocess_is_the_evaluation_view_of_tensorflow(
    shape, center_crop, antialias, interpolation
):
    image = noise(*shape, 3)
    preprocessing = Preprocessing(
        56, center_crop, interpolation, antialias, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    view = preprocess(image, preprocessing)
    assert (view.dtype, view.shape) == (np.float32, (56, 56, 3))
    expected = tensorflow_views.eval_view(image, preprocessing)
    np.testing.assert_allclose(view, expected, atol=1e-4)


RULES = {
    "squashed box": {"squash": True},
    "big_vision": {"resize": "big_vision", "interpolation": "area"},
    "timm": {"resize": "timm", "interpolation": "bicubic", "antialias": True},
    "huggingface": {"resize": "huggingface", "antialias": True},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("center_crop", [None, 0.875, 0.9])
@pytest.mark.parametrize("shape", [(8, 8), (37, 91), (300, 200), (1500, 2000), (1, 5), (700, 7)])
def test_every_rule_of_resizing_gives_the_view_of_tensorflow(shape, center_crop, squash, rule):
    image = noise(*shape, 3)
    preprocessing = Preprocessing(56, center_crop, **{"squash": squash, **RULES[rule]})
    view = preprocess(image, preprocessing)
    assert (view.dtype, view.shape) == (np.float32, (56, 56, 3))
    expected = tensorflow_views.eval_view(image, preprocessing)
    np.testing.assert_allclose(view, expected, atol=5e-4)


@pytest.mark.parametrize("rule", ["timm", "huggingface"])
@pytest.mark.parametrize("shape", [(300, 200), (37, 91)])
def test_a_channel_at_a_time_is_resized_as_all_are(shape, rule, monkeypatch):
    image, preprocessing = noise(*shape, 3), Preprocessing(56, 0.9, **RULES[rule])
    together = resize_and_crop(image, preprocessing)
    monkeypatch.setattr(resampling, "_MAX_COPY", 0)
    np.testing.assert_array_equal(resize_and_crop(image, preprocessing), together)


@pytest.mark.parametrize("level", [1, 77, 200, 255])
@pytest.mark.parametrize("shape", [(375, 500), (1001, 667), (300, 4000)])
def test_means_over_areas_round_as_those_of_tensorflow(shape, level):
    # A mean of equal values that a float rounds down is cut down to one level less.
    image = np.full((*shape, 3), level, np.uint8)
    sides = [round(256 * side / min(shape)) for side in shape]
    whole = tf.cast(tf.image.resize(image, sides, method="area"), tf.uint8).numpy()
    y, x = ((side - 224) // 2 for side in sides)
    view = resize_and_crop(image, evaluation("big_vision", 224))
    np.testing.assert_array_equal(view, whole[y : y + 224, x : x + 224])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(300, 375), (375, 300), (40, 32), (3, 400), (400, 3)])
def test_antialias_is_the_resize_of_pil(shape, interpolation):
    channel = noise(*shape).astype(np.float32)  # which PIL does not round between its passes
    kind = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(channel).resize((48, 48), kind))
    image = np.repeat(channel.astype(np.uint8)[..., None], 3, -1)
    view = preprocess(image, Preprocessing(48, None, interpolation, antialias=True))
    np.testing.assert_allclose(view[..., 1] * 127.5 + 127.5, expected, atol=0.01)


def test_a_strip_is_preprocessed_in_bounded_memory():
    # Rows first would need 20 GB.
    strip = np.broadcast_to(np.uint8([10, 20, 30]), (2, 8_000_000, 3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for image, rule, crop in itertools.product(
        (strip, strip.swapaxes(0, 1)), RULES.values(), (None, 0.875)
    ):
        view = preprocess(image, Preprocessing(224, crop, **rule))
        level = 1 if rule.get("resize") == "big_vision" else 0.01
        np.testing.assert_allclose(view[100, 100] * 127.5 + 127.5, [10, 20, 30], atol=level)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def bomb(width, height, channels=1):
    """A sound PNG of one level, gray or RGB, a few MB for any size."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    deflate = zlib.compressobj(1)
    row, count = bytes(channels * width + 1), max(1, 2**20 // width)
    parts = [row * min(count, height - top) for top in range(0, height, count)]
    rows = b"".join(map(deflate.compress, parts)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    magic = b"\x89PNG\r\n\x1a\n"
    return magic + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(write):
    path = write(bomb(30_000, 30_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="has more than 178,956,970 pixels"):
        read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert MAX_PIXELS < 30_000**2


@pytest.mark.parametrize("shape", [(178_000_000, 1), (2**20 + 1, 1), (1, 2**20 + 1)])
def test_a_side_that_is_too_long_is_called_that(write, shape):
    width, height = shape
    with pytest.raises(UserError) as error:
        read_image(write(bomb(width, height)))
    rule = f"has {width:,} x {height:,} pixels, and a side may have 1,048,576: cut it into parts"
    assert rule in str(error.value)


@pytest.mark.parametrize("shape", [(2**20, 2), (2, 2**20)])
def test_the_longest_side_is_read(write, shape):
    assert read_image(write(bomb(*shape))).shape == (*shape[::-1], 3)


# Reads images by four threads as `predict` does, of which there is room for the pixels of one, and
# prints by how many KiB that raised the peak.
READ = """
import resource, sys, warnings
from vit_jax.data import image_files, images
from vit_jax.data.protocols import Preprocessing
warnings.simplefilter("ignore")
image_files.os.cpu_count = lambda: 4
pixels, rule, *files = sys.argv[1:]
images._room = images._Room(int(pixels))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kind = {"resize": rule, "antialias": True, "interpolation": "bicubic"} if rule == "timm" else {}
before = peak()
for found, batch in image_files.read_batches(files, Preprocessing(224, 0.875, **kind), 8, print):
    print(len(found), batch[0, 0, 0, 0], peak() - before)
"""


@pytest.mark.parametrize(
    ("side", "channels", "rule", "count"),
    [(13_377, 1, "box", 2), (4000, 3, "box", 3), (4000, 3, "timm", 3)],
    ids=["the largest there are", "rgb", "resized by PIL"],
)
def test_a_folder_of_images_is_read_in_the_memory_of_one(write, side, channels, rule, count):
    path = write(bomb(side, side, channels))
    command = [sys.executable, "-c", READ, str(side**2), rule, *[str(path)] * count]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, pixel, peak = done.stdout.split()
    assert (int(found), float(pixel)) == (count, -1)
    # What PIL decodes, 1 byte of gray and 4 of color, and 3 of the result; and what is done to it.
    assert int(peak) * 1024 < ({1: 1, 3: 4}[channels] + 3) * side**2 + 80 * 2**20


def test_who_waits_for_room_is_not_overtaken():
    room, order = images._Room(10), []
    entered, leave = threading.Event(), threading.Event()

    def take(name, pixels):
        with room.taken(pixels):
            order.append(name)

    def hold():
        with room.taken(5):
            entered.set()
            assert leave.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(30)
    large, small = (threading.Thread(target=take, args=x) for x in (("large", 10), ("small", 1)))
    large.start()
    while not room._first.locked():
        time.sleep(0.001)
    small.start()
    small.join(0.2)
    assert order == []  # There would be room for the small one.
    leave.set()
    for thread in (holder, large, small):
        thread.join(30)
    assert order == ["large", "small"]


RULE = evaluation("inception", 16)
READERS = {
    "predict": lambda path: list(read_batches([str(path)], RULE, 1, lambda error: None)),
    "evaluate": lambda path: eval_view(path.read_bytes(), RULE),
    "train": lambda path: train_view(path.read_bytes(), None, image_size=16, protocol="bit"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "damaged"])
def test_every_reader_of_many_images_holds_room_for_each(write, monkeypatch, reader, kind):
    taken = []

    class Recorder:
        @contextlib.contextmanager
        def taken(self, pixels):
            taken.append(pixels)
            try:
                yield
            finally:
                taken.append(-pixels)

    monkeypatch.setattr(images, "_room", Recorder())
    # libjpeg-turbo gives up on the damaged one, and PIL decodes it up to there.
    encoded = JPEG["rgb jpeg"][:-300] if kind == "damaged" else encode(COLOR, kind)
    with contextlib.suppress(UserError):
        READERS[reader](write(encoded))
    assert taken == [20 * 24, -20 * 24]


@pytest.mark.parametrize("encoded", [*LOSSLESS.values(), *BEYOND.values(), JPEG["cmyk jpeg"]])
def test_tiles_have_the_pixels_of_the_whole(encoded, write, monkeypatch):
    whole = read_image(write(encoded))
    for pixels in (7, 50):  # parts of a row, and some rows
        monkeypatch.setattr(images, "_TILE", pixels)
        np.testing.assert_array_equal(read_image(write(encoded)), whole)


def test_the_limit_on_pixels_holds_where_a_program_lifted_that_of_pil(write, monkeypatch):
    path = write(bomb(30_000, 30_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UserError, match="has more than 178,956,970 pixels"):
        read_image(path)


PNG = LOSSLESS["rgb png"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.jpg", b"not an image at all\n" * 99, "is not an image: give one of JPEG, PNG"),
        ("empty.jpg", b"", "is an empty file: give"),
        ("truncated.jpg", JPEG["rgb jpeg"][:-300], "is damaged (image file is truncated"),
        ("truncated.png", PNG[: len(PNG) // 2], "is damaged ("),
        ("header.png", PNG[:20], "is"),
        (
            "runs_a_program.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "is not an image",
        ),
        ("float.tif", encode(Image.new("F", (4, 4)), "TIFF"), "pixels of 32 bits"),
    ],
)
def test_what_is_no_image_is_one_line(write, name, data, message):
    path = write(data, name)
    with pytest.raises(UserError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_a_pipe_and_nothing_are_each_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, message in [
        (tmp_path, "is not a file"),
        (tmp_path / "pipe.jpg", "is not a file"),
        (tmp_path / "absent.jpg", "cannot be opened: No such file or directory"),
    ]:
        with pytest.raises(UserError, match=message):
            read_image(path)


def test_a_file_without_permission_is_one_line(write, monkeypatch):
    path = write(PNG)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="cannot be opened: Permission denied"):
        read_image(path)


@pytest.mark.filterwarnings("ignore")  # PIL's, about the damage
@pytest.mark.parametrize(
    "encoded",
    [
        PNG,
        LOSSLESS["gif of two frames"],
        LOSSLESS["bmp"],
        JPEG["rgb jpeg"],
        encode(COLOR, "WEBP"),
        encode(COLOR, "TIFF"),
    ],
    ids=["png", "gif", "bmp", "jpeg", "webp", "tiff"],
)
def test_damaged_bytes_give_pixels_or_one_line(encoded, write, capfd):
    rng = np.random.default_rng(len(encoded))
    for _ in range(60):
        data = bytearray(encoded)
        for position in rng.integers(0, min(len(data), 200), rng.integers(1, 8)):
            data[position] = rng.integers(256)
        try:
            pixels = read_image(write(bytes(data)))
            assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
        except UserError as error:
            assert "\n" not in str(error)
    assert capfd.readouterr().err == ""


def test_it_needs_no_tensorflow():
    code = "import sys, vit_jax.data.images; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
