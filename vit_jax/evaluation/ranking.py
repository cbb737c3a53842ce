"""The most probable classes of an image, of its logits or of probabilities. No JAX."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data import imagenet

# The classes that are shown of an image unless another number is asked for.
TOP_K = 5


def top(
    logits: np.ndarray, class_names: Sequence[str] | None, loss: str | None, topk: int
) -> list[dict[str, Any]]:
    """The most probable classes of one image, the first one first.

    Args:
        logits: [num_classes].
        class_names: one per class, or None if nobody knows them; labels are then None. WordNet ids
            of ImageNet's classes become their names.
        loss: "softmax", or "sigmoid" for probabilities each on its own, that need not sum to 1;
            None: `logits` are probabilities.
        topk: how many; all if there are fewer.

    Returns:
        `index`, `label` and `probability` of each.
    """
    logits = logits.astype(np.float64)
    if loss is None:
        probabilities = logits
    elif loss == "sigmoid":
        probabilities = np.exp(-np.logaddexp(0, -logits))
    else:
        probabilities = np.exp(logits - np.logaddexp.reduce(logits))
    return [
        {
            "index": int(index),
            "label": None if class_names is None else imagenet.readable(class_names[index]),
            "probability": float(probabilities[index]),
        }
        for index in np.argsort(-logits, kind="stable")[:topk]
    ]
