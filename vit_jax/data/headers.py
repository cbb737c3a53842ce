"""Facts about an image file from its first bytes, without decoding it."""

import os
import struct
from typing import BinaryIO

from PIL import Image

from vit_jax.data.images import FORMATS, is_upright
from vit_jax.errors import UserError

_JPEG, _PNG, _GIF, _BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM"
_BMP_HEADER = struct.Struct("<14xI8x2xHI")  # its size, bits per pixel, compression
_PLAIN_BMP = (40, 24, 0)
_START_OF_SCAN, _APP1 = 0xDA, 0xE1  # JPEG markers: pixels follow; EXIF or XMP
_BARE = (0x00, 0x01, 0xFF, *range(0xD0, 0xDA))  # those without a length, and no marker
# Where a PNG may have an orientation: a chunk, or a text by these keywords.
_PNG_TEXTS, _KEYWORDS = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type ", b"XML:com.adobe.xmp")


def tensorflow_reads(path: str | os.PathLike[str]) -> bool:
    """Tells whether TensorFlow decodes an image file to what `images.read_image` makes of it.

    It does not know EXIF's orientation, the palette of a BMP, nor formats other than JPEG, PNG, GIF
    and BMP. Only a JPEG with metadata is opened with PIL, and only its headers are read; a PNG with
    some that may be an orientation counts as one that TensorFlow does not read.

    Raises:
        UserError: the file is no image of `images.FORMATS`.
    """
    if os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(34)
            if head.startswith(_JPEG):
                return not _has_metadata(file) or is_upright(path)
            if head.startswith(_PNG):
                return not _may_be_turned(file)
            if head.startswith(_GIF):
                return True
            if head.startswith(_BMP) and len(head) == 34:
                return _BMP_HEADER.unpack(head) == _PLAIN_BMP
        Image.init()
        # PIL answers with a sentence where it was built without a format that it recognizes.
        accepts = (Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN)
        if any(accept is not None and accept(head) is True for accept in accepts):
            return False
    raise UserError(f"{path} is not an image ({', '.join(FORMATS)}): convert it or remove it")


def _has_metadata(file: BinaryIO) -> bool:
    """Tells whether a JPEG has EXIF or XMP before its pixels; True also where that is unclear."""
    file.seek(2)
    while len(start := file.read(4)) == 4:
        mark, marker, length = struct.unpack(">BBH", start)
        if marker == _START_OF_SCAN:
            return False
        if mark != 0xFF or marker == _APP1 or marker in _BARE or length < 2:
            return True
        file.seek(length - 2, os.SEEK_CUR)
    return False  # It is cut off: nobody reads it.


def _may_be_turned(file: BinaryIO) -> bool:
    file.seek(len(_PNG))
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        if kind == b"eXIf":
            return True
        if kind in _PNG_TEXTS:
            text = file.read(min(length, 18))
            if text.startswith(_KEYWORDS):
                return True
            length -= len(text)
        file.seek(length + 4, os.SEEK_CUR)
    return False
