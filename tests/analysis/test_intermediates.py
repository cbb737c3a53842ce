import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.analysis import intermediates
from vit_jax.errors import UserError
from vit_jax.models import create_model

TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 24,
    "num_layers": 3,
    "mlp_dim": 40,
    "num_heads": 3,
    "num_classes": 5,
}
HYBRID = {**TINY, "architecture": "hybrid", "resnet_layers": (1, 1), "patch_size": 1}
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
WIDE_IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
MODELS = {
    "class token": (TINY, IMAGES, 7),
    "gap": ({**TINY, "classifier": "gap"}, IMAGES, 6),
    "map": ({**TINY, "classifier": "map"}, IMAGES, 6),
    "scan": ({**TINY, "scan_layers": True}, IMAGES, 7),
    "remat": ({**TINY, "remat": "dots"}, IMAGES, 7),
    "hybrid": (HYBRID, WIDE_IMAGES, 7),
    "relative": ({**TINY, "position_embedding": "relative"}, IMAGES, 7),
    "registers": ({**TINY, "num_registers": 3}, IMAGES, 10),
    "distillation": ({**TINY, "distillation_token": True}, IMAGES, 8),
    "2d, shared": (
        {**TINY, "position_embedding": "2d", "position_placement": "shared"},
        IMAGES,
        7,
    ),
}
attention_weights = jax.jit(intermediates.attention_weights, static_argnums=0)
layer_tokens = jax.jit(intermediates.layer_tokens, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def looked_into(model, params, images):
    """The logits, the attention weights and the tokens, from one program."""
    return (
        *intermediates.logits_and_attention(model, params, images),
        intermediates.layer_tokens(model, params, images),
    )


def random_params(model, images):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def numpy_layer(z, params):
    """Eqs. 2 and 3 in float64, one image and one head at a time: A, and z after the layer."""
    msa, mlp = params["MultiHeadDotProductAttention_1"], params["MlpBlock_3"]
    batch, tokens, hidden_size = z.shape
    num_heads = msa["query"]["kernel"].shape[1]
    weights = np.zeros((batch, num_heads, tokens, tokens))
    out = np.tile(msa["out"]["bias"].astype(np.float64), (batch, tokens, 1))
    x = layer_norm(z, params["LayerNorm_0"])
    for image in range(batch):
        for head in range(num_heads):
            q, k, v = (
                x[image] @ msa[name]["kernel"][:, head] + msa[name]["bias"][head]
                for name in ("query", "key", "value")
            )
            scores = np.exp(q @ k.T / np.sqrt(hidden_size / num_heads))
            weights[image, head] = scores / scores.sum(axis=1, keepdims=True)
            out[image] += weights[image, head] @ v @ msa["out"]["kernel"][head]
    z = z + out
    x = layer_norm(z, params["LayerNorm_2"]) @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # GELU, tanh form
    return weights, z + x @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]


def numpy_layers(params, images):
    batch, height, width, _ = images.shape
    patches = [
        images[:, y : y + 4, x : x + 4].reshape(batch, -1)
        for y in range(0, height, 4)
        for x in range(0, width, 4)
    ]
    embedding = params["embedding"]
    z = np.stack(patches, 1) @ embedding["kernel"].reshape(-1, 24) + embedding["bias"]
    if "cls" in params:
        z = np.concatenate([np.tile(params["cls"], (batch, 1, 1)), z], axis=1)
    encoder = params["Transformer"]
    z = z.astype(np.float64) + encoder["posembed_input"]["pos_embedding"]
    weights, tokens = [], []
    for layer in range(3):
        a, z = numpy_layer(z, encoder[f"encoderblock_{layer}"])
        weights.append(a)
        tokens.append(z)
    return np.stack(weights, 1), np.stack(tokens, 1)


@pytest.mark.parametrize("config", [TINY, *({**TINY, "classifier": x} for x in ("gap", "map"))])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_attention_and_tokens_of_every_layer_are_those_of_the_equations(config, scan_layers):
    model = create_model(config, scan_layers=scan_layers)
    params = random_params(model, IMAGES)
    weights, tokens = numpy_layers(params, IMAGES)
    _, found_weights, found_tokens = looked_into(model, params, IMAGES)
    np.testing.assert_allclose(found_weights, weights, atol=2e-5)
    np.testing.assert_allclose(found_tokens, tokens, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_rows_sum_to_one_layers_differ_and_the_logits_do_not(name):
    config, images, num_tokens = MODELS[name]
    model = create_model(config)
    params = random_params(model, images)
    logits, weights, tokens = map(np.asarray, looked_into(model, params, images))
    assert weights.shape == (2, 3, 3, num_tokens, num_tokens)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert tokens.shape == (2, 3, num_tokens, 24)
    for values in (weights, tokens):
        assert np.abs(values[:, 0] - values[:, 1]).max() > 1e-3
        assert np.abs(values[:, 1] - values[:, 2]).max() > 1e-3
    plain = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, HYBRID])
def test_the_last_layers_tokens_give_the_logits(config):
    model = create_model(config)
    params = random_params(model, WIDE_IMAGES)
    last = np.asarray(layer_tokens(model, params, WIDE_IMAGES))[:, -1, 0]
    y = layer_norm(last, params["Transformer"]["encoder_norm"])
    logits = y @ params["head"]["kernel"] + params["head"]["bias"]
    expected = jax.jit(model.apply)({"params": params}, WIDE_IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_sixteen_bits_come_out_as_float32():
    model = create_model(TINY, dtype="bfloat16")
    params = random_params(model, IMAGES)
    exact = attention_weights(create_model(TINY), params, IMAGES)
    weights = attention_weights(model, params, IMAGES)
    tokens = jax.eval_shape(functools.partial(layer_tokens, model), params, IMAGES)
    assert weights.dtype == tokens.dtype == jnp.float32
    assert 0 < np.abs(weights - exact).max() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_not_asking_leaves_no_trace_in_the_program(name, monkeypatch):
    config, images, _ = MODELS[name]

    def program(**asking):
        model = create_model(config, num_layers=1)
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        # The loss as well: a trace of it in the gradient is what would slow down training.
        loss = lambda p, x: jax.tree.reduce(  # noqa: E731
            jnp.add, jax.tree.map(jnp.sum, model.apply({"params": p}, x, **asking))
        )
        return jax.jit(jax.value_and_grad(loss)).lower(params, images).as_text()

    plain = program()
    assert program(mutable="intermediates") != plain
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **options: False)
    assert program() == plain


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("placement", ["stem", "shared"])
def test_position_embeddings_of_any_kind_can_be_had(scan_layers, placement):
    def embedding(kind):
        config = {**TINY, "position_embedding": kind, "position_placement": placement}
        model = create_model(config, scan_layers=scan_layers)
        params = random_params(model, IMAGES)
        found = intermediates.position_embedding(model, params, IMAGES)
        assert found.shape == (7, 24)
        return np.asarray(found), params["Transformer"].get("posembed_input")

    found, params = embedding("learned")
    np.testing.assert_array_equal(found, params["pos_embedding"][0])
    found, params = embedding("2d")
    for row, column in np.ndindex(2, 3):
        x, y = params["pos_embedding_x"][0, column], params["pos_embedding_y"][0, row]
        np.testing.assert_array_equal(found[1 + 3 * row + column], np.concatenate([x, y]))


@pytest.mark.parametrize(("kind", "placement"), [("none", "stem"), ("learned", "layers")])
def test_a_model_without_one_position_embedding_is_refused(kind, placement):
    model = create_model({**TINY, "position_embedding": kind, "position_placement": placement})
    with pytest.raises(UserError, match="has no position embedding that all its layers share"):
        intermediates.position_embedding(model, random_params(model, IMAGES), IMAGES)


def test_a_model_without_attention_is_refused():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x.mean(axis=(1, 2)))

    params = random_params(Linear(), IMAGES)
    for function in (attention_weights, layer_tokens):
        with pytest.raises(
            UserError, match="has no attention between all patches: give a Vision Transformer"
        ):
            function(Linear(), params, IMAGES)
