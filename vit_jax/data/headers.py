"""The format of an image file from its first bytes, without decoding it."""

import functools
import os
import stat
from collections.abc import Callable

from PIL import Image

from vit_jax.data import array_images
from vit_jax.data.images import FORMATS, read_image, upright_size
from vit_jax.errors import UserError

_LONGEST = 32  # bytes that PIL looks at to tell a format
# How the files begin that end with a mark.
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b";"}


def measure(path: str | os.PathLike[str], channels: int = 3) -> int | None:
    """The size in bytes of a file that begins like an image that `images.read_image` decodes.

    Args:
        path: of the file.
        channels: of the images that are looked for. An array is one only where these are not 3:
            among photographs it is a mask or a list of labels.

    Returns:
        None if it does not, or is no file but a directory, pipe or device.

    Raises:
        OSError: it cannot be opened.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # A pipe would keep whoever opens it waiting.
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.read(descriptor, array_images.LONGEST_HEADER)
    finally:
        os.close(descriptor)
    # PIL answers with a sentence where it was built without a format that it recognizes.
    known = any(accept(head[:_LONGEST]) is True for accept in _accepts())
    known = known or (channels != 3 and array_images.is_image(head))
    return status.st_size if known else None


@functools.cache
def _accepts() -> tuple[Callable[[bytes], bool | str], ...]:
    Image.init()
    found = (Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN)
    return tuple(accept for accept in found if accept is not None)


def check_format(path: str | os.PathLike[str]) -> int:
    """Checks that a file begins like an image, see `measure`, and returns its size in bytes.

    Raises:
        UserError: the file is no image of `images.FORMATS`.
    """
    try:
        size = measure(path)
    except OSError:
        size = None
    if size is None:
        raise UserError(no_image(path))
    return size


def no_image(path: str | os.PathLike[str], channels: int = 3) -> str:
    """Says that a file is no image, and what to do; arguments are those of `measure`."""
    if channels != 3 and (fault := array_images.fault(path)):
        return fault
    return f"{path} is not an image ({', '.join(FORMATS)}): convert it or remove it"


def upright_sides(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """The height and width of an image that is turned upright, None where its header is silent.

    Args:
        path: of a file that begins like an image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return upright_size(image)[::-1]
    except Exception:  # An array, or damage: of both is told where the image is read.
        return None


def check_end(path: str | os.PathLike[str]) -> None:
    """Checks that an image file is not cut off, by its last bytes.

    A JPEG, PNG or GIF whose last bytes lack the mark of the end is decoded: some encoders leave it
    out. Of an array the size tells. What is damaged elsewhere is not found, nor a file of another
    format that is cut off.

    Raises:
        UserError: it cannot be decoded.
    """
    with open(path, "rb", buffering=0) as file:
        head, size = file.read(array_images.LONGEST_HEADER), os.fstat(file.fileno()).st_size
        if array_images.is_image(head) and size < (whole := array_images.num_bytes(head)):
            raise UserError(
                f"{path} is cut off, {size:,} of {whole:,} bytes are there: fetch it again"
            )
        file.seek(max(size - _LONGEST, 0))
        tail = file.read()
    if any(head.startswith(begin) and end not in tail for begin, end in _ENDS.items()):
        read_image(path)
