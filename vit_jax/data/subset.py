"""A part of a data set, chosen at random once: by seed, whatever the order it is read in."""

import dataclasses

import numpy as np
import tensorflow as tf

from vit_jax.config import parse_subset
from vit_jax.data.datasets import Source
from vit_jax.errors import UserError


def take_subset(source: Source, subset: str, seed: int = 0) -> Source:
    """Returns a source of exactly so many of the images of another, drawn without replacement.

    Every image has a random number, a function of `seed` and its id alone, and the smallest are
    taken: of two subsets of equal seed the smaller one lies within the larger.

    Args:
        source: to take from. If it tells its ids, no image is read to choose.
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

    def records(seed_of_order=None):
        dataset = source.records(seed_of_order).filter(
            lambda record: _numbers(record["id"], seed) <= last
        )
        # Were an id not what was foretold, this would say so at the end of an epoch.
        return dataset.apply(tf.data.experimental.assert_cardinality(count))

    return dataclasses.replace(
        source,
        split=f"{source.split}, {subset} of it",
        num_examples=count,
        num_bytes=source.num_bytes * count // total,
        ids=None,
        select=None,
        records=source.select(numbers <= last) if source.select else records,
    )


def _all_ids(source):
    if source.ids is not None:
        return source.ids()
    return [record["id"] for record in source.records().as_numpy_iterator()]


def _numbers(ids, seed):
    """A random number from 0 below 2^63 - 1 of each id, of NumPy for a list of them."""
    # The directories above split/class/file of a folder do not count: it may be moved.
    names = tf.strings.regex_replace(ids, r"^.*/([^/]*/[^/]*/[^/]*)$", r"\1")
    numbers = tf.strings.to_hash_bucket_strong(names, 2**63 - 1, key=[seed, 0])
    return numbers if tf.is_tensor(ids) else numbers.numpy()
