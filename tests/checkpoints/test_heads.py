"""A head that was learned from features, as a part of the model."""

import jax
import numpy as np
import pytest

from vit_jax.checkpoints.heads import replace_head
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params, load_pretrained
from vit_jax.checkpoints.save import write_official
from vit_jax.data.protocols import Preprocessing
from vit_jax.models import create_model

from .small_model import MODEL

RESNET = {
    "architecture": "resnet",
    "resnet_layers": [1],
    "width_factor": 1,
    "group_norm_epsilon": 1e-5,
}
MODELS = [
    MODEL,
    MODEL | {"num_classes": 0, "classifier": "gap"},
    MODEL | {"representation_size": 8, "classifier": "map"},
    RESNET | {"num_classes": 0},
    RESNET | {"num_classes": 3},
]


def make(model):
    """A model with random weights, a head among them if it has classes."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(model, 16)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    return Pretrained(params, model, Preprocessing(16), None, "sigmoid", "here")


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_features_times_the_kernel(tmp_path, model):
    pretrained = make(model)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    trunk = create_model(model).without_head()
    features = np.asarray(jax.jit(trunk.apply)({"params": pretrained.params}, images))
    kernel = rng.normal(size=(features.shape[1], 5)).astype(np.float32)
    bias = rng.normal(size=5).astype(np.float32)
    names = ("a", "b\n", "c", "ü", "e")

    write_official(replace_head(pretrained, kernel, bias, names), tmp_path)
    found = load_pretrained(tmp_path)
    logits = jax.jit(create_model(found.model).apply)({"params": found.params}, images)
    np.testing.assert_allclose(logits, features @ kernel + bias, rtol=1e-4, atol=1e-4)
    assert (found.class_names, found.loss) == (names, "softmax")
    assert found.preprocessing == pretrained.preprocessing
    expected = {**model, "num_classes": 5}
    assert {key: found.model[key] for key in expected} == expected
