"""The ResNet (BiT); the hybrids' is in test_resnet.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import bit, create_model, describe, model_config, resnet
from vit_jax.state import init_train_state
from vit_jax.steps import classification, train_step

PEERS = "needs the peers extra: pip install -e '.[peers]'"
TINY = {"architecture": "resnet", "resnet_layers": [1, 1], "num_classes": 5}
ONE_UNIT = TINY | {"resnet_layers": [1]}
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 16, 19, 3)).astype(np.float32)

# With a 1000-way head; of R50x1, R101x1, R152x2 and R152x4 as timm publishes them.
COUNTS = {
    "R50x1": 25_549_352,
    "R50x2": 97_988_712,
    "R101x1": 44_541_480,
    "R152x1": 60_185_128,
    "R152x2": 236_335_208,
    "R152x4": 936_533_224,
    "R200x3": 568_633_000,
}


def abstract(config, images, **options):
    model = create_model(config, **options)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def random_like(tree):
    """Every tensor random, biases and norms included, so that a swapped pair cannot hide."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(0.3, 1, x.shape).astype(np.float32), tree)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def counted_by_hand(name):
    """Parameters of a ResNet v2 from its definition, a unit at a time."""
    depth, width = re.fullmatch(r"(R\d+)x(\d)", name).groups()
    units = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3), "R152": (3, 8, 36, 3),
             "R200": (3, 24, 36, 3)}[depth]  # fmt: skip
    channels = 64 * int(width)
    total, features = 7 * 7 * 3 * channels, channels
    for n in units:
        for unit in range(n):
            total += 2 * (channels + features + features)  # Three norms.
            total += channels * features + 9 * features**2 + features * 4 * features
            total += channels * 4 * features if unit == 0 else 0
            channels = 4 * features
        features *= 2
    return total + 2 * channels + channels * 1000 + 1000


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = abstract(model_config(name), images, num_classes=1000)
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == COUNTS[name] == counted_by_hand(name)


@pytest.mark.parametrize("name", ["R50x1", "R101x1", "R152x2", "R152x4"])
def test_parameter_counts_are_those_of_timm(name):
    timm = pytest.importorskip("timm", reason=PEERS, exc_type=ImportError)
    peer = f"resnetv2_{name.removeprefix('R')}_bit"
    peer = timm.create_model(peer, num_classes=1000, device="meta")
    assert sum(x.numel() for x in peer.parameters()) == COUNTS[name]


def test_parameter_tree_is_that_of_bits_checkpoints():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = abstract(model_config("R50x2"), images, num_classes=10)
    shapes = {name: x.shape for name, x in flatten_dict(params, sep="/").items()}
    unit = "resnet/block2/unit01"
    expected = {
        "resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 128),
        f"{unit}/a/group_norm/gamma": (512,),
        f"{unit}/a/group_norm/beta": (512,),
        f"{unit}/a/standardized_conv2d/kernel": (1, 1, 512, 256),
        f"{unit}/a/proj/standardized_conv2d/kernel": (1, 1, 512, 1024),
        f"{unit}/b/group_norm/gamma": (256,),
        f"{unit}/b/standardized_conv2d/kernel": (3, 3, 256, 256),
        f"{unit}/c/group_norm/beta": (256,),
        f"{unit}/c/standardized_conv2d/kernel": (1, 1, 256, 1024),
        "resnet/block3/unit06/a/group_norm/gamma": (2048,),
        "resnet/group_norm/gamma": (4096,),
        "resnet/group_norm/beta": (4096,),
        "resnet/head/conv2d/kernel": (1, 1, 4096, 10),
        "resnet/head/conv2d/bias": (10,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert len(shapes) == 1 + 16 * 9 + 4 + 2 + 2


def conv_reference(x, kernel, stride):
    """Half the kernel of zeros around x, one window at a time, float64."""
    kernel = np.asarray(kernel, np.float64)
    flat = kernel.reshape(-1, kernel.shape[-1])
    kernel = ((flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-10)).reshape(kernel.shape)
    size = len(kernel)
    height, width = (-(-side // stride) for side in x.shape[1:3])
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    y = np.zeros((len(x), height, width, kernel.shape[-1]))
    for row in range(height):
        for column in range(width):
            window = x[:, row * stride :, column * stride :][:, :size, :size]
            y[:, row, column] = np.einsum("byxc,yxco->bo", window, kernel)
    return y


def activated(x, params):
    """ReLU of GroupNorm, a group at a time, float64."""
    y = np.zeros(x.shape)
    for channels in np.split(np.arange(x.shape[-1]), 32):
        group = x[..., channels]
        mean, variance = (f(group, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
        y[..., channels] = (group - mean) / np.sqrt(variance + 1e-5)
    gamma, beta = (np.asarray(params["group_norm"][name]) for name in ("gamma", "beta"))
    return np.maximum(y * gamma + beta, 0)


def unit_reference(x, params, stride):
    def kernel(block):
        return block["standardized_conv2d"]["kernel"]

    x = np.asarray(x, np.float64)
    y = activated(x, params["a"])
    shortcut = (
        conv_reference(y, kernel(params["a"]["proj"]), stride) if "proj" in params["a"] else x
    )
    y = conv_reference(y, kernel(params["a"]), 1)
    y = conv_reference(activated(y, params["b"]), kernel(params["b"]), stride)
    return shortcut + conv_reference(activated(y, params["c"]), kernel(params["c"]), 1)


@pytest.mark.parametrize(
    ("channels", "stride", "projects"), [(64, 1, True), (128, 1, False), (128, 2, True)]
)
def test_a_unit_is_the_pre_activation_bottleneck(channels, stride, projects):
    module = bit.PreActivationUnit(describe(TINY), 32, stride)
    x = np.random.default_rng(0).normal(0.5, 1, (2, 5, 8, channels)).astype(np.float32)
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    assert ("proj" in params["a"]) == projects
    found = jax.jit(module.apply)({"params": params}, x)
    assert_close(found, unit_reference(x, params, stride))


def test_a_kernel_is_standardized_by_its_variance_and_epsilon():
    # So small that it matters where epsilon is added.
    kernel = 1e-5 * np.random.default_rng(0).normal(1, 1, (3, 3, 4, 2))
    expected = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-10)
    assert_close(resnet.standardize_bit(jnp.asarray(kernel, jnp.float32)), expected)
    np.testing.assert_array_equal(resnet.standardize_bit(jnp.full((3, 3, 4, 2), 0.5)), 0)


def test_a_whole_network_is_the_reference():
    model = create_model(TINY)
    params = random_like(abstract(TINY, IMAGES))
    p = params["resnet"]
    x = conv_reference(np.asarray(IMAGES, np.float64),
                       p["root_block"]["standardized_conv2d"]["kernel"], 2)  # fmt: skip
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # With zeros, which negative values lose to.
    rows, columns = ((side - 3) // 2 + 1 for side in x.shape[1:3])
    pooled = np.zeros((len(x), rows, columns, x.shape[-1]))
    for row in range(rows):
        for column in range(columns):
            window = x[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            pooled[:, row, column] = window.max(axis=(1, 2))
    x = unit_reference(pooled, p["block1"]["unit01"], 1)
    x = unit_reference(x, p["block2"]["unit01"], 2)
    features = activated(x, p).mean(axis=(1, 2))
    logits = features @ p["head"]["conv2d"]["kernel"][0, 0] + p["head"]["conv2d"]["bias"]
    assert_close(jax.jit(model.apply)({"params": params}, IMAGES), logits)
    headless = {"params": {"resnet": {k: x for k, x in p.items() if k != "head"}}}
    without = create_model(TINY, num_classes=0)
    assert_close(jax.jit(without.apply)(headless, IMAGES), features)


def to_timm(params):
    """timm's state dict of BiT's tree."""
    renames = [
        (r"^resnet/", ""),
        (r"^root_block/", "stem/conv/"),
        (r"^block(\d+)/unit(\d+)/", lambda m: f"stages/{int(m[1]) - 1}/blocks/{int(m[2]) - 1}/"),
        (r"/a/proj/", "/downsample/conv/"),
        (r"/([abc])/group_norm/", lambda m: f"/norm{'abc'.index(m[1]) + 1}/"),
        (r"/([abc])/standardized", lambda m: f"/conv{'abc'.index(m[1]) + 1}/standardized"),
        (r"standardized_conv2d/", ""),
        (r"^group_norm/", "norm/"),
        (r"^head/conv2d/", "head/fc/"),
        (r"/(kernel|gamma)$", "/weight"),
        (r"/beta$", "/bias"),
    ]
    result = {}
    for name, x in flatten_dict(params, sep="/").items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        result[name.replace("/", ".")] = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
    return result


def test_logits_are_those_of_timm():
    timm = pytest.importorskip("timm", reason=PEERS, exc_type=ImportError)
    import torch

    peer = timm.create_model("resnetv2_50x1_bit", num_classes=7).eval()
    images = np.random.default_rng(3).uniform(-1, 1, (2, 75, 75, 3)).astype(np.float32)
    config = model_config("R50x1")
    params = random_like(abstract(config, images, num_classes=7))
    state = {k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in to_timm(params).items()}
    peer.load_state_dict(state)
    with torch.inference_mode():
        expected = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits = jax.jit(create_model(config, num_classes=7).apply)({"params": params}, images)
    assert np.ptp(expected) > 0.1  # Not degenerate.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_remat_changes_neither_tree_nor_values_nor_gradients():
    params = random_like(abstract(ONE_UNIT, IMAGES))

    def loss(params, model):
        return jnp.sum(model.apply({"params": params}, IMAGES) ** 2)

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, expected_grads = jax.device_get(value_and_grad(params, create_model(ONE_UNIT)))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
    for remat in ("dots", "everything"):
        tree = abstract(ONE_UNIT, IMAGES, remat=remat)
        assert jax.tree.structure(params) == jax.tree.structure(tree)
        value, grads = value_and_grad(params, create_model(ONE_UNIT, remat=remat))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            np.testing.assert_allclose(g, e, atol=1e-5 * largest)


def test_training_moves_every_parameter_and_lowers_the_loss():
    model, optimizer = create_model(ONE_UNIT, head_bias_init=-1.0), optax.adam(1e-2)
    init = functools.partial(init_train_state, seed=0, image_size=16, average=False)
    state = jax.jit(init, static_argnums=(0, 1))(model, optimizer)
    start = jax.device_get(state.params)
    head = start["resnet"]["head"]["conv2d"]
    assert np.all(head["bias"] == -1.0) and not np.any(head["kernel"])
    batch = {"image": IMAGES[:, :16, :16], "label": jnp.array([1, 3])}
    step = jax.jit(lambda state: train_step(
        state, batch, objective=classification(model, "softmax"), optimizer=optimizer))  # fmt: skip
    losses = []
    for _ in range(8):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(5), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), start, state.params)
    assert all(jax.tree.leaves(moved)), moved


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    model, exact = create_model(TINY, dtype="bfloat16"), create_model(TINY)
    params = random_like(abstract(TINY, IMAGES))
    apply = jax.jit(lambda p: model.apply({"params": p}, IMAGES, capture_intermediates=True))
    logits, state = apply(params)
    assert state["intermediates"]["resnet"]["block2"]["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    expected = np.asarray(jax.jit(exact.apply)({"params": params}, IMAGES))
    logits = np.asarray(logits)
    assert 0 < np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.05


@pytest.mark.parametrize("name", ["R50", "R50x0", "R34x1", "R50X1", "R50x1.5"])
def test_unknown_resnets_are_refused_and_the_known_ones_named(name):
    with pytest.raises(UserError, match="DEPTHxWIDTH with DEPTH one of R50, R101, R152, R200"):
        model_config(name)


def test_a_stage_without_units_is_refused():
    with pytest.raises(UserError, match="resnet_layers .1, 0. is no list of units per stage"):
        create_model(TINY, resnet_layers=(1, 0)).init(jax.random.key(0), IMAGES)
