"""A model that chooses among some of its classes."""

import dataclasses
from collections.abc import Sequence

from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.models import ARCHITECTURES
from vit_jax.models.vit import DISTILLATION_HEAD


def select_classes(pretrained: Pretrained, labels: Sequence[int]) -> Pretrained:
    """Returns the same model with some of its classes; logits of these are what they were.

    Args:
        pretrained: a model with a head.
        labels: of its classes, each once, in the order that they are to have.
    """
    model = {**pretrained.model, "num_classes": len(labels)}
    heads = (f"{ARCHITECTURES[pretrained.model['architecture']].head}/", f"{DISTILLATION_HEAD}/")
    params = {
        name: array[..., list(labels)] if name.startswith(heads) else array
        for name, array in flatten_dict(pretrained.params, sep="/").items()
    }
    names = pretrained.class_names
    return dataclasses.replace(
        pretrained,
        params=unflatten_dict(params, sep="/"),
        model=model,
        class_names=None if names is None else tuple(names[label] for label in labels),
    )
