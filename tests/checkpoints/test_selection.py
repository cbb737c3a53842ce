"""Some of the classes of a model, in another order."""

import dataclasses

import jax
import numpy as np
import pytest

from vit_jax.checkpoints.selection import select_classes
from vit_jax.models import create_model

from .small_model import MODEL
from .test_heads import RESNET, make


@pytest.mark.parametrize(
    "model", [MODEL, MODEL | {"distillation_token": True}, RESNET | {"num_classes": 3}]
)
def test_logits_and_names_are_those_of_the_chosen_classes(model):
    pretrained = dataclasses.replace(make(model), class_names=("a", "b", "c"))
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)

    def logits(x):
        return np.asarray(jax.jit(create_model(x.model).apply)({"params": x.params}, images))

    before = logits(pretrained)
    for labels in ((2, 0), (2, 0, 1)):
        chosen = select_classes(pretrained, labels)
        np.testing.assert_allclose(logits(chosen), before[:, labels], rtol=1e-5, atol=1e-5)
        assert chosen.class_names == tuple("abc"[i] for i in labels)
