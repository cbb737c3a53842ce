"""Evaluation: functions over parameters and batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from vit_jax.sharding import Mesh, to_devices


def evaluate(
    eval_step: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, float]:
    """Accuracy and mean loss over a data set, every image counted exactly once.

    Args:
        eval_step: jitted `vit_jax.steps.eval_step` with its model and loss.
        params: of the model.
        batches: padded batches with their mask, from `vit_jax.data.pipeline.eval_batches`.
        mesh: the devices.

    Returns:
        "accuracy" in [0, 1], "loss", and "examples", the number of images.
    """
    loss, correct, count = 0.0, 0, 0
    for batch in to_devices(batches, mesh):
        sums = jax.device_get(eval_step(params, batch))
        loss += float(sums["loss"])
        correct += int(sums["correct"])
        count += int(sums["count"])
    return {"accuracy": correct / count, "loss": loss / count, "examples": count}
