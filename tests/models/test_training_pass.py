"""What a forward pass in training leaves out, against NumPy and timm that leave out the same."""

import flax.linen as nn
import jax
import numpy as np

from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.doctor import reference
from vit_jax.models import create_model
from vit_jax.models.dropout import Dropout
from vit_jax.models.encoder import StochasticDepth

TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 24,
    "num_layers": 3,
    "mlp_dim": 48,
    "num_heads": 3,
    "num_classes": 5,
}
# Dropout's rate is a multiple of 2^-16: what stays is divided by exactly 3/4.
RATES = {"dropout_rate": 0.25, "stochastic_depth": 0.4}
DROPPED = [0, 0.2, 0.4]  # Of the three layers.
IMAGES = np.random.default_rng(1).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)


def in_training(model, params):
    """The logits, and where each dropout and each stochastic depth let something through, in order.

    Those of dropout are [images, tokens, features], those of stochastic depth [images, 1, 1].
    """

    @jax.jit
    def apply(params, key):
        masks = []

        def record(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if isinstance(context.module, Dropout):
                masks.append(y != 0)
            elif isinstance(context.module, StochasticDepth):
                masks.append((y != 0).any((1, 2), keepdims=True))
            return y

        rngs = {"dropout": key}
        with nn.intercept_methods(record):
            logits = model.apply({"params": params}, IMAGES, train=True, rngs=rngs)
        return logits, masks

    logits, masks = jax.device_get(apply(params, jax.random.key(3)))
    assert len(masks) == 1 + 3 * 5
    shares = [mask.mean() for mask in masks if mask.shape[-1] > 1]
    np.testing.assert_allclose(shares, 0.75, atol=0.05)
    assert masks[2].all() and 0 < masks[-1].mean() < 1
    return logits, masks


def expected_logits(params, masks):
    """Eqs. 1 to 4, dropped from as by google-research/vision_transformer, models_vit.py.

    That is after adding the positions, after the attention's output, after GELU and after the MLP.
    Each residual branch is left out with a rate of its layer's own (Huang et al., 2016).
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    encoder, left = params["Transformer"], iter(masks)

    def drop(x):
        return np.where(next(left), x / 0.75, 0)

    def branch(x, rate):
        return x * next(left) / (1 - rate)

    grid = IMAGES.astype(np.float64).reshape(len(IMAGES), 4, 4, 4, 4, 3)
    x = np.einsum("nhywxc,yxcd->nhwd", grid, params["embedding"]["kernel"])
    x = x.reshape(len(IMAGES), 16, 24) + params["embedding"]["bias"]
    z = np.concatenate([np.repeat(params["cls"], len(IMAGES), axis=0), x], axis=1)
    z = drop(z + encoder["posembed_input"]["pos_embedding"])
    for i, rate in enumerate(DROPPED):
        p = encoder[f"encoderblock_{i}"]
        x, _ = reference.layer_norm(z, p["LayerNorm_0"])
        x, _ = reference.attention(x, p["MultiHeadDotProductAttention_1"])
        z = z + branch(drop(x), rate)
        x, _ = reference.layer_norm(z, p["LayerNorm_2"])
        x, _ = reference.dense(x, p["MlpBlock_3"]["Dense_0"])
        x = drop(reference.gelu(x)[0])
        x, _ = reference.dense(x, p["MlpBlock_3"]["Dense_1"])
        z = z + branch(drop(x), rate)
    assert not list(left)
    z, _ = reference.layer_norm(z, encoder["encoder_norm"])
    return z[:, 0] @ params["head"]["kernel"] + params["head"]["bias"]


def test_a_pass_is_that_of_numpy_with_the_same_left_out():
    model = create_model(TINY, **RATES, remat="nothing")
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    logits, masks = in_training(model, params)
    expected = expected_logits(params, masks)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_pass_is_that_of_timm_with_the_same_left_out(tmp_path, monkeypatch):
    from ..checkpoints import torch_models

    torch, rates = torch_models.torch, {"pos_drop_rate": 0.25, "proj_drop_rate": 0.25}
    module = torch_models.timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3,
        mlp_ratio=2, num_classes=5, drop_path_rate=0.4, **rates,
    )  # fmt: skip
    torch_models.randomize(module)
    torch_models.save_state(tmp_path / "a.safetensors", module.state_dict())
    ours = load_pretrained(tmp_path / "a.safetensors", num_heads=3)
    logits, masks = in_training(create_model(ours.model, **RATES, remat="nothing"), ours.params)
    # At a rate of 0, that of the first layer, timm draws nothing.
    left = iter([torch.tensor(x) for i, x in enumerate(masks) if i not in (2, 5)])

    def dropout(x, p=0.5, training=True, inplace=False):
        del inplace
        return torch.where(next(left), x / (1 - p), 0) if p and training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda x, p: x.copy_(next(left)))
    module.train()
    torch_models.assert_close(logits, torch_models.logits_of_torch(module, IMAGES))
    assert not list(left)
