"""Weights served by Flax itself, without an export."""

import json
from typing import TYPE_CHECKING

import jax
import numpy as np

from vit_jax.inference import VisionModel
from vit_jax.models import prediction_fields
from vit_jax.printable import printable
from vit_jax.serving.served import Served

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained


def from_weights(pretrained: "Pretrained", name: str, max_batch: int) -> Served:
    """Compiles a model for every batch size that it will be padded to, powers of two.

    Args:
        pretrained: the model.
        name: by which it was asked for. Of a path the last part is told, which clients may know.
        max_batch: the images that it runs at once, at most.

    Raises:
        UserError: it has no head or an untrained one.
    """
    name = printable(name.rstrip("/").rpartition("/")[2])
    model = VisionModel(pretrained, max_batch)
    shape = pretrained.preprocessing.image_shape
    size = 1
    while size < 2 * max_batch:
        outputs = model.logits(np.zeros((min(size, max_batch), *shape), np.float32))
        size *= 2
    return Served(
        name=name,
        output="logits",
        output_shape=outputs.shape[1:],
        preprocessing=pretrained.preprocessing,
        takes_pixels=False,
        takes_raw=False,
        class_names=pretrained.class_names,
        loss=pretrained.loss,
        largest=None,
        metadata={
            "architecture": pretrained.model["architecture"],
            "model": json.dumps(prediction_fields(pretrained.model)),
            "source": name,
        },
        facts={"runtime": f"JAX {jax.__version__} on {jax.default_backend()}", "sha256": {}},
        predict=model.logits,
    )
