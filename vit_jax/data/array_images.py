"""Images in NumPy's own files, .npy: arrays of any number of channels."""

import math
import os
from collections.abc import Callable
from io import BytesIO
from typing import BinaryIO

import numpy as np

from vit_jax.errors import UserError, brief

MAGIC = np.lib.format.MAGIC_PREFIX
SUFFIX = ".npy"
# Of the array's type and shape, in bytes: NumPy writes 128 for an image.
LONGEST_HEADER = 256

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def is_image(head: bytes) -> bool:
    """Tells whether a file that begins so holds an array that `read_array` takes."""
    if not head.startswith(MAGIC):
        return False
    try:
        _read_header(BytesIO(head), "")
    except ValueError:  # UserErrors are some.
        return False
    return True


def fault(path: str | os.PathLike[str]) -> str:
    """Says why a file is no image although it holds an array; "" if it holds none or is one."""
    if not os.path.isfile(path):  # A named pipe would be waited for, forever.
        return ""
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(0)
                _read_header(file, path)
    except UserError as error:
        return str(error)
    except (OSError, ValueError):
        pass
    return ""


def num_bytes(head: bytes) -> int:
    """The size of the whole file of an array that begins so, see `is_image`."""
    file = BytesIO(head)
    shape, _, dtype = _read_header(file, "")
    return file.tell() + math.prod(shape) * dtype.itemsize


def read_array(file: BinaryIO, path: object, check: Callable[[int, int, int], None]) -> np.ndarray:
    """Reads an image, uint8 [height, width, channels]; of 16 bits the high byte is kept.

    Nothing in the file is run: it holds numbers and no Python objects.

    Args:
        file: at its beginning.
        path: for messages.
        check: is called with height, width and channels before any pixel is read, and may raise.

    Raises:
        UserError: it is no array of uint8 or uint16 of three axes.
        ValueError: it is damaged.
    """
    shape, is_fortran, dtype = _read_header(file, path)
    check(*shape)
    size = math.prod(shape) * dtype.itemsize
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"{len(content):,} of {size:,} bytes are there")
    pixels = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(pixels if dtype.itemsize == 1 else (pixels >> 8).astype(np.uint8))


def _read_header(file: BinaryIO, path: object) -> tuple[tuple[int, int, int], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"of NumPy's format {version}, which only structured arrays have")
    shape, is_fortran, dtype = _HEADERS[version](file, max_header_size=LONGEST_HEADER)
    if dtype.kind != "u" or dtype.itemsize > 2 or len(shape) != 3 or min(shape) < 1:
        raise UserError(
            f"{path} holds {dtype} {brief(list(shape))}: an image is an array of uint8 or uint16, "
            "[height, width, channels]"
        )
    return shape, is_fortran, dtype
