import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.analysis.intermediates import attention_weights, layer_tokens
from vit_jax.checkpoints.pretrained import load_pretrained, resize
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.checkpoints.transfer import transfer
from vit_jax.errors import UserError
from vit_jax.models import create_model, describe, model_config
from vit_jax.models.axial import (
    AxialBlock,
    AxialUnit,
    AxisBlock,
    PositionSensitiveAttention,
)
from vit_jax.models.encoder import MultiHeadSelfAttention
from vit_jax.models.resnet import GroupNorm
from vit_jax.recipes import get_config
from vit_jax.train import train

ROWS, COLUMNS, WIDTH, HEADS = 2, 3, 24, 3
TINY = {
    "architecture": "axial_vit",
    "patch_size": 4,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "mlp_dim": 40,
    "num_heads": HEADS,
    "num_classes": 5,
}
TINY_RESNET = {"architecture": "axial_resnet", "resnet_layers": [1, 1], "num_classes": 5}
ONE_UNIT = TINY_RESNET | {"resnet_layers": [1]}
RNG = np.random.default_rng(1)
IMAGES = RNG.uniform(-1, 1, (2, 4 * ROWS, 4 * COLUMNS, 3)).astype(np.float32)
RESNET_IMAGES = RNG.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
MODELS = [
    pytest.param(TINY, IMAGES, id="vit"),
    pytest.param(TINY_RESNET, RESNET_IMAGES, id="resnet"),
]


def random_params(module, *args):
    """Every tensor random, biases and norms included."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32), shapes)


def apply(model, params, *args):
    return np.asarray(jax.jit(lambda params: model.apply({"params": params}, *args))(params))


def random(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def count(name):
    model = create_model(model_config(name), num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return sum(np.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(("name", "patch"), [("Axial-ViT-B/16", 16), ("Axial-ViT-B/32", 32)])
def test_parameters_of_axial_vit_are_those_of_twice_the_layers(name, patch):
    d, m = 768, 3072
    layer = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 2 * 2 * d
    ends = 3 * patch**2 * d + d + (224 // patch) ** 2 * d + 2 * d + d * 1000 + 1000
    assert count(name) == 2 * 12 * layer + ends


def test_parameters_of_axial_resnet_by_hand():
    total, channels, side = 7 * 7 * 3 * 64 + 2 * 64, 64, 56
    for stage, units in enumerate((3, 4, 6, 3)):
        features = 64 * 2**stage
        for unit in range(units):
            # Three 1 x 1 convolutions, each with a norm; then two attentions with two norms each.
            total += channels * features + 2 * features
            total += features * 4 * features + 2 * 4 * features
            total += (channels * 4 * features + 2 * 4 * features) if unit == 0 else 0
            offsets, per_offset = 2 * side - 1, 2 * features // 8
            total += 2 * (2 * features**2 + 2 * 2 * features + 2 * features + offsets * per_offset)
            if stage and unit == 0:
                side //= 2
            channels = 4 * features
    assert count("AxialResNet50") == total + 2048 * 1000 + 1000


def attention_reference(x, params, bias=0.0):
    """Attention of one sequence [tokens, D], token by token, float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    q, k, v = (
        np.einsum("td,dhe->the", x, p[name]["kernel"]) + p[name]["bias"]
        for name in ("query", "key", "value")
    )
    y = np.zeros(x.shape)
    for token in range(len(x)):
        for head in range(HEADS):
            logits = k[:, head] @ q[token, head] / np.sqrt(WIDTH / HEADS)
            if np.ndim(bias):  # Offsets' embeddings [2 * tokens - 1, heads, head_dim].
                offsets = token - np.arange(len(x)) + len(x) - 1
                logits += bias[offsets, head] @ q[token, head] / np.sqrt(WIDTH / HEADS)
            weights = np.exp(logits) / np.exp(logits).sum()
            y[token] += (weights @ v[:, head]) @ p["out"]["kernel"][head]
    return y + p["out"]["bias"]


def layer_norm(x, params):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed * params["scale"] + params["bias"]


def mlp(x, params):
    first, second = params["Dense_0"], params["Dense_1"]
    h = x @ first["kernel"] + first["bias"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return h @ second["kernel"] + second["bias"]


def block_reference(z, params):
    """Row attention + MLP, then column attention + MLP, of z [rows, columns, D]."""
    z = z.astype(np.float64)
    for along in ("row", "column"):
        p = params[along]
        x = layer_norm(z, p["LayerNorm_0"])
        attention = p["MultiHeadDotProductAttention_1"]
        bias = np.float64(attention["relative"]["rel_embedding"]) if "relative" in attention else 0
        y = np.zeros(z.shape)
        if along == "row":
            for row in range(z.shape[0]):
                y[row] = attention_reference(x[row], attention, bias)
        else:
            for column in range(z.shape[1]):
                y[:, column] = attention_reference(x[:, column], attention, bias)
        z = z + y
        z = z + mlp(layer_norm(z, p["LayerNorm_2"]), p["MlpBlock_3"])
    return z


def block(kind="none", rows=ROWS, columns=COLUMNS):
    return AxialBlock(describe(TINY, position_embedding=kind), (rows, columns))


@pytest.mark.parametrize("kind", ["none", "relative"])
def test_a_layer_is_row_attention_and_mlp_then_column_attention_and_mlp(kind):
    z = random(2, ROWS, COLUMNS, WIDTH)
    flat = z.reshape(2, -1, WIDTH)
    params = random_params(block(kind), flat, True)
    found = apply(block(kind), params, flat, True).reshape(z.shape)
    for image in range(2):
        expected = block_reference(z[image], params)
        np.testing.assert_allclose(found[image], expected, rtol=0, atol=2e-5)


def test_the_whole_model_is_the_layers_between_embedding_and_mean():
    model = create_model(TINY)
    params = random_params(model, IMAGES)
    patches = np.asarray(IMAGES).reshape(2, ROWS, 4, COLUMNS, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["embedding"]["kernel"].reshape(-1, WIDTH)
    z = patches.reshape(2, ROWS, COLUMNS, -1) @ kernel + params["embedding"]["bias"]
    encoder = params["Transformer"]
    z = z + encoder["posembed_input"]["pos_embedding"].reshape(ROWS, COLUMNS, WIDTH)
    expected = []
    for image in z:
        for i in range(2):
            image = block_reference(image, encoder[f"encoderblock_{i}"])
        y = layer_norm(image, encoder["encoder_norm"]).mean((0, 1))
        expected.append(y @ params["head"]["kernel"] + params["head"]["bias"])
    np.testing.assert_allclose(apply(model, params, IMAGES), expected, atol=1e-4)


def seen_from(function, shape, row, column):
    """Positions whose change changes the output [rows, columns] at one."""
    x = random(1, *shape)
    before, seen = function(x)[0, row, column], np.zeros(shape[:2], bool)
    for r, c in np.ndindex(*shape[:2]):
        changed = x.copy()
        changed[0, r, c] += np.linspace(-1, 1, shape[2])
        seen[r, c] = not np.allclose(before, function(changed)[0, row, column], atol=1e-6)
    return seen


@pytest.mark.parametrize("along", ["row", "column"])
def test_a_token_sees_its_own_row_or_column_only(along):
    module = AxisBlock(describe(TINY, position_embedding="none"), (3, 4), along=along)
    params = random_params(module, random(1, 12, WIDTH), True)

    @jax.jit
    def function(x):
        y = module.apply({"params": params}, x.reshape(1, 12, WIDTH), True)
        return y.reshape(x.shape)

    expected = np.zeros((3, 4), bool)
    expected[(1, slice(None)) if along == "row" else (slice(None), 2)] = True
    np.testing.assert_array_equal(seen_from(function, (3, 4, WIDTH), 1, 2), expected)


def test_row_then_column_sees_everything():
    module = block("none", 3, 4)
    params = random_params(module, random(1, 12, WIDTH), True)

    @jax.jit
    def function(x):
        y = module.apply({"params": params}, x.reshape(1, 12, WIDTH), True)
        return y.reshape(x.shape)

    assert seen_from(function, (3, 4, WIDTH), 1, 2).all()


def test_attention_of_many_sequences_is_that_of_each():
    module = MultiHeadSelfAttention(describe(TINY, position_embedding="relative"))
    x = random(2, 4, 5, WIDTH)
    params = random_params(module, x, True)
    call = jax.jit(lambda x: module.apply({"params": params}, x, True))
    found = call(x)
    for index in np.ndindex(2, 4):
        alone = call(x[index][None])[0]
        np.testing.assert_allclose(found[index], alone, rtol=0, atol=1e-6)


def group_norm(x, params, epsilon):
    """Of one sequence [tokens, channels], a group at a time."""
    y = np.zeros(x.shape)
    for channels in np.split(np.arange(x.shape[1]), 32):
        group = x[:, channels]
        y[:, channels] = (group - group.mean()) / np.sqrt(group.var() + epsilon)
    return y * params["scale"] + params["bias"]


def position_sensitive_reference(x, params, epsilon=1e-4):
    """Wang et al., Eq. 4, for one sequence [tokens, channels] with 8 heads, token by token."""
    tokens, channels = x.shape
    width = channels // 8
    qkv = group_norm(x @ np.float64(params["kernel"]), params["gn_qkv"], epsilon)
    r = np.float64(params["axial_embedding"][0])
    r_q, r_k, r_v = r[:, : width // 2], r[:, width // 2 : width], r[:, width:]
    y = np.zeros(x.shape)
    for head in range(8):
        part = qkv[:, head * 2 * width : (head + 1) * 2 * width]
        q, k, v = part[:, : width // 2], part[:, width // 2 : width], part[:, width:]
        for o in range(tokens):
            logits = np.zeros(tokens)
            for p in range(tokens):
                offset = p - o + tokens - 1
                logits[p] = q[o] @ k[p] + q[o] @ r_q[offset] + k[p] @ r_k[offset]
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            for p in range(tokens):
                value = v[p] + r_v[p - o + tokens - 1]
                y[o, head * width : (head + 1) * width] += weights[p] * value
    return group_norm(y, params["gn_out"], epsilon)


def test_position_sensitive_attention_is_its_equation():
    x = random(2, 3, 5, 64)
    module = PositionSensitiveAttention(describe(TINY_RESNET))
    params = random_params(module, x)
    found = apply(module, params, x)
    for index in np.ndindex(2, 3):
        expected = position_sensitive_reference(np.float64(x[index]), params)
        np.testing.assert_allclose(found[index], expected, rtol=0, atol=5e-5)


def unit_values(module, params, x):
    """What the modules of a module return, by their names."""
    _, state = module.apply(
        {"params": params}, x, capture_intermediates=True, mutable="intermediates"
    )
    return {
        name: value["__call__"][0]
        for name, value in state["intermediates"].items()
        if "__call__" in value
    }


@pytest.mark.parametrize("stride", [1, 2])
def test_a_unit_attends_along_height_then_width_and_then_averages(stride):
    x = random(2, 4, 6, 64)
    module = AxialUnit(describe(TINY_RESNET), 64, stride)
    params = random_params(module, x)
    captured = jax.jit(functools.partial(unit_values, module))(params, x)
    y = np.maximum(np.float64(captured["gn1"]), 0)
    for name in ("height", "width"):
        result = np.zeros(y.shape)
        for b, i in np.ndindex(2, y.shape[1] if name == "width" else y.shape[2]):
            line = (b, i) if name == "width" else (b, slice(None), i)
            result[line] = position_sensitive_reference(y[line], params[name])
        y = result
    pooled = np.zeros((2, 4 // stride, 6 // stride, 64))
    for r, c in np.ndindex(pooled.shape[1:3]):
        window = y[:, r * stride : (r + 1) * stride, c * stride : (c + 1) * stride]
        pooled[:, r, c] = window.mean((1, 2))
    kernel = np.float64(params["conv3"]["kernel"][0, 0])
    kernel = (kernel - kernel.mean(0)) / np.sqrt(kernel.var(0) + 1e-10)
    expected = np.maximum(pooled, 0) @ kernel
    np.testing.assert_allclose(captured["conv3"], expected, rtol=0, atol=5e-4)


def test_the_first_attention_of_a_unit_is_along_the_height_as_in_scenic():
    module = AxialUnit(describe(TINY_RESNET), 64)
    params = random_params(module, random(1, 3, 4, 64))

    def attended(x):
        """What each attention returns if x comes out of the norm before them, which sees all."""

        def instead(method, args, kwargs, context):
            return x if context.module.name == "gn1" else method(*args, **kwargs)

        with nn.intercept_methods(instead):
            return unit_values(module, params, x)

    first = seen_from(jax.jit(lambda x: attended(x)["height"].swapaxes(1, 2)), (3, 4, 64), 1, 2)
    second = seen_from(jax.jit(lambda x: attended(x)["width"]), (3, 4, 64), 1, 2)
    np.testing.assert_array_equal(first, np.arange(4) == np.full((3, 1), 2))
    assert second.all()


def test_kernels_of_axial_resnet_are_standardized_with_scenics_epsilon():
    # As small as the square root of 1e-10: 1e-5 added to the deviation, as in the hybrids, differs.
    def small(module, x):
        return jax.tree.map(lambda leaf: leaf * np.float32(1e-5), random_params(module, x))

    def standardized(kernel):
        kernel = np.float64(kernel) - np.float64(kernel).mean((0, 1, 2))
        return kernel / np.sqrt(np.square(kernel).mean((0, 1, 2)) + 1e-10)

    unit, x = AxialUnit(describe(TINY_RESNET), 64), random(2, 3, 4, 64)
    params = small(unit, x)
    found = jax.jit(functools.partial(unit_values, unit))(params, x)
    for name in ("conv1", "conv_proj"):
        expected = x @ standardized(params[name]["kernel"])[0, 0]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-4)

    model = create_model(TINY_RESNET, resnet_layers=())
    params = small(model, RESNET_IMAGES)
    root = jax.jit(functools.partial(unit_values, model))(params, RESNET_IMAGES)["conv_root"]
    kernel = standardized(params["conv_root"]["kernel"])
    # Of a stride of 2 and even sides TensorFlow's SAME pads 2 before and 3 after.
    padded = np.pad(np.float64(RESNET_IMAGES), ((0, 0), (2, 3), (2, 3), (0, 0)))
    for r, c in np.ndindex(8, 12):
        window = padded[:, 2 * r : 2 * r + 7, 2 * c : 2 * c + 7]
        expected = np.einsum("bijc,ijcd->bd", window, kernel)
        np.testing.assert_allclose(root[:, r, c], expected, rtol=0, atol=1e-4)


@functools.cache
def fresh(name):
    """Initial parameters of one of `MODELS`."""
    config, images = {"vit": (TINY, IMAGES), "resnet": (TINY_RESNET, RESNET_IMAGES)}[name]
    init = jax.jit(create_model(config).init)
    return jax.device_get(init(jax.random.key(0), images))["params"]


def test_axial_resnet_starts_as_scenics():
    tested = set()
    for path, x in flatten_dict(fresh("resnet"), sep="/").items():
        *_, module, kind = path.split("/")
        if module in ("height", "width"):  # Embeddings are 2 head_dim wide.
            scale = 1 / len(x) if kind == "kernel" else 2 / x.shape[-1]
        elif kind == "kernel" and module != "head":
            scale = np.prod(x.shape[:3]) ** -0.5  # flax.linen.Conv's default.
        else:
            ones = kind == "scale" and module != "gn3"
            np.testing.assert_array_equal(x, np.full(x.shape, float(ones)), path)
            continue
        tested.add((module, kind))
        assert x.std() == pytest.approx(scale, rel=5 / (2 * x.size) ** 0.5), path
        assert abs(x.mean()) < 5 * scale / x.size**0.5, path
    assert {("height", "kernel"), ("width", "axial_embedding"), ("conv_proj", "kernel")} <= tested


def test_axial_resnets_of_before_are_refused():
    params = random_params(create_model(TINY_RESNET), RESNET_IMAGES)
    old = {
        re.sub("/height/", "/row/", re.sub("/width/", "/column/", name)): x
        for name, x in flatten_dict(params, sep="/").items()
    }
    with pytest.raises(UserError, match="column/axial_embedding is not in the model") as error:
        transfer(params, unflatten_dict(old, sep="/"), keep_head=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("along", ["row", "column"])
def test_position_sensitive_attention_sees_one_line(along):
    module = PositionSensitiveAttention(describe(TINY_RESNET))
    x = random(1, 3, 4, 64) if along == "row" else random(1, 4, 3, 64)
    params = random_params(module, x)

    @jax.jit
    def function(x):
        x = x if along == "row" else x.swapaxes(1, 2)
        y = module.apply({"params": params}, x)
        return y if along == "row" else y.swapaxes(1, 2)

    expected = np.zeros((3, 4), bool)
    expected[(1, slice(None)) if along == "row" else (slice(None), 2)] = True
    np.testing.assert_array_equal(seen_from(function, (3, 4, 64), 1, 2), expected)


def test_a_norm_of_sequences_knows_each_alone():
    x = random(2, 3, 5, 64)
    norm = GroupNorm(1e-4, batch_axes=2)
    params = random_params(norm, x)
    found = apply(norm, params, x)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(
            found[index], group_norm(np.float64(x[index]), params, 1e-4), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(("config", "images"), MODELS)
def test_shapes_and_a_fresh_head_of_zeros(config, images):
    params = fresh("vit" if config is TINY else "resnet")
    np.testing.assert_array_equal(apply(create_model(config), params, images), np.zeros((2, 5)))
    trunk = {name: x for name, x in params.items() if name != "head"}
    features = apply(create_model(config, num_classes=0), trunk, images)
    assert features.shape == (2, WIDTH if config is TINY else 512)
    assert features.dtype == jnp.float32
    assert features.std() > 0


@pytest.mark.parametrize(("config", "images"), MODELS)
def test_remat_and_scan_change_nothing_and_gradients_are_finite(config, images):
    config = config if config is TINY else ONE_UNIT
    params = random_params(create_model(config), images)
    labels = np.array([1, 3])

    def loss(params, **options):
        logits = create_model(config, **options).apply({"params": params}, images, train=True)
        return -jax.nn.log_softmax(logits)[np.arange(2), labels].mean()

    expected = jax.device_get(jax.jit(jax.grad(loss))(params))
    for leaf in jax.tree.leaves(expected):
        assert np.isfinite(leaf).all()
    assert all(np.any(x != 0) for x in jax.tree.leaves(expected["head"]))
    variants = [{"remat": "dots"}]
    if config is TINY:
        variants += [{"scan_layers": True}, {"scan_layers": True, "remat": "block"}]
    for options in variants:
        found = jax.jit(jax.grad(functools.partial(loss, **options)))(params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
        )


@pytest.mark.parametrize("kind", ["learned", "none", "2d", "sincos2d", "relative"])
@pytest.mark.parametrize("placement", ["stem", "layers", "shared"])
def test_every_position_embedding_goes_with_it_scanned_or_not(kind, placement):
    if kind in ("none", "relative") and placement != "stem":
        pytest.skip("not a combination")
    options = {"position_embedding": kind, "position_placement": placement}
    model = create_model(TINY, **options)
    params = random_params(model, IMAGES)
    scanned = create_model(TINY, scan_layers=True, **options)
    np.testing.assert_allclose(
        apply(scanned, params, IMAGES), apply(model, params, IMAGES), atol=1e-5
    )
    names = flatten_dict(params, sep="/")
    added = [name for name in names if "posembed" in name]
    per_layer = 2 if kind == "2d" else 1
    assert len(added) == {
        ("learned", "layers"): 2 * per_layer,
        ("2d", "layers"): 2 * per_layer,
    }.get((kind, placement), per_layer if kind in ("learned", "2d") else 0)


def test_relative_offsets_are_as_many_as_the_axis_has():
    params = random_params(create_model(TINY, position_embedding="relative"), IMAGES)
    layer = params["Transformer"]["encoderblock_0"]
    for along, tokens in (("row", COLUMNS), ("column", ROWS)):
        embedding = layer[along]["MultiHeadDotProductAttention_1"]["relative"]["rel_embedding"]
        assert embedding.shape == (2 * tokens - 1, HEADS, WIDTH // HEADS)


@pytest.mark.parametrize(("config", "images"), MODELS)
def test_bfloat16_is_close_to_float32(config, images):
    params = random_params(create_model(config), images)
    expected = apply(create_model(config), params, images)
    found = apply(create_model(config, dtype="bfloat16"), params, images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.abs(expected).max())


def test_stochastic_depth_is_drawn_once_an_image_and_not_once_a_row():
    model = create_model(TINY | {"num_layers": 2}, stochastic_depth=1 - 1e-6)
    params = random_params(model, IMAGES)
    rngs = {"dropout": jax.random.key(0)}
    found = jax.jit(lambda p: model.apply({"params": p}, IMAGES, train=True, rngs=rngs))(params)
    encoder = {k: x for k, x in params["Transformer"].items() if k != "encoderblock_1"}
    one = create_model(TINY | {"num_layers": 1})
    expected = apply(one, params | {"Transformer": encoder}, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY | {"classifier": "token"}, "classifier 'token' needs a token that is in no row"),
        (TINY | {"patch_size": 5}, "image_size 8x12 is not a multiple of patch_size 5"),
        (TINY_RESNET, r"8x12 is not a multiple of total downsampling 8: use for example 8\b"),
        (TINY_RESNET | {"resnet_layers": [0]}, "resnet_layers"),
    ],
)
def test_a_mistake_is_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        create_model(config).init(jax.random.key(0), IMAGES)
    assert "\n" not in str(error.value)


def test_names_are_the_papers_and_others_are_unknown():
    assert model_config("Axial-ViT-B/32")["patch_size"] == 32
    assert model_config("AxialResNet50")["resnet_layers"] == (3, 4, 6, 3)
    for name in ("Axial-ViT-X/16", "AxialResNet51", "Axial-R50x1"):
        with pytest.raises(UserError, match="is unknown.*Axial-ViT-SIZE/PATCH, or AxialResNet50"):
            model_config(name)


def test_embeddings_fit_another_resolution_axis_by_axis():
    small, large = (
        random_params(create_model(TINY_RESNET), jnp.zeros((1, side, side, 3))) for side in (16, 32)
    )
    params, report = transfer(large, small)
    found = params["block1"]["unit1"]["height"]["axial_embedding"]
    old = small["block1"]["unit1"]["height"]["axial_embedding"]
    assert (old.shape, found.shape) == ((1, 7, 16), (1, 15, 16))
    for channel in range(16):
        expected = np.interp(np.linspace(0, 6, 15), np.arange(7), old[0, :, channel])
        np.testing.assert_allclose(found[0, :, channel], expected, atol=1e-6)
    np.testing.assert_allclose(found[0, 7], old[0, 3], atol=1e-6)  # No offset stays no offset.
    resized = {row.name for row in report if row.action == "resized"}
    assert len(resized) == 4 and all(name.endswith("axial_embedding") for name in resized)


def test_relative_offsets_of_another_resolution_are_refused():
    small, large = (
        random_params(create_model(TINY, position_embedding="relative"), images)
        for images in (jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 16, 16, 3)))
    )
    with pytest.raises(UserError, match="use the image size of the pretrained model"):
        transfer(large, small)


RUNS = [
    pytest.param("Axial-ViT-Ti/4", 8, {}, id="vit"),
    pytest.param("AxialResNet50", 8, {"model.resnet_layers": (1,)}, id="resnet"),
]


def axial_config(tiny_config, name, image_size, overrides, spec="pretrain,digits"):
    """The tiny run of conftest with another model."""
    config = tiny_config(**{"duration": "2 steps", "dataset.image_size": image_size})
    config.schedule.warmup = "1 step"
    sizes = {key: config.model[key] for key in ("hidden_size", "num_layers", "mlp_dim")}
    config.model = get_config(name, spec).model
    for key, value in {**sizes, "num_heads": 2, "representation_size": 16}.items():
        if key in config.model:
            config.model[key] = value
    config.model.dtype = "float32"
    config.update_from_flattened_dict(overrides)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size", "overrides"), RUNS)
def test_a_run_its_checkpoint_its_file_and_the_fine_tune_from_it(
    tiny_config, tmp_path, name, image_size, overrides
):
    config = axial_config(tiny_config, name, image_size, overrides)
    train(config, tmp_path / "run")
    pretrained = load_pretrained(tmp_path / "run")
    assert pretrained.preprocessing.image_size == image_size
    images = np.random.default_rng(0).uniform(-1, 1, (2, image_size, image_size, 3))
    images = images.astype(np.float32)
    logits = create_model(pretrained.model).apply({"params": pretrained.params}, images)
    assert logits.shape == (2, 10) and np.any(logits != 0)

    save_pretrained(pretrained, tmp_path / "weights.npz", "official")
    again = load_pretrained(tmp_path / "weights.npz")
    assert again.model == pretrained.model
    jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)
    (tmp_path / "weights.npz.json").unlink()
    from_shapes = load_pretrained(tmp_path / "weights.npz")
    assert from_shapes.preprocessing.image_size == image_size
    assert from_shapes.model["architecture"] == pretrained.model["architecture"]
    for layout in ("timm", "huggingface"):
        with pytest.raises(UserError, match="format"):
            save_pretrained(pretrained, tmp_path / layout, layout)

    assert resize(pretrained, 2 * image_size).preprocessing.image_size == 2 * image_size
    config.init_from = str(tmp_path / "run")
    config.dataset.image_size = 2 * image_size
    if "representation_size" in config.model:
        config.model.representation_size = 0
    train(config, tmp_path / "tuned")
    assert load_pretrained(tmp_path / "tuned").preprocessing.image_size == 2 * image_size


def sown(model, params, images):
    _, state = model.apply({"params": params}, images, mutable="intermediates")
    return state["intermediates"]["Transformer"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_attention_between_all_patches_is_that_along_rows_and_columns_in_turn(scan_layers):
    params = random_params(create_model(TINY), IMAGES)
    model = create_model(TINY, scan_layers=scan_layers)
    found = np.asarray(jax.jit(attention_weights, static_argnums=0)(model, params, IMAGES))
    assert found.shape == (2, 4, HEADS, ROWS * COLUMNS, ROWS * COLUMNS)
    layers = jax.jit(functools.partial(sown, create_model(TINY)))(params, IMAGES)
    for i, along in np.ndindex(2, 2):
        block = layers[f"encoderblock_{i}"][("row", "column")[along]]
        (weights,) = block["MultiHeadDotProductAttention_1"]["attention_weights"]
        expected = np.zeros((2, HEADS, ROWS, COLUMNS, ROWS, COLUMNS))
        for b, h, r, c in np.ndindex(2, HEADS, ROWS, COLUMNS):
            if along == 0:
                expected[b, h, r, c, r] = weights[b, r, h, c]
            else:
                expected[b, h, r, c, :, c] = weights[b, c, h, r]
        expected = expected.reshape(2, HEADS, ROWS * COLUMNS, ROWS * COLUMNS)
        np.testing.assert_allclose(found[:, 2 * i + along], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_tokens_after_every_pair_are_those_of_a_shallower_model():
    model = create_model(TINY)
    params = random_params(model, IMAGES)
    tokens = layer_tokens(model, params, IMAGES)
    assert tokens.shape == (2, 2, ROWS * COLUMNS, WIDTH)
    y = layer_norm(np.asarray(tokens[:, -1]), params["Transformer"]["encoder_norm"]).mean(1)
    expected = y @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(apply(model, params, IMAGES), expected, atol=1e-4)


def test_a_resnets_attention_is_not_shown():
    model = create_model(TINY_RESNET)
    params = random_params(model, RESNET_IMAGES)
    with pytest.raises(UserError, match="give a Vision Transformer or a hybrid"):
        attention_weights(model, params, RESNET_IMAGES)
