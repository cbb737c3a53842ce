"""A part of a data set, chosen at random once: by seed, whatever the order it is read in.

TensorFlow is imported where it is used: a config is checked by `parse_subset` without it.
"""

import dataclasses
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

    from vit_jax.data.source import Source


def parse_subset(text: str) -> Fraction | int:
    """The number of images in "5000", or the share of them in "10%", above 0 and at most 1.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"\s*(?:(\d+(?:_\d+)*)|(\d+(?:\.\d+)?)\s*%)\s*", text)
    subset = Fraction(match[2]) / 100 if match and match[2] else int(match[1]) if match else 0
    if not subset or (isinstance(subset, Fraction) and subset > 1):
        raise UserError(
            f"dataset.subset {text!r} is not understood: use a number of images, such as 5000, or "
            "a percentage of at most 100%, such as 10%"
        )
    return subset


def take_subset(source: "Source", subset: str, seed: int = 0) -> "Source":
    """Returns a source of exactly so many of the images of another, drawn without replacement.

    Every image has a random number, a function of `seed` and its id alone, and the smallest are
    taken: of two subsets of equal seed the smaller one lies within the larger.

    Args:
        source: to take from. If it has `ids`, no image is read to choose.
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
    numbers = _numbers(_all_ids(source), seed)
    smallest_first = np.unique(numbers)
    if len(smallest_first) != total:  # Of 63 bits: where two are equal, so are the ids.
        raise UserError(
            f"split {source.split!r} has images more than once: no subset of it can be taken"
        )
    last = smallest_first[count - 1]

    def examples(seed_of_order: "tf.Tensor | None" = None) -> "tf.data.Dataset":
        import tensorflow as tf

        dataset = source.examples(seed_of_order).filter(
            lambda example: _numbers(example["id"], seed) <= last
        )
        # Fails at the end of an epoch if the ids that were read are not those of `source.ids`.
        return dataset.apply(tf.data.experimental.assert_cardinality(count))

    return dataclasses.replace(
        source,
        split=f"{source.split}, {subset} of it",
        num_examples=count,
        num_bytes=source.num_bytes * count // total,
        ids=None,
        select=None,
        examples=source.select(numbers <= last) if source.select else examples,
    )


def _all_ids(source: "Source") -> list[Any]:
    if source.ids is not None:
        return source.ids()
    return [example["id"] for example in source.examples().as_numpy_iterator()]


def _numbers(ids: Any, seed: int) -> Any:
    """A random number from 0 below 2^63 - 1 of each id, of NumPy for a list of them."""
    import tensorflow as tf

    # The directories above split/class/file of a folder do not count: it may be moved.
    names = tf.strings.regex_replace(ids, r"^.*/([^/]*/[^/]*/[^/]*)$", r"\1")
    numbers = tf.strings.to_hash_bucket_strong(names, 2**63 - 1, key=[seed, 0])
    return numbers if tf.is_tensor(ids) else numbers.numpy()
