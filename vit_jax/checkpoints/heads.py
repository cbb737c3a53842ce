"""A linear head for a trunk: what was learned from its features becomes part of the model."""

from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.pretrained import Pretrained, abstract_params
from vit_jax.checkpoints.transfer import transfer


def replace_head(
    pretrained: Pretrained,
    kernel: np.ndarray,
    bias: np.ndarray,
    class_names: Sequence[str],
    multi_label: bool = False,
) -> Pretrained:
    """Returns a model with the same trunk whose logits are features @ kernel + bias.

    Args:
        pretrained: the model, with a head or without; all but the head stays, also a hidden layer
            before it.
        kernel: float32 [features, classes], for what `models.base.Model.without_head` gives.
        bias: float32 [classes].
        class_names: by column of the kernel.
        multi_label: whether the head predicts any number of classes of an image.
    """
    model = {**pretrained.model, "num_classes": len(class_names)}
    view = pretrained.preprocessing
    shapes = abstract_params(model, view.image_size, view.channels)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params, report = transfer(zeros, pretrained.params)
    flat = flatten_dict(params, sep="/")
    for row in report:
        # More than one where a model averages the logits of several heads.
        if row.action == "new":
            values = kernel if row.name.endswith("/kernel") else bias
            flat[row.name] = np.float32(values).reshape(row.shape)
    return Pretrained(
        unflatten_dict(flat, sep="/"),
        model,
        pretrained.preprocessing,
        tuple(class_names),
        "sigmoid" if multi_label else "softmax",
        pretrained.source,
        multi_label=multi_label,
    )
