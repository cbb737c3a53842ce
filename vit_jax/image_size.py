"""The size of a model's images: the side of a square, or "HEIGHTxWIDTH".

Configs, files and messages have it in this form; who computes with it asks for `sides`.
"""

import re

from vit_jax.errors import brief

# A side in pixels: 20 times those of the largest images that models of the paper are fine-tuned at.
MAX_IMAGE_SIZE = 10_000

ImageSize = int | str


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels of a size in which `size_problem` finds nothing wrong."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size.split("x")
    return int(height), int(width)


def from_text(text: str) -> ImageSize:
    """Reads 224 as a number and 224x320, or what `size_problem` refuses, as it is written."""
    return int(text) if text.isdecimal() else text


def of_sides(height: int, width: int) -> ImageSize:
    """The size of images of a height and width in pixels."""
    return height if height == width else f"{height}x{width}"


def in_words(image_size: ImageSize) -> str:
    """A size as it is read: "224 x 320"."""
    return "{} x {}".format(*sides(image_size))


def size_problem(value: object) -> str | None:
    """Says what is wrong with a size, None if nothing."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_pair = isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", value)
    if not (is_whole or is_pair) or not all(1 <= side <= MAX_IMAGE_SIZE for side in sides(value)):
        return (
            f"is {brief(value)}: it must be a whole number from 1 to {MAX_IMAGE_SIZE}, or two as "
            "HEIGHTxWIDTH"
        )
    height, width = sides(value)
    if is_pair and height == width:
        return f"is {brief(value)}: of a square it is one number, {height}"
    return None
