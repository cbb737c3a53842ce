"""The format of an image file from its first bytes, without decoding it."""

import os

from PIL import Image

from vit_jax.data.images import FORMATS, read_image
from vit_jax.errors import UserError

_LONGEST = 32  # bytes that PIL looks at to tell a format
# How the files begin that end with a mark.
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b";"}


def check_format(path: str | os.PathLike[str]) -> None:
    """Checks that a file begins like an image that `images.read_image` decodes.

    Raises:
        UserError: the file is no image of `images.FORMATS`.
    """
    if os.path.isfile(path):
        with open(path, "rb", buffering=0) as file:
            head = file.read(_LONGEST)
        Image.init()
        # PIL answers with a sentence where it was built without a format that it recognizes.
        accepts = (Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN)
        if any(accept is not None and accept(head) is True for accept in accepts):
            return
    raise UserError(f"{path} is not an image ({', '.join(FORMATS)}): convert it or remove it")


def check_end(path: str | os.PathLike[str]) -> None:
    """Checks that an image file is not cut off, by its last bytes.

    A JPEG, PNG or GIF whose last bytes lack the mark of the end is decoded: some encoders leave it
    out. What is damaged elsewhere is not found, nor a file of another format that is cut off.

    Raises:
        UserError: it cannot be decoded.
    """
    with open(path, "rb", buffering=0) as file:
        head = file.read(_LONGEST)
        file.seek(max(os.fstat(file.fileno()).st_size - _LONGEST, 0))
        tail = file.read()
    if any(head.startswith(begin) and end not in tail for begin, end in _ENDS.items()):
        read_image(path)
