"""Features of every patch, against results that Flax captures and LayerNorm in NumPy."""

import jax
import numpy as np
import pytest

from vit_jax.analysis.intermediates import layer_tokens
from vit_jax.errors import UserError
from vit_jax.models import create_model, describe
from vit_jax.models.dense import check_dense, dense_features, prefix_names, whole_patches

MODEL = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 12,
    "num_layers": 2,
    "mlp_dim": 16,
    "num_heads": 3,
    "num_classes": 0,
    "num_registers": 2,
    "distillation_token": True,
}


def test_tokens_are_those_of_the_layers_and_of_the_last_norm():
    rng = np.random.default_rng(0)
    model = create_model(MODEL, remat="nothing")
    images = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    # What is no whole patch is not looked at.
    larger = np.pad(images, ((0, 0), (0, 3), (0, 1), (0, 0)), constant_values=9)
    compute = jax.jit(lambda *given: dense_features(model, *given, layers=(2, 1)))
    pooled, tokens, (second, first) = compute(params, larger)

    expected = np.asarray(layer_tokens(model, params, images))
    np.testing.assert_allclose(np.stack([first, second], axis=1), expected, atol=1e-5)
    z, norm = expected[:, 1], params["Transformer"]["encoder_norm"]
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(tokens, z * norm["scale"] + norm["bias"], atol=1e-5)
    np.testing.assert_allclose(pooled, np.asarray(tokens)[:, :2].mean(1), atol=1e-6)
    names = prefix_names(model.config)
    assert names == ("class", "distillation", "register_1", "register_2")
    assert tokens.shape == (2, len(names) + 2 * 3, 12)


def test_what_has_no_patches_or_no_such_layer_is_refused():
    with pytest.raises(UserError, match="layer 3 does not exist: name one from 1 to 2"):
        check_dense(describe(MODEL), [1, 3])
    for layer in (True, 1.0):
        with pytest.raises(UserError, match=f"layer {layer} does not exist"):
            check_dense(describe(MODEL), [layer])
    with pytest.raises(UserError, match="ResNet has no tokens"):
        check_dense(describe({"architecture": "resnet", "resnet_layers": (1,), "num_classes": 5}))
    with pytest.raises(UserError, match="image_size 3x8 is less than a patch: use 4 or more"):
        whole_patches(describe(MODEL), 3, 8)
