"""A part of a data set, chosen at random once: by seed, whatever the order it is read in."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from vit_jax.data.source import Source
from vit_jax.errors import UserError, brief


def parse_subset(text: str) -> Fraction | int:
    """The number of images in "5000", or the share of them in "10%", above 0 and at most 1.

    Raises:
        UserError: it is neither.
    """
    # Python reads no number of thousands of digits, and no share is that small.
    form = r"\s*(?:(\d+(?:_\d+)*)|(\d+(?:\.\d+)?)\s*%)\s*"
    match = re.fullmatch(form, text, re.ASCII) if len(text) <= 40 else None
    subset = Fraction(match[2]) / 100 if match and match[2] else int(match[1]) if match else 0
    if not subset or (isinstance(subset, Fraction) and subset > 1):
        raise UserError(
            f"dataset.subset {brief(text)} is not understood: use a number of images, such as "
            "5000, or a percentage of at most 100%, such as 10%"
        )
    return subset


def take_subset(source: Source, subset: str, seed: int = 0) -> Source:
    """Returns a source of exactly so many of the images of another, drawn without replacement.

    Every image has a random number, a function of `seed` and its id alone, and the smallest are
    taken: of two subsets of equal seed the smaller one lies within the larger.

    Args:
        source: to take from. No image is read to choose.
        subset: how many, "5000", or which share, "10%"; "" for all there are.
        seed: of the choice, not negative.

    Raises:
        UserError: `subset` is malformed, more than there is, or no image at all.
    """
    if not subset:
        return source
    wanted = parse_subset(subset)
    total = source.num_examples
    count = wanted if isinstance(wanted, int) else round(wanted * total)
    if not 1 <= count <= total:
        raise UserError(
            f"dataset.subset {subset!r} is {count:,} of the {total:,} images of {source.split}: "
            "it must be at least one, and no more than there are"
        )
    numbers = _numbers(source.ids(), source.root, seed)
    smallest_first = np.unique(numbers)
    if len(smallest_first) != total:  # Of 64 bits: where two are equal, so are the ids.
        raise UserError(
            f"split {source.split!r} has images more than once: no subset of it can be taken"
        )
    chosen = np.flatnonzero(numbers <= smallest_first[count - 1])
    return dataclasses.replace(source.select(chosen), split=f"{source.split}, {subset} of it")


def _numbers(ids: Sequence[str], root: str, seed: int) -> np.ndarray:
    """A random number of 64 bits of each id; those of files below a root are relative to it."""
    key = seed.to_bytes(8, "little")

    def digest(name: str) -> bytes:
        # The directories above do not count: what is in them may be moved.
        tail = name.removeprefix(f"{root}/") if root else "/".join(name.rsplit("/", 3)[-3:])
        encoded = tail.encode(errors="surrogateescape")  # A name may have bytes that are no text.
        return hashlib.blake2b(encoded, digest_size=8, key=key).digest()

    return np.frombuffer(b"".join(map(digest, ids)), np.uint64)
