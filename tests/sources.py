"""Small data sets in memory, and what few-shot evaluation takes of them to learn from."""

import numpy as np
import tensorflow as tf

from vit_jax.data.source import Source
from vit_jax.data.support import take_support


def tiny_source(counts, size=16, seed=0):
    """A source of noisy images whose classes differ a little; `counts` images of each."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(7).integers(110, 140, (len(counts), size, size, 3))
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    pixels = np.clip(means[labels] + rng.normal(0, 90, (len(labels), size, size, 3)), 0, 255)
    pixels = pixels.astype(np.uint8)
    # Twice as wide: what is squashed to a square is `pixels` again.
    encoded = [tf.io.encode_png(np.repeat(image, 2, axis=1)).numpy() for image in pixels]

    def examples(seed=None):
        dataset = tf.data.Dataset.from_tensor_slices(
            {
                "image": encoded,
                "label": labels.astype(np.int64),
                "id": [str(index) for index in range(len(labels))],
            }
        )
        return dataset if seed is None else dataset.shuffle(len(labels), seed)

    names = tuple(f"class {index}" for index in range(len(counts)))
    source = Source("tiny", "train", names, len(labels), sum(map(len, encoded)), examples)
    return source, pixels, labels


def chosen(source, shots, seed):
    examples = list(take_support(source, shots, seed).examples())
    ids = [int(example["id"].numpy()) for example in examples]
    return ids, np.array([int(example["label"]) for example in examples])
