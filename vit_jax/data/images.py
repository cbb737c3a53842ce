"""Image files decoded to pixels, and these prepared as evaluation sees them.

JPEGs are decoded by libjpeg-turbo through simplejpeg, in half the time of PIL and to the same
pixels; what it does not know, and all other formats, by PIL. Threads may call everything here at
the same time: what takes long releases Python's lock.
"""

import io
import os
import struct

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax.data.protocols import Preprocessing, eval_box
from vit_jax.data.resampling import resize_and_crop, sample_box
from vit_jax.errors import UserError

# Only these of PIL's readers: others start programs (EPS runs Ghostscript). First those that are
# imported at once; one beyond them makes PIL import every reader it has.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")

# What a directory is searched for. HEIF cannot be read: it is reported then, not passed over.
SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".ppm", ".pgm"]
    + [".pbm", ".pnm", ".webp", ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".heic", ".heif"]
)

# PIL's own limit, which it only has while nobody moves Image.MAX_IMAGE_PIXELS.
MAX_PIXELS = 178_956_970

_ORIENTATION = 0x0112  # the EXIF tag

_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN, _APP1 = 0xDA, 0xE1  # JPEG markers: pixels follow; EXIF or XMP
_COLORS = ("YCbCr", "RGB", "Gray")  # libjpeg makes RGB of these.


def read_image(
    path: str | os.PathLike[str],
    encoded: bytes | None = None,
    jpeg_dct: str = "accurate",
    *,
    turn: bool = True,
) -> np.ndarray:
    """Returns an image as it is meant to be seen, uint8 [height, width, 3], RGB.

    Gray becomes RGB, palettes and CMYK are converted, of 16 bits the high byte is kept, of an
    animation the first frame. Transparency is dropped and the color beneath it shown; in a GIF
    there is none beneath, and black is shown.

    Args:
        path: of a file in one of `FORMATS`, recognized by its content; only a name where `encoded`
            is given.
        encoded: the content, where it has been read already.
        jpeg_dct: one of `protocols.JPEG_DCTS`. JPEGs in CMYK, and damaged ones, are decoded with
            the accurate transform in either case.
        turn: whether the image is turned as its EXIF orientation says.

    Raises:
        UserError: there is no such file, it is no image of these formats, is damaged or truncated,
            has more than `MAX_PIXELS` pixels or values of unknown range (floats, 32-bit integers).
    """
    # A named pipe would be waited for, forever.
    if encoded is None and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file: give an image file")
    try:
        if encoded is None:
            with open(path, "rb") as file:
                if file.read(len(_JPEG)) == _JPEG:
                    file.seek(0)
                    encoded = file.read()
        if encoded is not None and (pixels := _decode_jpeg(encoded, jpeg_dct, turn)) is not None:
            return pixels
        Image.preinit()
        with Image.open(path if encoded is None else io.BytesIO(encoded), formats=FORMATS) as image:
            return _to_rgb(image, path, turn)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        rule = f"has more than {MAX_PIXELS:,} pixels"
        raise UserError(f"{path} {rule}: make it smaller") from error
    except UnidentifiedImageError as error:
        size = os.path.getsize(path) if encoded is None else len(encoded)
        found = "is an empty file" if size == 0 else "is not an image"
        raise UserError(f"{path} {found}: give one of {', '.join(FORMATS)}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}") from error
    except Exception as error:  # PIL's readers have no class for damage: anything may come out
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is damaged ({reason}): fetch it again") from error


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Returns what evaluation sees of an image, float32 [image_size, image_size, 3].

    Args:
        image: uint8 [height, width, 3].
        preprocessing: of the model.
    """
    size = preprocessing.image_size
    if preprocessing.resize == "box":
        box = eval_box(preprocessing, *image.shape[:2])
        kernel = preprocessing.interpolation, preprocessing.antialias
        pixels = sample_box(image, box, size, *kernel)
    else:
        pixels = resize_and_crop(image, preprocessing)
    # A row as a whole: NumPy is slow along an axis of three.
    mean, std = (
        np.tile(np.array([255 * x for x in values], np.float32), size)
        for values in (preprocessing.mean, preprocessing.std)
    )
    normalized = pixels.reshape(size, size * 3) - mean
    normalized /= std
    return normalized.reshape(size, size, 3)


def _decode_jpeg(encoded: bytes, jpeg_dct: str, turn: bool) -> np.ndarray | None:
    """The pixels of a JPEG; None for what is left to PIL, which also says what is wrong."""
    if not encoded.startswith(_JPEG):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
        if colors not in _COLORS or int(height) * int(width) > MAX_PIXELS:
            return None
        pixels = simplejpeg.decode_jpeg(encoded, fastdct=jpeg_dct == "fast")
        if not (turn and _has_metadata(encoded)):
            return pixels
        with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as header:
            orientation = _orientation(header)
    except Exception:
        return None
    image = Image.fromarray(pixels)
    image.getexif()[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def _has_metadata(jpeg: bytes) -> bool:
    """Tells whether there is EXIF or XMP before the pixels; True also where that is unclear."""
    position = 2
    while position + 4 <= len(jpeg):
        mark, marker, length = struct.unpack_from(">BBH", jpeg, position)
        if marker == _START_OF_SCAN:
            return False
        if mark != 0xFF or marker == _APP1 or length < 2:
            return True
        position += 2 + length
    return True


def _to_rgb(image: Image.Image, path: str | os.PathLike[str], turn: bool) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if image.mode in ("F", "I"):
        raise UserError(f"{path} has pixels of 32 bits, whose range is unknown: save it with 8")
    image.load()
    # Of TIFF and AVIF PIL turns some by itself as it loads, and then the tag is gone.
    if turn and _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
    if image.format == "GIF" and "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return np.where(rgba[..., 3:] > 0, rgba[..., :3], np.uint8(0))
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata, of which anything may come too; the pixels are sound
        return 1
