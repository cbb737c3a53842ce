import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vit_jax.errors import UserError
from vit_jax.models import create_model, model_config
from vit_jax.models.rematerialization import POLICIES
from vit_jax.models.vit import AttentionPooling

LAYERS = 2
TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 24,
    "num_layers": LAYERS,
    "mlp_dim": 40,
    "num_heads": 3,
    "num_classes": 5,
}
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)


def random_params(model, images=IMAGES, scale=0.3):
    """Every tensor random, biases and norms included, so that a swapped pair cannot hide."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), shapes)


def apply(model, params):
    return np.asarray(jax.jit(model.apply)({"params": params}, IMAGES))


# Counts with a 1000-way head at 224 px: official checkpoints, as published.
COUNTS = [
    ("ViT-Ti/16", 224, 5_717_416),
    ("ViT-S/16", 224, 22_050_664),
    ("ViT-B/16", 224, 86_567_656),
    ("ViT-B/16", 384, 86_859_496),
    ("ViT-L/16", 224, 304_326_632),
    ("ViT-L/16", 384, 304_715_752),
    ("ViT-H/14", 224, 632_045_800),
    # The same, with P * P * 3 * D + (N + 1) * D changed for the patch size by hand.
    ("ViT-S/32", 224, 22_050_664 + (32**2 - 16**2) * 3 * 384 + (49 - 196) * 384),
    ("ViT-B/32", 224, 86_567_656 + (32**2 - 16**2) * 3 * 768 + (49 - 196) * 768),
    ("ViT-B/8", 224, 86_567_656 + (8**2 - 16**2) * 3 * 768 + (784 - 196) * 768),
    ("ViT-L/32", 224, 304_326_632 + (32**2 - 16**2) * 3 * 1024 + (49 - 196) * 1024),
]


# Those of two depths are traced layer by layer as well.
@pytest.mark.parametrize(
    ("name", "image_size", "count", "scan_layers"),
    [
        *((*row, True) for row in COUNTS),
        *((*row, False) for row in COUNTS if row[:2] in (("ViT-B/16", 224), ("ViT-L/16", 224))),
    ],
)
def test_parameter_counts_are_the_published_ones(name, image_size, count, scan_layers):
    model = create_model(model_config(name), num_classes=1000, scan_layers=scan_layers)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_parameter_tree_is_the_official_one():
    model = create_model(model_config("ViT-B/16"), num_classes=10, representation_size=768)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape
             for p, x in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    block = "Transformer/encoderblock_11/"
    expected = {
        "cls": (1, 1, 768),
        "embedding/kernel": (16, 16, 3, 768),
        "embedding/bias": (768,),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768),
        block + "LayerNorm_0/scale": (768,),
        block + "LayerNorm_2/bias": (768,),
        block + "MultiHeadDotProductAttention_1/query/kernel": (768, 12, 64),
        block + "MultiHeadDotProductAttention_1/key/bias": (12, 64),
        block + "MultiHeadDotProductAttention_1/value/kernel": (768, 12, 64),
        block + "MultiHeadDotProductAttention_1/out/kernel": (12, 64, 768),
        block + "MultiHeadDotProductAttention_1/out/bias": (768,),
        block + "MlpBlock_3/Dense_0/kernel": (768, 3072),
        block + "MlpBlock_3/Dense_1/kernel": (3072, 768),
        "Transformer/encoder_norm/scale": (768,),
        "pre_logits/kernel": (768, 768),
        "head/kernel": (768, 10),
        "head/bias": (10,),
    }
    assert {name: names.get(name) for name in expected} == expected
    assert len(names) == 1 + 2 + 1 + 12 * 16 + 2 + 2 + 2


def test_the_tree_of_attention_pooling_is_big_visions():
    model = create_model(model_config("ViT-B/16"), num_classes=10, classifier="map")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert "cls" not in params
    pooling = params["MAPHead_0"]
    assert jax.tree.map(lambda x: x.shape, pooling) == {
        "probe": (1, 1, 768),
        "MultiHeadDotProductAttention_0": {
            **{
                name: {"kernel": (768, 12, 64), "bias": (12, 64)}
                for name in ("query", "key", "value")
            },
            "out": {"kernel": (12, 64, 768), "bias": (768,)},
        },
        "LayerNorm_0": {"scale": (768,), "bias": (768,)},
        "MlpBlock_0": {
            "Dense_0": {"kernel": (768, 3072), "bias": (3072,)},
            "Dense_1": {"kernel": (3072, 768), "bias": (768,)},
        },
    }


def test_attention_pooling_has_no_dropout_and_is_drawn_as_xavier_says():
    model = create_model(model_config("ViT-Ti/16"), num_classes=1, dropout_rate=0.5)
    pooling, tokens = AttentionPooling(model.config), jnp.ones((1, 2, 192))
    variables = jax.device_get(jax.jit(pooling.init)(jax.random.key(0), tokens))
    jax.eval_shape(pooling.apply, variables, tokens)  # Dropout would ask for its RNG.
    drawn = variables["params"]
    attention = drawn["MultiHeadDotProductAttention_0"]
    for array, fans in (
        (drawn["probe"], 1 + 192),
        (attention["query"]["kernel"], 2 * 192),
        (attention["out"]["kernel"], 2 * 192),
    ):
        assert np.abs(array).max() == pytest.approx(np.sqrt(6 / fans), rel=0.02)


def reference(params, images, *, gelu, classifier):
    """Eqs. 1 to 4 and 5 to 8 in NumPy float64, one image, one patch, one head at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    encoder = params["Transformer"]

    def norm(x, p):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]

    def activation(x):
        if gelu == "erf":
            return x * 0.5 * (1 + erf(x / np.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def attention(x, p, queries=None):
        queries = x if queries is None else queries
        out = p["out"]["bias"].copy()
        for h in range(p["query"]["kernel"].shape[1]):
            q, k, v = (
                y @ p[n]["kernel"][:, h] + p[n]["bias"][h]
                for n, y in (("query", queries), ("key", x), ("value", x))
            )
            scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            out = out + scores / scores.sum(-1, keepdims=True) @ v @ p["out"]["kernel"][h]
        return out

    def mlp(x, p):
        x = activation(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]

    logits = []
    for image in np.asarray(images, np.float64):
        size = params["embedding"]["kernel"].shape[0]
        tokens = [params["cls"][0, 0]] if classifier == "token" else []
        for y in range(0, image.shape[0], size):
            for x in range(0, image.shape[1], size):
                patch = image[y : y + size, x : x + size]
                embedded = np.einsum("yxc,yxcd->d", patch, params["embedding"]["kernel"])
                tokens.append(embedded + params["embedding"]["bias"])
        z = np.stack(tokens) + encoder["posembed_input"]["pos_embedding"][0]
        for i in range(LAYERS):
            p = encoder[f"encoderblock_{i}"]
            z = z + attention(norm(z, p["LayerNorm_0"]), p["MultiHeadDotProductAttention_1"])
            z = z + mlp(norm(z, p["LayerNorm_2"]), p["MlpBlock_3"])
        z = norm(z, encoder["encoder_norm"])
        y = z[0] if classifier == "token" else z.mean(0)
        if classifier == "map":  # big_vision's models/vit.py
            p = params["MAPHead_0"]
            y = attention(z, p["MultiHeadDotProductAttention_0"], p["probe"][0])
            y = (y + mlp(norm(y, p["LayerNorm_0"]), p["MlpBlock_0"]))[0]
        if "pre_logits" in params:
            y = np.tanh(y @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"])
        logits.append(y @ params["head"]["kernel"] + params["head"]["bias"])
    return np.stack(logits)


# Heads of Appendix D.3: class token or global average pooling, MLP or linear.
@pytest.mark.parametrize(
    ("gelu", "classifier", "representation_size"),
    [
        ("tanh", "token", 16),
        ("erf", "token", 0),
        ("tanh", "gap", 0),
        ("erf", "gap", 16),
        ("tanh", "map", 0),
        ("erf", "map", 16),
    ],
)
def test_forward_pass_is_the_papers_equations(gelu, classifier, representation_size):
    model = create_model(
        TINY, gelu=gelu, classifier=classifier, representation_size=representation_size
    )
    params = random_params(model)
    logits = apply(model, params)
    expected = reference(params, IMAGES, gelu=gelu, classifier=classifier)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def value_and_gradients(model, params):
    def loss(params):
        return jnp.sum(model.apply({"params": params}, IMAGES) ** 2)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.fixture(scope="module")
def plain():
    """Parameters, and the value and the gradients of the model that keeps everything."""
    model = create_model(TINY)
    params = random_params(model)
    return params, *value_and_gradients(model, params)


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [("nothing", True), *((policy, policy != "everything") for policy in POLICIES[1:])],
)
def test_remat_and_scan_change_neither_tree_nor_values_nor_gradients(remat, scan_layers, plain):
    other = create_model(TINY, remat=remat, scan_layers=scan_layers)
    params, expected, expected_grads = plain
    assert jax.tree.structure(params) == jax.tree.structure(random_params(other))
    value, grads = value_and_gradients(other, params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * largest)


# Of a layer with 7 tokens, by their last axes: the hidden units of the MLP before and after GELU,
# what its heads have (q, k, v and the sum), and the attention weights.
@pytest.mark.parametrize(
    ("remat", "hidden", "heads", "weights"),
    [("nothing", 2, None, 1), ("dots", 1, 4, 0), ("block", 0, 0, 0), ("everything", 0, 0, 0)],
)
def test_remat_keeps_what_its_policy_says(remat, hidden, heads, weights):
    model = create_model(TINY, remat=remat)

    def residuals(variables, images):
        _, pullback = jax.vjp(model.apply, variables, images)
        return list({id(x): x for x in jax.tree.leaves(pullback)}.values())

    images = jax.ShapeDtypeStruct((5, 8, 12, 3), jnp.float32)  # A batch that is no other size.
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    kept = jax.eval_shape(residuals, variables, images)
    count = collections.Counter(x.shape[1:] for x in kept if x.shape[:1] == (5,))
    assert count[7, 40] == LAYERS * hidden
    assert heads is None or count[3, 7, 8] == LAYERS * heads  # Else as autodiff has it.
    assert count[3, 7, 7] == LAYERS * weights
    tokens = {"block": 2, "everything": 1}  # What a residual block, or layer, begins with.
    if remat in tokens:
        assert count[7, 24] <= LAYERS * tokens[remat] + 1  # And what the last norm takes.


def test_scanned_layers_start_different_from_each_other():
    model = create_model(TINY, scan_layers=True)
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]
    kernels = [params["Transformer"][f"encoderblock_{i}"]["MlpBlock_3"]["Dense_0"]["kernel"]
               for i in range(LAYERS)]  # fmt: skip
    assert not np.allclose(kernels[0], kernels[1])


def test_initialization_is_the_published_one():
    config = model_config("ViT-S/16") | {"num_layers": 1}
    model = create_model(config, num_classes=7, representation_size=384, head_bias_init=-10.0)
    images = np.zeros((1, 224, 224, 3), np.float32)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), images))["params"]
    block = params["Transformer"]["encoderblock_0"]
    attention = block["MultiHeadDotProductAttention_1"]
    assert not np.any(params["cls"])
    assert not np.any(params["head"]["kernel"])
    assert np.all(params["head"]["bias"] == -10.0)
    position = params["Transformer"]["posembed_input"]["pos_embedding"]
    assert np.std(position) == pytest.approx(0.02, rel=0.02)
    xavier = np.sqrt(6 / (384 + 384))
    for name in ("query", "key", "value", "out"):
        kernel = attention[name]["kernel"]
        assert np.abs(kernel).max() == pytest.approx(xavier, rel=1e-3)
        assert np.std(kernel) == pytest.approx(xavier / np.sqrt(3), rel=0.02)
        assert not np.any(attention[name]["bias"])
    mlp = block["MlpBlock_3"]
    assert np.abs(mlp["Dense_0"]["kernel"]).max() == pytest.approx(np.sqrt(6 / 1920), rel=1e-3)
    assert np.std(mlp["Dense_0"]["bias"]) == pytest.approx(1e-6, rel=0.1)


def test_zero_head_gives_the_bias_for_every_image():
    model = create_model(TINY, num_layers=1, head_bias_init=-10.0)
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(0), IMAGES)
    np.testing.assert_array_equal(logits, np.full((2, 5), -10.0))


def test_no_classes_gives_the_representation():
    model = create_model(TINY, num_classes=0)
    features, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), IMAGES)
    assert features.shape == (2, 24)


def active_dropouts(**rates):
    """The path of every dropout with a rate, and the width of what it drops from."""
    model = create_model(TINY, **rates)
    params, found = {"params": random_params(model)}, []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.module.rate:
            found.append(("/".join(context.module.path[1:]), args[0].shape[-1]))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda key: model.apply(params, IMAGES, train=True, rngs={"dropout": key}),
            jax.random.key(0),
        )
    return found


def test_dropout_is_where_the_paper_has_it():
    expected = [("Dropout_0", 24)]  # After adding the position embeddings.
    for i in range(LAYERS):
        expected += [
            (f"encoderblock_{i}/Dropout_0", 24),  # After the attention's output projection.
            (f"encoderblock_{i}/MlpBlock_3/Dropout_0", 40),
            (f"encoderblock_{i}/MlpBlock_3/Dropout_1", 24),
        ]
    assert active_dropouts(dropout_rate=0.1) == expected
    assert active_dropouts(attention_dropout_rate=0.1) == [
        (f"encoderblock_{i}/MultiHeadDotProductAttention_1/Dropout_0", 7) for i in range(LAYERS)
    ]
    assert active_dropouts() == []


@pytest.mark.parametrize("place", ["activation", "dense"])
def test_the_first_dropout_of_the_mlp_stands_where_it_is_told(place):
    model = create_model(TINY, dropout_rate=0.1, dropout_after=place, remat="nothing")
    found = {}

    def record(call, args, kwargs, context):
        if context.module.path[-2:-1] == ("MlpBlock_3",):
            found.setdefault(context.module.name, (args[0], y := call(*args, **kwargs)))
            return y
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, IMAGES, train=True)
    (_, hidden), (dropped, kept) = found["Dense_0"], found["Dropout_0"]
    second = found["Dense_1"][0]
    if place == "dense":
        np.testing.assert_array_equal(dropped, hidden)
        np.testing.assert_array_equal(second, nn.gelu(kept))
    else:
        np.testing.assert_array_equal(dropped, nn.gelu(hidden))
        np.testing.assert_array_equal(second, kept)


def test_dropout_is_off_unless_training():
    model = create_model(TINY, dropout_rate=0.5, attention_dropout_rate=0.5)
    params = random_params(model)
    np.testing.assert_array_equal(apply(model, params), apply(create_model(TINY), params))


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    model, exact = create_model(TINY, dtype="bfloat16"), create_model(TINY)
    params = random_params(model)
    fresh = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    capture = jax.jit(lambda p: model.apply({"params": p}, IMAGES, capture_intermediates=True))
    logits, state = capture(params)
    logits = np.asarray(logits)
    layer = state["intermediates"]["Transformer"]["encoderblock_0"]["__call__"][0]
    assert layer.dtype == jnp.bfloat16
    expected = apply(exact, params)
    assert logits.dtype == np.float32
    difference = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 0 < difference < 0.05


def test_attention_weights_can_be_had_and_sum_to_one():
    model = create_model(TINY)
    params = random_params(model)
    asked = jax.jit(lambda p: model.apply({"params": p}, IMAGES, mutable="intermediates"))
    _, state = asked(params)
    block = state["intermediates"]["Transformer"]["encoderblock_1"]
    (weights,) = block["MultiHeadDotProductAttention_1"]["attention_weights"]
    assert weights.shape == (2, 3, 7, 7)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "image_size 8x12 is not a multiple of patch_size 5"),
        ({"num_heads": 5}, "hidden_size 24 is not a multiple of num_heads 5"),
        ({"classifier": "cls"}, "classifier 'cls' is unknown: use token, gap, map"),
        ({"gelu": "exact"}, "gelu 'exact' is unknown: use tanh or erf"),
    ],
)
def test_impossible_models_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        create_model(TINY, **options).init(jax.random.key(0), IMAGES)
    assert "\n" not in str(error.value)


def test_vit_b_of_figure_4_is_half_as_wide_as_base():
    base, half = model_config("ViT-B/32"), model_config("ViT-b/32")
    halved = {"hidden_size", "mlp_dim", "num_heads"}
    assert half == {key: x // 2 if key in halved else x for key, x in base.items()}


def test_any_shape_of_appendix_d2_has_a_name():
    assert model_config("ViT-8-1024-2048/32") == {
        "architecture": "vit",
        "patch_size": 32,
        "hidden_size": 1024,
        "num_layers": 8,
        "mlp_dim": 2048,
        "num_heads": 16,
    }
    assert model_config("ViT-24-1024-4096/16") == model_config("ViT-L/16")
    with pytest.raises(UserError, match="has a width that is not a multiple of 64"):
        model_config("ViT-8-1000-2048/32")


@pytest.mark.parametrize(
    "name", ["ViT-X/16", "ViT-B", "ViT-B/0", "B/16", "", "ViT-8-1024/32", "ViT-0-64-64/32"]
)
def test_unknown_model_names_are_refused(name):
    with pytest.raises(UserError, match="is unknown: use ViT-SIZE/PATCH"):
        model_config(name)


def test_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="model.dtype 'float16' is unknown"):
        create_model(TINY, dtype="float16")
