"""Masks: PNGs whose pixels are the indices of classes, and what a model sees of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_jax.data.images import MAX_PIXELS
from vit_jax.data.resampling import Box
from vit_jax.errors import UserError, brief_name, first_line
from vit_jax.pixel_classes import IGNORED

# An index of one byte: gray, the place in a palette, or black and white, which are 0 and 1.
_MODES = ("L", "P", "1")


def read_mask(name: str, encoded: bytes | None = None) -> np.ndarray:
    """Reads a mask, uint8 [height, width]; of a palette the indices count, not the colors.

    Args:
        name: of the mask in messages, and its path where `encoded` is not given.
        encoded: the content of a PNG.

    Raises:
        UserError: it is missing, no PNG, damaged, too large, or its pixels are no indices.
    """
    try:
        content = Path(name).read_bytes() if encoded is None else encoded
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{name} has more than {MAX_PIXELS:,} pixels: make it smaller")
            if image.mode not in _MODES:
                raise UserError(
                    f"{name} has pixels of mode {image.mode}, which are no indices of classes: "
                    "save it as a gray PNG of 8 bits or one with a palette"
                )
            return np.asarray(image).astype(np.uint8)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no PNG: save the mask as one, JPEG changes indices") from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{name} cannot be opened: {error.strerror}") from error
    except Exception as error:  # PIL's readers have no class for damage, as in `images`.
        raise UserError(f"{name} is damaged ({first_line(error)}): fetch it again") from error


def check_indices(name: str, mask: np.ndarray, num_classes: int) -> None:
    """Raises a UserError if a mask has an index that is neither a class nor `IGNORED`."""
    largest = int(np.max(mask, initial=0, where=mask != IGNORED))
    if largest >= num_classes:
        raise UserError(
            f"{brief_name(name)} has class {largest}, and there are {num_classes}, from 0 to "
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
