"""Masks: PNGs whose pixels are the indices of classes, and what a model sees of them."""

import contextlib
import io
import os
from collections.abc import Generator

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_jax.data.images import MAX_PIXELS, room_for
from vit_jax.data.resampling import Box
from vit_jax.errors import UserError, first_line
from vit_jax.pixel_classes import IGNORED

# An index of one byte: gray, the place in a palette, or black and white, which are 0 and 1.
_MODES = ("L", "P", "1")
_HEADER = 26  # bytes of a PNG, up to its bit depth and its kind of color
_GRAY = 0


@contextlib.contextmanager
def open_mask(
    name: str, encoded: bytes | None = None, size: tuple[int, int] | None = None
) -> Generator[np.ndarray]:
    """Yields a mask, uint8 [height, width]; of a palette the indices count, not the colors.

    Threads hold a bounded number of pixels together, as in `images.open_image`: what is made of a
    mask should outlive this, the mask not; within it no other is opened, nor an image.

    Args:
        name: of the mask in messages, and its path where `encoded` is not given.
        encoded: the content of a PNG.
        size: height and width of its image, if they are known: others are refused, before a pixel
            is decoded.

    Raises:
        UserError: it is missing, no PNG, damaged, too large, of another size, or its pixels are no
            indices.
    """
    with contextlib.ExitStack() as stack:
        yield _read(name, encoded, size, stack)


def _read(
    name: str, encoded: bytes | None, size: tuple[int, int] | None, stack: contextlib.ExitStack
) -> np.ndarray:
    # A named pipe would be waited for, forever.
    if encoded is None and os.path.exists(name) and not os.path.isfile(name):
        raise UserError(f"{name} is not a file: give a PNG")
    try:
        with open(name, "rb") if encoded is None else io.BytesIO(encoded) as file:
            scale = _scale(file.read(_HEADER))
            with Image.open(file, formats=["PNG"]) as image:
                _check(name, image, size)
                stack.enter_context(room_for(image.width * image.height))
                mask = np.asarray(image).astype(np.uint8, copy=False)
        return mask if scale == 1 else mask // scale
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no PNG: save the mask as one, JPEG changes indices") from error
    except MemoryError as error:
        raise UserError(f"{name} does not fit in memory: make it smaller, or free some") from error
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{name} cannot be opened: {error.strerror}") from error
    except Exception as error:  # PIL's readers have no class for damage, as in `images`.
        raise UserError(f"{name} is damaged ({first_line(error)}): fetch it again") from error


def _check(name: str, image: Image.Image, size: tuple[int, int] | None) -> None:
    if image.width * image.height > MAX_PIXELS:  # Where somebody has moved PIL's own limit.
        raise _too_large(name)
    if image.mode not in _MODES:
        raise UserError(
            f"{name} has pixels of mode {image.mode}, which are no indices of classes: "
            "save it as a gray PNG of 8 bits or one with a palette"
        )
    if size is not None and (image.height, image.width) != size:
        raise UserError(
            f"{name} has {image.width} x {image.height} pixels, and its image {size[1]} x "
            f"{size[0]}: save it in the size of the image"
        )


def _too_large(name: str) -> UserError:
    return UserError(f"{name} has more than {MAX_PIXELS:,} pixels: make it smaller")


def _scale(header: bytes) -> int:
    """The factor by which PIL makes 255 of the largest level of a gray PNG of 2 or 4 bits.

    Args:
        header: the begin of the file: its signature and IHDR, which is always the first chunk (PNG
            specification, Section 5.6).
    """
    if len(header) < _HEADER:  # It is no PNG, which PIL says.
        return 1
    bits, kind = header[24:26]
    return 255 // (2**bits - 1) if kind == _GRAY and bits in (2, 4) else 1


def indices_of(mask: np.ndarray) -> bytes:
    """The indices that a mask has but for `IGNORED`, ascending, a byte each."""
    there = np.zeros(256, bool)
    for row in mask:  # Of the whole at once NumPy would make indices of 8 bytes.
        there[row] = True
    return bytes(np.flatnonzero(there[:IGNORED]).tolist())


def check_indices(name: str, mask: np.ndarray, num_classes: int) -> None:
    """Raises a UserError if a mask has an index that is neither a class nor `IGNORED`."""
    if mask.max(initial=0) >= num_classes:
        largest = int(np.max(mask, initial=0, where=mask != IGNORED))
        check_largest(name, largest, num_classes)


def check_largest(name: str, largest: int, num_classes: int) -> None:
    """Raises a UserError if the largest index of a mask, but for `IGNORED`, is no class."""
    if largest >= num_classes:
        raise UserError(
            f"{name} has class {largest}, and there are {num_classes}, from 0 to "
            f"{num_classes - 1}: mend it, or set {IGNORED} for what is not to count"
        )


def sample_nearest(mask: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Samples the pixels that lie nearest in a box, uint8 [height, width].

    The centers are those at which `resampling.sample_box` samples the image. Beyond the mask it is
    `IGNORED`.

    Args:
        mask: uint8 [height, width].
        box: y, x, height and width in pixels of the mask; may lie beyond it in part.
        size: height and width of the output.
    """
    (y, x, height, width), (tall, wide) = box, size
    rows, rows_inside = _nearest(y, height, tall, mask.shape[0])
    columns, columns_inside = _nearest(x, width, wide, mask.shape[1])
    inside = rows_inside[:, None] & columns_inside
    return np.where(inside, mask[np.ix_(rows, columns)], np.uint8(IGNORED))


def _nearest(begin: float, extent: float, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The source pixel of each output pixel of an axis, and whether it is there."""
    found = np.floor(begin + (np.arange(size) + 0.5) * (extent / size)).astype(int)
    return np.clip(found, 0, length - 1), (found >= 0) & (found < length)
