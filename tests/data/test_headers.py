"""Which files TensorFlow reads as they are meant, against TensorFlow itself."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, PngImagePlugin

from vit_jax.data.headers import tensorflow_reads
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


PLAIN = {
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
}
OTHER = {
    **{f"jpeg, {i} by exif": encode("JPEG", exif=exif(i)) for i in range(2, 9)},
    "jpeg, exif after a color profile": encode("JPEG", exif=exif(6), icc_profile=bytes(100_000)),
    "jpeg, turned by xmp": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 6),
    **{f"png, {i} by exif": encode("PNG", exif=exif(i)) for i in range(2, 9)},
    "png, turned by xmp": encode("PNG", pnginfo=png_text("XML:com.adobe.xmp", str(XMP % 6))),
    "png, turned by exif after its pixels": None,
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


def with_exif_last(png):
    """The chunks of a PNG, eXIf moved to just before IEND."""
    chunks, position = [], 8
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        chunks.append(png[position : position + length + 12])
        position += length + 12
    order = sorted(chunks[:-1], key=lambda chunk: chunk[4:8] == b"eXIf")
    return png[:8] + b"".join([*order, chunks[-1]])


OTHER["png, turned by exif after its pixels"] = with_exif_last(encode("PNG", exif=exif(6)))


def tensorflows(encoded):
    if tf.io.is_jpeg(encoded):
        return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE").numpy()
    pixels = tf.io.decode_image(encoded, expand_animations=False).numpy()
    return pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, -1)


@pytest.mark.parametrize("encoded", PLAIN.values(), ids=PLAIN)
def test_what_tensorflow_reads(encoded, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded)
    assert tensorflow_reads(path)
    difference = tensorflows(encoded).astype(int) - read_image(path)
    assert np.abs(difference).max() <= int(tf.io.is_jpeg(encoded))


@pytest.mark.parametrize("encoded", OTHER.values(), ids=OTHER)
def test_what_tensorflow_does_not_read_as_it_is_meant(encoded, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded)
    assert not tensorflow_reads(path)
    try:
        pixels = tensorflows(encoded)
    except tf.errors.InvalidArgumentError:
        return
    meant = read_image(path)
    assert pixels.shape != meant.shape or np.abs(pixels.astype(int) - meant).max() > 20


@pytest.mark.parametrize(
    "content", [b"", b"P", b"PK\3\4" + bytes(90), b"\0\0\0\x18ftypheic" + bytes(50)]
)
def test_what_is_no_image_is_named(content, tmp_path):
    (tmp_path / "file.jpg").write_bytes(content)
    for path in (tmp_path / "file.jpg", tmp_path):
        with pytest.raises(UserError, match=r"is not an image \(JPEG, PNG, .*: convert it or rem"):
            tensorflow_reads(path)


@pytest.mark.parametrize("cut", [3, 4, 7, 21, 40])
def test_a_file_that_is_cut_off_is_left_to_who_decodes_it(cut, tmp_path):
    for name in ("jpeg, 6 by exif", "png, 6 by exif"):
        (tmp_path / "file").write_bytes(OTHER[name][: max(cut, 8 * (name[0] == "p"))])
        assert tensorflow_reads(tmp_path / "file") in (True, False)
