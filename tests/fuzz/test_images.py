"""Images and folders of them: pixels of the size that was promised, or one line."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, features

from vit_jax.data import images
from vit_jax.data.folder import open_folder
from vit_jax.data.image_files import find_images
from vit_jax.data.images import open_image, preprocess
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError

from .conftest import told_badly

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 13, 3), np.uint8)
COLOR = Image.fromarray(PIXELS)


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


SAMPLES = [
    encode(COLOR, "JPEG"),
    encode(COLOR, "JPEG", progressive=True, exif=_exif()),
    encode(COLOR.convert("CMYK"), "JPEG"),
    encode(COLOR.quantize(16), "GIF", save_all=True, append_images=[COLOR.convert("L")]),
    encode(COLOR, "BMP"),
    encode(COLOR.quantize(16), "BMP"),
    encode(COLOR, "PPM"),
    encode(COLOR, "WEBP"),
    encode(COLOR, "WEBP", lossless=True, exif=_exif()),
    encode(COLOR, "TIFF", exif=_exif()),
    encode(COLOR, "TIFF", compression="tiff_lzw"),
    encode(Image.fromarray(PIXELS[..., 0].astype(np.uint16)), "TIFF", compression="packbits"),
    encode(COLOR, "JPEG2000"),
    *([encode(COLOR, "AVIF")] if features.check("avif") else []),
]
BYTES = st.binary(max_size=9)
ACTS = st.sampled_from(["replace", "replace", "insert", "drop", "repeat", "cut", "join"])
SIDES = st.sampled_from([1, 2, 5, 7, 8, 13, 255, 3000, 0, 13_377, 2**20 + 1, 2**31 - 1, 2**32 - 1])
# Bits, color type, compression, filter and interlace.
KINDS = [[1, 2, 4, 8, 16, 3, 255], [0, 2, 3, 4, 6, 1], [0, 1], [0], [0, 1, 2]]
KINDS_THERE_ARE = [(1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (2, 3), (8, 3), (8, 4), (16, 6)]
CHUNKS = b"PLTE tRNS eXIf iCCP tEXt zTXt iTXt gAMA acTL fcTL fdAT IDAT pHYs cHRM sBIT zzZz".split()


@st.composite
def mutated(draw):
    """A sample with bytes replaced, put in, taken out, repeated, cut off, or another's end."""
    data = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 6))):
        # Most of what decides is at the beginning.
        end = draw(st.sampled_from([30, 120, max(len(data), 1)]))
        at, bytes_ = draw(st.integers(0, end)), draw(BYTES)
        act = draw(ACTS)
        if act == "replace":
            data[at : at + len(bytes_)] = bytes_
        elif act == "insert":
            data[at:at] = bytes_
        elif act == "drop":
            del data[at : at + len(bytes_)]
        elif act == "repeat":
            data[at:at] = data[at : at + 40] * len(bytes_)
        elif act == "cut":
            del data[at:]
        else:
            data[at:] = draw(st.sampled_from(SAMPLES))[at:]
    return bytes(data)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@st.composite
def png(draw):
    """Chunks whose checksums are right, whatever they say."""
    width, height = draw(SIDES), draw(SIDES)
    kind = [draw(st.sampled_from(choices)) for choices in KINDS]
    pixels = draw(st.binary(max_size=200)) * draw(st.sampled_from([1, 9, 1000]))
    if draw(st.booleans()):  # Enough of them, of a kind that there is.
        width, height = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        kind[:4] = *draw(st.sampled_from(KINDS_THERE_ARE)), 0, 0
        row = (8 * width * (pixels + b"\0"))[: 8 * width]
        pixels = (draw(st.sampled_from([b"\0", b"\1", b"\4"])) + row) * height
    header = struct.pack(">IIBBBBB", width, height, *kind)
    packed = zlib.compress(pixels, draw(st.sampled_from([0, 9])))
    if draw(st.integers(0, 3)) == 3:
        packed = packed[: draw(st.integers(0, len(packed)))]
    parts = [chunk(b"IDAT", packed)]
    for name in draw(st.lists(st.sampled_from(CHUNKS), max_size=4)):
        content = draw(st.binary(max_size=60)) * draw(st.sampled_from([1, 1, 13]))
        if name in (b"iCCP", b"zTXt"):  # a bomb of text
            content = b"a\0\0" + zlib.compress(content * 1_000)
        parts.insert(draw(st.integers(0, len(parts))), chunk(name, content))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *parts, chunk(b"IEND", b"")])


RULES = [Preprocessing(16, 0.9), Preprocessing(16, 0.9, "bicubic", True, resize="timm")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A limit that keeps a case short, in place of 179 million pixels."""
    monkeypatch.setattr(images, "MAX_PIXELS", 2**22)


def read(path):
    before = images._room._free
    try:
        with open_image(path) as pixels:
            height, width, channels = pixels.shape
            assert pixels.dtype == np.uint8 and channels == 3
            assert 0 < height * width <= images.MAX_PIXELS
            assert max(height, width) <= images.MAX_SIDE
            for rule in RULES:
                view = preprocess(pixels, rule)
                assert view.shape == (16, 16, 3) and np.isfinite(view).all()
    finally:
        assert images._room._free == before


def test_images(fuzz):
    fuzz("images", mutated(), read, sound=SAMPLES, name="a.png")


def test_png(fuzz):
    fuzz("png", png(), read, sound=[encode(COLOR, "PNG")], name="a.png")


# Names as a file system may hold them, and those that mean something.
NAMES = st.one_of(
    st.sampled_from(["train", "test", "val", "0", "007", "1", "²", "٣", "-1", "a.png", "..a", "~"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
    st.binary(min_size=1, max_size=9).map(os.fsdecode),
).filter(lambda x: x not in (".", "..") and "/" not in x and "\0" not in x)
FILES = st.sampled_from([encode(COLOR, "PNG"), SAMPLES[0], SAMPLES[0][:40], b"", b"no image"])
SPLIT = st.one_of(st.sampled_from(["train", "test", "val", "valid", "validation"]), NAMES)
IMAGE = st.one_of(st.sampled_from(["a.png", "b.jpg", ".hidden"]), NAMES)


@st.composite
def folders(draw):
    """Files three levels deep, no two of which differ in kind alone."""
    paths = draw(st.lists(st.tuples(SPLIT, NAMES, IMAGE), min_size=1, max_size=6, unique=True))
    return {"/".join(path): draw(FILES) for path in paths}


def read_folder(path):
    """Every image is in the class that its directory names, and found by its path alone."""
    folder = open_folder(str(path))
    assert len(set(folder.class_names)) == len(folder.class_names)
    found = set(find_images([str(path)]))
    for files in folder.splits.values():
        for file in files:
            parts = file.path.removeprefix(f"{path}/").split("/")
            name = parts[-1]
            assert folder.class_names[file.label] == parts[folder.partition is None]
            if os.path.splitext(name)[1].lower() in images.SUFFIXES:
                assert file.path in found
            try:
                read(file.path)
            except UserError as error:
                assert told_badly(str(error)) is None


def test_folders(fuzz):
    sound = {"train/a/a.png": encode(COLOR, "PNG"), "train/b/b.png": encode(COLOR, "PNG")}
    fuzz("folders", folders(), read_folder, sound=[sound])
