"""LayerScale, registers, SwiGLU and the distillation token: each against its paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoints.transfer import transfer
from vit_jax.errors import UserError
from vit_jax.models import create_model

SIZES = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 12,
    "num_layers": 2,
    "mlp_dim": 20,
    "num_heads": 3,
    "num_classes": 5,
}
PARTS = {"layer_scale": 0.1, "num_registers": 3, "mlp": "swiglu", "distillation_token": True}
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def attention(x, params):
    out = params["out"]["bias"]
    for head in range(3):
        q, k, v = (
            x @ params[name]["kernel"][:, head] + params[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        weights = np.exp(q @ k.swapaxes(1, 2) / 2)
        weights = weights / weights.sum(-1, keepdims=True)
        out = out + weights @ v @ params["out"]["kernel"][head]
    return out


def swiglu(x, params):
    gate, up = (x @ params[n]["kernel"] + params[n]["bias"] for n in ("Gate", "Dense_0"))
    return gate / (1 + np.exp(-gate)) * up @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def reference(params, images):
    """The two heads' logits in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    patches = np.stack(
        [images[:, y : y + 4, x : x + 4].reshape(2, -1) for y in (0, 4) for x in (0, 4)], axis=1
    )
    z = patches @ params["embedding"]["kernel"].reshape(-1, 12) + params["embedding"]["bias"]
    cls, dist, registers = (
        np.tile(params[name], (2, 1, 1)) for name in ("cls", "dist", "register")
    )
    encoder = params["Transformer"]
    z = np.concatenate([cls, dist, z], axis=1) + encoder["posembed_input"]["pos_embedding"]
    z = np.concatenate([z[:, :2], registers, z[:, 2:]], axis=1)
    for i in range(2):
        p = encoder[f"encoderblock_{i}"]
        x = attention(norm(z, p["LayerNorm_0"]), p["MultiHeadDotProductAttention_1"])
        z = z + p["LayerScale_0"]["scale"] * x
        z = z + p["LayerScale_1"]["scale"] * swiglu(norm(z, p["LayerNorm_2"]), p["MlpBlock_3"])
    z = norm(z, encoder["encoder_norm"])
    return [
        z[:, i] @ params[head]["kernel"] + params[head]["bias"]
        for i, head in enumerate(("head", "head_dist"))
    ]


def test_the_forward_pass_is_that_of_the_equations():
    model = create_model(SIZES | PARTS)
    params = random_params(model)
    expected = reference(params, IMAGES)
    heads = jax.jit(lambda p: model.apply({"params": p}, IMAGES, method="heads"))(params)
    np.testing.assert_allclose(heads, expected, rtol=1e-4, atol=1e-4)
    found = jax.jit(model.apply)({"params": params}, IMAGES)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-4, atol=1e-4)


def test_remat_and_scan_change_nothing():
    params = random_params(create_model(SIZES | PARTS))

    def gradients(**options):
        model = create_model(SIZES | PARTS | options)
        assert jax.tree.structure(params) == jax.tree.structure(random_params(model))
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, IMAGES) ** 2)))(params)

    expected = gradients()
    for options in ({"scan_layers": True, "remat": "block"}, {"remat": "nothing"}):
        for found, right in zip(
            *map(jax.tree.leaves, (gradients(**options), expected)), strict=True
        ):
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


def test_sixteen_bits_are_near_and_come_out_as_float32():
    model = create_model(SIZES | PARTS)
    params = random_params(model)
    expected = jax.jit(model.apply)({"params": params}, IMAGES)
    sixteen = create_model(SIZES | PARTS, dtype="bfloat16")
    found = jax.jit(sixteen.apply)({"params": params}, IMAGES)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_they_start_as_their_papers_say():
    init = jax.jit(create_model(SIZES | PARTS).init)
    params = init(jax.random.key(0), IMAGES)["params"]
    scales = params["Transformer"]["encoderblock_1"]
    np.testing.assert_array_equal(scales["LayerScale_0"]["scale"], np.full(12, np.float32(0.1)))
    np.testing.assert_array_equal(scales["LayerScale_1"]["scale"], np.full(12, np.float32(0.1)))
    assert not np.any(params["dist"]) and not np.any(params["head_dist"]["kernel"])
    assert 0 < np.abs(params["register"]).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_registers": 2, "classifier": "gap"}, "num_registers is 2, which goes with a class"),
        ({"distillation_token": True, "classifier": "map"}, "distillation_token is True, which go"),
        ({"distillation_token": True, "representation_size": 3}, "representation_size is 3, but"),
        ({"mlp": "relu"}, "model.mlp 'relu' is unknown: use gelu or swiglu"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        create_model(SIZES | options)


def test_one_head_is_all_that_other_models_have():
    model = create_model(SIZES)
    with pytest.raises(UserError, match="one head: set model.distillation_token"):
        model.apply({"params": random_params(model)}, IMAGES, method="heads")


def test_a_model_learns_from_a_teacher_with_weights_that_had_none():
    old, new = (create_model(SIZES | {"distillation_token": x}) for x in (False, True))
    weights, fresh = random_params(old), random_params(new)
    params, report = transfer(fresh, weights)
    positions = params["Transformer"]["posembed_input"]["pos_embedding"]
    before = weights["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(positions[:, [0, 2, 3, 4, 5]], before)
    fresh_positions = fresh["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(positions[:, 1], fresh_positions[:, 1])
    actions = {row.name: row.action for row in report}
    assert actions["dist"] == actions["head_dist/kernel"] == "new"
    # And back: what was for the teacher is dropped.
    params, report = transfer(weights, params)
    actions = {row.name: row.action for row in report}
    assert actions["dist"] == actions["head_dist/bias"] == "dropped"
    again = params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(again, before)
