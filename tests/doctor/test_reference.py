import jax
import numpy as np
import pytest

from vit_jax.doctor import reference

RNG = np.random.default_rng(0)
HEADS, WIDTH, CLASSES = 2, 8, 5


def normal(*shape):
    return RNG.normal(size=shape)


def norm():
    return {"scale": 1 + normal(WIDTH) / 10, "bias": normal(WIDTH)}


def layer():
    heads = (HEADS, WIDTH // HEADS)
    attention = {
        name: {"kernel": normal(WIDTH, *heads), "bias": normal(*heads)}
        for name in ("query", "key", "value")
    }
    return {
        "LayerNorm_0": norm(),
        "LayerNorm_2": norm(),
        "MultiHeadDotProductAttention_1": {
            **attention,
            "out": {"kernel": normal(*heads, WIDTH), "bias": normal(WIDTH)},
        },
        "MlpBlock_3": {
            "Dense_0": {"kernel": normal(WIDTH, 12), "bias": normal(12)},
            "Dense_1": {"kernel": normal(12, WIDTH), "bias": normal(WIDTH)},
        },
    }


PARAMS = {
    "cls": normal(1, 1, WIDTH),
    "embedding": {"kernel": normal(2, 2, 3, WIDTH), "bias": normal(WIDTH)},
    "Transformer": {
        "posembed_input": {"pos_embedding": normal(1, 7, WIDTH)},
        "encoderblock_0": layer(),
        "encoderblock_1": layer(),
        "encoder_norm": norm(),
    },
    "head": {"kernel": normal(WIDTH, CLASSES), "bias": normal(CLASSES)},
}
IMAGES, LABELS = normal(3, 4, 6, 3), np.array([0, 4, 4])
PATHS = [path for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]


@pytest.mark.parametrize("path", PATHS, ids=jax.tree_util.keystr)
def test_gradients_are_the_differences_of_the_loss(path):
    _, gradients = reference.loss(PARAMS, IMAGES, LABELS)
    gradient = dict(jax.tree_util.tree_leaves_with_path(gradients()))[path]
    direction = np.random.default_rng(1).normal(size=gradient.shape)

    def moved(step):
        params = jax.tree_util.tree_map_with_path(
            lambda p, x: x + step * direction if p == path else x, PARAMS
        )
        return reference.loss(params, IMAGES, LABELS)[0]

    step = 1e-5
    slope = (moved(step) - moved(-step)) / (2 * step)
    # The key's bias moves all logits of a row alike, which the softmax does not see.
    assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert abs(slope) > 1e-3 or "'key'" in jax.tree_util.keystr(path)


def test_every_parameter_has_a_gradient_of_its_shape():
    _, gradients = reference.loss(PARAMS, IMAGES, LABELS)
    shapes = jax.tree.map(np.shape, PARAMS)
    assert jax.tree.map(np.shape, gradients()) == shapes
