"""The representation of every image of a data set, computed once and kept in memory."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import ApplyFn, Batches, outputs
from vit_jax.sharding import Mesh

_ROWS = 4096  # that are in float64 at a time


def collect(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the model makes of all images of a data set, and their labels.

    No second copy of them is made on the way: they take 4 bytes a value.

    Args:
        apply_fn: from `metrics.make_apply_fn`, of a model without its head.
        params: of the model.
        batches: from `vit_jax.data.pipeline.eval_batches`.
        mesh: the devices.
        images: how many there are.

    Returns:
        float32 [images, features] and int32 [images, ...], in the order of the data.

    Raises:
        UserError: an image has no label or is broken, or a feature is not finite.
    """
    found = outputs(apply_fn, params, batches, mesh)
    first = next(found)
    features, labels = (np.empty((images, *x.shape[1:]), x.dtype) for x in first)
    end = 0
    for some_features, some_labels in itertools.chain([first], found):
        if not np.isfinite(some_features).all():
            raise UserError("the model's features are not finite: its weights are damaged")
        start, end = end, end + len(some_labels)
        features[start:end], labels[start:end] = some_features, some_labels
    return features[:end], labels[:end]


def with_mirror(apply_fn: ApplyFn) -> ApplyFn:
    """An `apply_fn` that gives the features of an image and of its mirror image, [batch, 2 D]."""

    def apply(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        values, labels, mask = apply_fn(params, batch)
        mirrored, *_ = apply_fn(params, {**batch, "image": jnp.flip(batch["image"], axis=2)})
        return jnp.concatenate([values, mirrored], axis=-1), labels, mask

    return apply


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation of each feature, float64 [features].

    The latter has 1e-5 added, as the reference of few-shot evaluation has it, so that a feature
    that is the same for all images gets no weight instead of an infinite one.

    Args:
        features: [images, features]; a part is in float64 at a time.
    """
    mean = _mean(features, lambda x: x)
    return mean, np.sqrt(_mean(features, lambda x: (x - mean) ** 2)) + 1e-5


def _mean(features: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), _ROWS):
        total += function(features[start : start + _ROWS].astype(np.float64)).sum(0)
    return total / len(features)
