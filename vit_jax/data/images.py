"""Image files decoded to pixels, and these prepared as evaluation sees them.

JPEGs are decoded by libjpeg-turbo through simplejpeg, in half the time of PIL and to the same
pixels; what it does not know, and all other formats, by PIL. Threads may call everything here at
the same time: what takes long releases Python's lock. Through `open_image` they hold a bounded
number of pixels together.
"""

import contextlib
import io
import itertools
import os
import struct
import threading
from collections.abc import Callable, Generator
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vit_jax.data import array_images
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

# Of one side. PIL's own code overflows near 2^29, and tables of weights are as long as a side.
MAX_SIDE = 2**20

# What `open_image` holds at a time: the largest image, or one of 16 megapixels for every core.
PIXELS_AT_A_TIME = max(MAX_PIXELS, 2**24 * (os.cpu_count() or 1))

# The modes that PIL converts to, by their channels.
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# What is converted at a time: PIL's copies would take 10 bytes a pixel of the whole.
_TILE = 2**20

# glibc gives memory back at once above 32 MiB. PIL's blocks have 16, which each thread would keep.
Image.core.set_block_size(2**26)

_ORIENTATION = 0x0112  # the EXIF tag

# How an image is turned upright by its orientation.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
_TURNS_BACK = {**_TURNS, 6: _TURNS[8], 8: _TURNS[6]}

_JPEG = b"\xff\xd8\xff"
# Pillow asks a file for as many bytes as the header of these says that come, and Python makes room
# for all of them; of bytes in memory it takes what there is.
_JPEG_2000 = b"\x00\x00\x00\x0cjP"
_START_OF_SCAN, _APP1 = 0xDA, 0xE1  # JPEG markers: pixels follow; EXIF or XMP
_COLORS = ("YCbCr", "RGB", "Gray")  # libjpeg makes RGB of these.


def read_image(
    path: str | os.PathLike[str],
    encoded: bytes | None = None,
    jpeg_dct: str = "accurate",
    *,
    turn: bool = True,
    channels: int = 3,
) -> np.ndarray:
    """Returns an image as it is meant to be seen, uint8 [height, width, channels], RGB of three.

    Gray becomes RGB, palettes and CMYK are converted, of 16 bits the high byte is kept, of an
    animation the first frame. Transparency is dropped and the color beneath it shown; in a GIF
    there is none beneath, and black is shown. One channel is the luma of these colors (ITU-R 601).

    Of another number of channels an image must have as many: gray with alpha or RGBA, the pages of
    a TIFF of gray images, or an array.

    Args:
        path: of a file in one of `FORMATS`, recognized by its content, or of an array, see
            `array_images`; only a name where `encoded` is given.
        encoded: the content, where it has been read already.
        jpeg_dct: one of `protocols.JPEG_DCTS`. JPEGs in CMYK, and damaged ones, are decoded with
            the accurate transform in either case.
        turn: whether the image is turned as its EXIF orientation says.
        channels: of the result.

    Raises:
        UserError: there is no such file, it is no image of these formats, is damaged or truncated,
            has more than `MAX_PIXELS` pixels, a side of more than `MAX_SIDE`, values of unknown
            range (floats, 32-bit integers) or other channels.
    """
    return _read(path, encoded, jpeg_dct, turn, channels, lambda _: None)


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike[str],
    encoded: bytes | None = None,
    jpeg_dct: str = "accurate",
    *,
    turn: bool = True,
    channels: int = 3,
) -> Generator[np.ndarray]:
    """Yields what `read_image` returns; all threads together hold `PIXELS_AT_A_TIME` at most.

    A thread waits before it decodes until there is room, those that came first go first. So what is
    decoded takes 1.3 GB on up to 10 cores: at its height, PIL's 4 bytes a pixel and 3 of the
    result; the decoders of WebP, AVIF, JPEG 2000 and progressive JPEGs hold copies of their own
    beside. What is made of an image should outlive this, the image not; within it no other is
    opened. Arguments and errors are those of `read_image`.
    """
    with contextlib.ExitStack() as stack:
        admitted: list[int] = []

        def admit(pixels: int) -> None:
            if not admitted:  # What libjpeg-turbo has given up on comes a second time.
                stack.enter_context(_room.taken(pixels))
                admitted.append(pixels)

        yield _read(path, encoded, jpeg_dct, turn, channels, admit)


class _Room:
    """A number of pixels, which threads share in the order in which they come."""

    def __init__(self, pixels: int):
        self._free = pixels
        self._freed = threading.Condition()
        self._first = threading.Lock()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Generator[None]:
        """Waits until so many pixels are free, and holds them."""
        # Who waits is not overtaken: a large image would wait forever among small ones.
        with self._first, self._freed:
            self._freed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._freed:
                self._free += pixels
                self._freed.notify_all()


_room = _Room(PIXELS_AT_A_TIME)


def room_for(pixels: int) -> contextlib.AbstractContextManager[None]:
    """Waits until so many pixels fit in beside those of `open_image`, and holds them likewise."""
    return _room.taken(pixels)


def _read(
    path: str | os.PathLike[str],
    encoded: bytes | None,
    jpeg_dct: str,
    turn: bool,
    channels: int,
    admit: Callable[[int], None],
) -> np.ndarray:
    """Reads as `read_image`; calls `admit` with the number of pixels before it decodes them."""
    # A named pipe would be waited for, forever.
    if encoded is None and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file: give an image file")
    try:
        if encoded is None:
            with open(path, "rb") as file:
                start = file.read(len(array_images.MAGIC))
                file.seek(0)
                if start == array_images.MAGIC:
                    return _read_array(file, path, channels, admit)
                if start.startswith((_JPEG, _JPEG_2000)):
                    encoded = file.read()
        elif encoded.startswith(array_images.MAGIC):
            return _read_array(io.BytesIO(encoded), path, channels, admit)
        if encoded is not None and channels in (1, 3):
            pixels = _decode_jpeg(encoded, jpeg_dct, turn, admit)
            if pixels is not None:
                return pixels if channels == 3 else _luma(pixels)
        Image.preinit()
        with Image.open(path if encoded is None else io.BytesIO(encoded), formats=FORMATS) as image:
            return _to_pixels(image, path, turn, channels, admit)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        rule = f"has more than {MAX_PIXELS:,} pixels"
        raise UserError(f"{path} {rule}: make it smaller") from error
    except UnidentifiedImageError as error:
        size = os.path.getsize(path) if encoded is None else len(encoded)
        found = "is an empty file" if size == 0 else "is not an image"
        raise UserError(f"{path} {found}: give one of {', '.join(FORMATS)}") from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit in memory: make it smaller, or free some") from error
    except Exception as error:  # PIL's readers have no class for damage: anything may come out
        if reason := getattr(error, "strerror", None):  # The system's word, which PIL has not.
            raise UserError(f"{path} cannot be opened: {reason}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is damaged ({reason}): fetch it again") from error


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Returns what evaluation sees of an image, float32 [height, width, channels].

    Args:
        image: uint8 [height, width, channels].
        preprocessing: of the model.
    """
    if preprocessing.resize == "box":
        box = eval_box(preprocessing, *image.shape[:2])
        kernel = preprocessing.interpolation, preprocessing.antialias
        pixels = sample_box(image, box, preprocessing.image_size, *kernel)
    else:
        pixels = resize_and_crop(image, preprocessing)
    height, width = pixels.shape[:2]
    # A row as a whole: NumPy is slow along an axis of three.
    mean, std = (
        np.tile(np.array([255 * x for x in values], np.float32), width)
        for values in (preprocessing.mean, preprocessing.std)
    )
    normalized = pixels.reshape(height, -1) - mean
    normalized /= std
    return normalized.reshape(pixels.shape)


def _decode_jpeg(
    encoded: bytes, jpeg_dct: str, turn: bool, admit: Callable[[int], None]
) -> np.ndarray | None:
    """The pixels of a JPEG; None for what is left to PIL, which also says what is wrong."""
    if not encoded.startswith(_JPEG):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
        if colors not in _COLORS or int(height) * int(width) > MAX_PIXELS:
            return None
        admit(int(height) * int(width))
        pixels = simplejpeg.decode_jpeg(encoded, fastdct=jpeg_dct == "fast")
        if not (turn and _has_metadata(encoded)):
            return pixels
        with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as header:
            orientation = _orientation(header)
    except Exception:
        return None
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


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


def _to_pixels(
    image: Image.Image,
    path: str | os.PathLike[str],
    turn: bool,
    channels: int,
    admit: Callable[[int], None],
) -> np.ndarray:
    """The pixels of an image, or of all pages of a TIFF where these are its channels."""
    alone = channels in (1, 3) or image.format != "TIFF" or _bands(image) == channels
    if alone or not _has_page(image, 1):
        return _page_to_pixels(image, path, turn, channels, admit)
    if _has_page(image, channels):
        raise UserError(f"{path} has more than {channels} pages, the channels: take some out")
    pages = []
    for page in range(channels):
        if not _has_page(image, page):
            raise _other_channels(path, page, channels)
        _check_range(image, path)
        if _bands(image) != 1:
            raise UserError(f"{path} has pages that are not gray: save each channel as a gray one")
        if not pages:
            _check_values(image.height, image.width, channels, path)
            admit(image.height * image.width * channels // 3)
        pages.append(_page_to_pixels(image, path, turn, 1, lambda _: None))
        if pages[-1].shape != pages[0].shape:
            raise UserError(f"{path} has pages of several sizes: save them in one")
    return np.concatenate(pages, axis=-1)


def _has_page(image: Image.Image, page: int) -> bool:
    """Goes to a page if it is there."""
    try:
        image.seek(page)
    except EOFError:
        return False
    return True


def _read_array(
    file: BinaryIO, path: str | os.PathLike[str], channels: int, admit: Callable[[int], None]
) -> np.ndarray:
    def check(height: int, width: int, found: int) -> None:
        _check_size(width, height, path)
        _check_values(height, width, found, path)
        if found != channels and (found, channels) not in ((1, 3), (3, 1)):
            raise _other_channels(path, found, channels)
        admit(height * width * found // 3)

    pixels = array_images.read_array(file, path, check)
    if pixels.shape[-1] == channels:
        return pixels
    return _luma(pixels) if channels == 1 else np.repeat(pixels, channels, axis=-1)


def _bands(image: Image.Image) -> int:
    """The channels of an image, before any is made of others."""
    if image.mode in ("1", "L") or image.mode.startswith("I;16"):
        return 1
    if image.mode in ("LA", "La"):
        return 2
    is_transparent = image.mode == "P" and "transparency" in image.info
    return 4 if is_transparent or image.mode in ("PA", "RGBA", "RGBa") else 3


def check_channels(image: Image.Image, path: str | os.PathLike[str], channels: int) -> None:
    """Checks that an image has so many channels; gray and RGB are made of any.

    Raises:
        UserError: it has others.
    """
    if channels not in (1, 3) and _bands(image) != channels:
        raise _other_channels(path, _bands(image), channels)


def convert(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels of an image of 8 bits, uint8 [height, width, channels], see `check_channels`."""
    pixels = np.asarray(image.convert(_MODES[channels]))
    return pixels.reshape(image.height, image.width, channels)


def _other_channels(path: str | os.PathLike[str], found: int, channels: int) -> UserError:
    return UserError(
        f"{path} has {found} channel{'s' * (found != 1)}, and {channels} are wanted: give images "
        f"of {channels}, or train with --config.dataset.channels={found}"
    )


def _luma(rgb: np.ndarray) -> np.ndarray:
    """PIL's "L" of an image, uint8 [height, width, 1]: 0.299 R + 0.587 G + 0.114 B (ITU-R 601)."""
    gray = np.empty((*rgb.shape[:2], 1), np.uint8)
    for left, top, right, bottom in _tiles(rgb.shape[1], rgb.shape[0]):
        tile = Image.fromarray(rgb[top:bottom, left:right])
        gray[top:bottom, left:right, 0] = np.asarray(tile.convert("L"))
    return gray


def _page_to_pixels(
    image: Image.Image,
    path: str | os.PathLike[str],
    turn: bool,
    channels: int,
    admit: Callable[[int], None],
) -> np.ndarray:
    _check_size(image.width, image.height, path)
    _check_range(image, path)
    check_channels(image, path, channels)
    admit(image.width * image.height)
    image.load()
    # Of TIFF and AVIF PIL turns some by itself as it loads, and then the tag is gone.
    orientation = _orientation(image) if turn else 1
    sides = (image.width, image.height) if orientation in (5, 6, 7, 8) else image.size[::-1]
    pixels = np.empty((*sides, channels), np.uint8)
    as_stored = _TURNS_BACK[orientation](pixels) if orientation in _TURNS else pixels
    for left, top, right, bottom in _tiles(*image.size):
        whole = (right - left, bottom - top) == image.size
        tile = image if whole else image.crop((left, top, right, bottom))
        as_stored[top:bottom, left:right] = _tile_to_pixels(tile, image.format, channels)
    return pixels


def _check_range(image: Image.Image, path: str | os.PathLike[str]) -> None:
    if image.mode in ("F", "I"):
        raise UserError(f"{path} has pixels of 32 bits, whose range is unknown: save it with 8")


def _check_size(width: int, height: int, path: str | os.PathLike[str]) -> None:
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if max(width, height) > MAX_SIDE:
        raise UserError(
            f"{path} has {width:,} x {height:,} pixels, and a side may have {MAX_SIDE:,}: cut it "
            "into parts"
        )


def _check_values(height: int, width: int, channels: int, path: str | os.PathLike[str]) -> None:
    """Bounds what is held by an image of many channels to what one of three may take."""
    if height * width * channels > 3 * MAX_PIXELS:
        raise UserError(
            f"{path} has {height * width * channels:,} values, and at most {3 * MAX_PIXELS:,} are "
            "read: make it smaller"
        )


def _tiles(width: int, height: int) -> Generator[tuple[int, int, int, int]]:
    """Boxes of some `_TILE` pixels that cover an image: left, top, right, bottom."""
    columns = min(width, _TILE)
    rows = max(1, _TILE // columns)
    for top, left in itertools.product(range(0, height, rows), range(0, width, columns)):
        yield left, top, min(left + columns, width), min(top + rows, height)


def _tile_to_pixels(tile: Image.Image, file_format: str | None, channels: int) -> np.ndarray:
    if tile.mode.startswith("I;16"):
        return np.repeat((np.asarray(tile) >> 8).astype(np.uint8)[..., None], channels, -1)
    if file_format == "GIF" and "transparency" in tile.info and channels != 4:
        rgba = np.asarray(tile.convert("RGBA"))
        rgb = np.where(rgba[..., 3:] > 0, rgba[..., :3], np.uint8(0))
        return rgb if channels == 3 else _luma(rgb)
    return convert(tile, channels)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """The width and height that an image which was opened has when it is turned upright."""
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _orientation(image: Image.Image) -> int:
    """One of `_TURNS`, or 1: upright."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
        return orientation if orientation in _TURNS else 1
    except Exception:  # damaged metadata, of which anything may come too; the pixels are sound
        return 1
