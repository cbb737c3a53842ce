"""The format of an image file from its first bytes, without decoding it."""

import os

from PIL import Image

from vit_jax.data.images import FORMATS
from vit_jax.errors import UserError

_LONGEST = 32  # bytes that PIL looks at to tell a format


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
