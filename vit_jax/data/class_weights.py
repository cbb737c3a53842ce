"""Weights of classes that have few images, and of those that have many."""

import numpy as np

from vit_jax.data.source import Source
from vit_jax.errors import UserError

CLASS_WEIGHTS = ("", "balanced")

# Not in any source: where one image in a thousand has a label, it would else weigh as much as all
# others of a batch together.
MOST_OF_A_POSITIVE = 100.0


def balanced_weights(source: Source, num_classes: int) -> np.ndarray:
    """The weight of each class, from the labels of all images.

    Where an image has one label, n / (k * n_c) for n images of k classes, n_c of them of class c:
    `class_weight="balanced"` of scikit-learn, after King and Zeng (2001), "Logistic regression in
    rare events data". The mean over all images is 1. Where it has several, the weight of a label
    that is there, (n - n_c) / n_c: `pos_weight` as the documentation of PyTorch's BCEWithLogitsLoss
    chooses it; at most `MOST_OF_A_POSITIVE`, and at least its inverse.

    Args:
        source: the images to train on.
        num_classes: of the model, which may be more than those of the source.

    Returns:
        float32 [num_classes]; 1 for a class without an image.

    Raises:
        UserError: an image has no label (-1).
    """
    labels = source.labels()
    if (labels < 0).any():
        raise UserError(
            f"class_weights 'balanced' needs a label of every image, and some of {source.name} "
            "have none (-1): set --config.class_weights=''"
        )
    if source.multi_label:
        counts = labels.sum(0)
        weights = (len(labels) - counts) / np.maximum(counts, 1)
        weights = np.clip(weights, 1 / MOST_OF_A_POSITIVE, MOST_OF_A_POSITIVE)
    else:
        counts = np.bincount(labels, minlength=num_classes)
        weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    every = np.ones(num_classes, np.float32)
    every[: len(counts)] = np.where(counts, weights, 1)
    return every
