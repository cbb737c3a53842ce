"""A model that chooses among some of its classes."""

import dataclasses
from collections.abc import Sequence

from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.pretrained import Pretrained, abstract_params


def select_classes(pretrained: Pretrained, labels: Sequence[int]) -> Pretrained:
    """Returns the same model with some of its classes; logits of these are what they were.

    Args:
        pretrained: a model with a head.
        labels: of its classes, each once, in the order that they are to have.
    """
    model = {**pretrained.model, "num_classes": len(labels)}
    shapes = flatten_dict(abstract_params(model, pretrained.preprocessing.image_size), sep="/")
    params = {
        name: array if array.shape == shapes[name].shape else array[..., list(labels)]
        for name, array in flatten_dict(pretrained.params, sep="/").items()
    }
    names = pretrained.class_names
    return dataclasses.replace(
        pretrained,
        params=unflatten_dict(params, sep="/"),
        model=model,
        class_names=None if names is None else tuple(names[label] for label in labels),
    )
