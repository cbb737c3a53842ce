"""Some of the classes of a model, in another order."""

import dataclasses

import numpy as np
import pytest

from vit_jax.checkpoints.selection import select_classes
from vit_jax.models import create_model

from .small_model import MODEL
from .test_heads import RESNET, make


@pytest.mark.parametrize(
    "model", [MODEL, MODEL | {"distillation_token": True}, RESNET | {"num_classes": 3}]
)
@pytest.mark.parametrize("labels", [(2, 0), (2, 0, 1)])
def test_logits_and_names_are_those_of_the_chosen_classes(model, labels):
    pretrained = dataclasses.replace(make(model), class_names=("a", "b", "c"))
    chosen = select_classes(pretrained, labels)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    before, after = (
        create_model(x.model).apply({"params": x.params}, images) for x in (pretrained, chosen)
    )
    np.testing.assert_allclose(after, before[:, list(labels)], rtol=1e-5, atol=1e-5)
    assert chosen.class_names == tuple("abc"[i] for i in labels)
