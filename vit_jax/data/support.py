"""The images that few-shot evaluation learns from: so many of each class, chosen by seed."""

import dataclasses
from typing import Any

import tensorflow as tf

from vit_jax.data.source import Source

_SHUFFLE_LIMIT = 256 * 2**20  # bytes of encoded images to shuffle among


def take_support(source: Source, shots: int, seed: int) -> Source:
    """The first `shots` images of each class of `source`, in an order that the seed decides.

    The order is that of `source.examples(seed)`, shuffled once more among up to 256 MiB of encoded
    images; reading ends as soon as every class is full. So the images are a pure function of the
    seed, fewer shots are a subset of more, and of a large data set a small part is read. A class
    with fewer images gives all that it has.
    """
    num_classes = len(source.class_names)
    limit = min(num_classes * shots, source.num_examples)
    share = min(1.0, _SHUFFLE_LIMIT / max(source.num_bytes, 1))
    buffer = max(int(source.num_examples * share), 1)

    def count(seen: tf.Tensor, example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, Any]:
        label = example["label"]
        full = tf.reduce_all(tf.greater_equal(seen, shots))
        wanted = tf.less(tf.gather(seen, label), shots)
        seen_then = tf.tensor_scatter_nd_add(seen, [[label]], [1])
        return seen_then, {"example": example, "wanted": wanted, "full": full}

    def examples() -> tf.data.Dataset:
        order = tf.constant(seed, tf.int64)
        return (
            source.examples(order)
            .shuffle(buffer, order, reshuffle_each_iteration=False)
            .filter(lambda example: example["label"] >= 0)
            .scan(tf.zeros(num_classes, tf.int32), count)
            # Not take(limit): tf.data may prefetch before it, and read on for one more to the end.
            .take_while(lambda counted: not counted["full"])
            .filter(lambda counted: counted["wanted"])
            .map(lambda counted: counted["example"])
        )

    # An upper bound of the images: what is missing is padding.
    return dataclasses.replace(source, num_examples=limit, examples=examples)
