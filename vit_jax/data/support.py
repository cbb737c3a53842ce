"""The images that few-shot evaluation learns from: so many of each class, chosen by seed."""

import numpy as np

from vit_jax.data.source import Source


def take_support(source: Source, shots: int, seed: int) -> Source:
    """The first `shots` images of each class of `source`, in an order that the seed decides.

    Reading ends as soon as every class is full. So the images are a pure function of the seed,
    fewer shots are a subset of more, and of a large data set a small part is read. A class with
    fewer images gives all that it has.
    """
    missing = np.full(len(source.class_names), shots)
    chosen = []
    for index in np.random.default_rng(seed).permutation(source.num_examples):
        if not missing.any():
            break
        label = source[int(index)]["label"]
        if label >= 0 and missing[label]:
            missing[label] -= 1
            chosen.append(index)
    return source.select(np.array(chosen, int))
