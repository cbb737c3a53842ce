"""Which files are taken for images, by their first bytes."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vit_jax.data.headers import check_end, check_format
from vit_jax.data.images import read_image
from vit_jax.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
COLOR = Image.fromarray(RGB)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def encode(file_format, image=COLOR, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_text(key, text, compressed=False):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text, zip=compressed)
    return info


def jpeg_segment(marker, content):
    """A JPEG with one more segment, before all others."""
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    jpeg = encode("JPEG")
    return jpeg[:2] + segment + jpeg[2:]


IMAGES = {
    "jpeg": encode("JPEG"),
    "progressive jpeg": encode("JPEG", progressive=True),
    "jpeg, upright by exif": encode("JPEG", exif=exif(1)),
    "jpeg with other exif": encode("JPEG", exif=Image.Exif()),
    "jpeg with a color profile of 100 KiB": encode("JPEG", icc_profile=bytes(100 * 1024)),
    "jpeg with a comment": jpeg_segment(0xFE, b"Exif\0\0 is not what this is"),
    "jpeg, upright by xmp": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 1),
    "png": encode("PNG"),
    "png with a text": encode("PNG", pnginfo=png_text("Software", "a camera")),
    "gif": encode("GIF", COLOR.quantize(8)),
    "bmp": encode("BMP"),
    **{f"jpeg, {i} by exif": encode("JPEG", exif=exif(i)) for i in range(2, 9)},
    "jpeg, exif after a color profile": encode("JPEG", exif=exif(6), icc_profile=bytes(100_000)),
    "jpeg, turned by xmp": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 6),
    **{f"png, {i} by exif": encode("PNG", exif=exif(i)) for i in range(2, 9)},
    "png, turned by xmp": encode("PNG", pnginfo=png_text("XML:com.adobe.xmp", str(XMP % 6))),
    "palette bmp": encode("BMP", COLOR.quantize(8)),
    "bilevel bmp": encode("BMP", COLOR.convert("1")),
    "webp": encode("WEBP", exif=exif(6)),  # Upright ones are read by the newest TensorFlow.
    "tiff": encode("TIFF"),
    "ppm": encode("PPM"),
    "pgm": encode("PPM", COLOR.convert("L")),
    "jpeg 2000": encode("JPEG2000"),
    "jpeg 2000 without a container": encode("JPEG2000", no_jp2=True),
    "avif": encode("AVIF"),
}


@pytest.mark.parametrize("encoded", IMAGES.values(), ids=IMAGES)
def test_an_image_of_every_format_is_one(encoded, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded)
    check_format(path)
    assert read_image(path).shape in [(12, 9, 3), (9, 12, 3)]


@pytest.mark.parametrize(
    "content", [b"", b"P", b"PK\3\4" + bytes(90), b"\0\0\0\x18ftypheic" + bytes(50)]
)
def test_what_is_no_image_is_named(content, tmp_path):
    (tmp_path / "file.jpg").write_bytes(content)
    for path in (tmp_path / "file.jpg", tmp_path):
        with pytest.raises(UserError, match=r"is not an image \(JPEG, PNG, .*: convert it or rem"):
            check_format(path)


@pytest.mark.parametrize("cut", [3, 4, 7, 21, 40])
def test_a_file_that_is_cut_off_is_left_to_who_decodes_it(cut, tmp_path):
    for name in ("jpeg, 6 by exif", "png, 6 by exif"):
        (tmp_path / "file").write_bytes(IMAGES[name][: max(cut, 8 * (name[0] == "p"))])
        check_format(tmp_path / "file")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF"])
def test_an_image_that_is_cut_off_is_found_by_its_end(tmp_path, file_format):
    path = tmp_path / "image"
    whole = encode(file_format, COLOR.resize((64, 64)))
    path.write_bytes(whole)
    check_end(path)
    path.write_bytes(whole + b"\0" * 100)  # It can be decoded.
    check_end(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        check_end(path)
