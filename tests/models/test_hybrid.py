import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import create_model, model_config
from vit_jax.state import init_train_state
from vit_jax.steps import classification, train_step

TINY = {
    "architecture": "hybrid",
    "resnet_layers": [1, 1],  # As in config.json, where tuples are lists.
    "patch_size": 1,
    "hidden_size": 24,
    "num_layers": 1,
    "mlp_dim": 40,
    "num_heads": 3,
    "num_classes": 5,
}
ONE_UNIT = TINY | {"resnet_layers": [1]}
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 16, 32, 3)).astype(np.float32)
PEERS = "needs the peers extra: pip install -e '.[peers]'"


def random_params(model, images, scale=0.3):
    """Every tensor random, biases and norms included, so that a swapped pair cannot hide."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), shapes)


# With a 1000-way head at 224 px. R50+B/32 and R50+L/16, which timm does not have, are R50+L/32 and
# R50+B/16 with what differs counted by hand: the Transformer of Table 1 and E of Eq. 1.
TIMM = {
    "R50+ViT-B/16": ("vit_base_r50_s16_224", 98_659_112),
    "R50+ViT-L/32": ("vit_large_r50_s32_224", 328_994_856),
    "R26+ViT-S/32": ("vit_small_r26_s32_224", 36_431_912),
    "R26+ViT-B/32": ("vit_base_r26_s32_224", 101_383_976),
    "R+ViT-Ti/16": ("vit_tiny_r_s16_p8_224", 6_337_704),
}
VIT_B16, VIT_L16 = 86_567_656, 304_326_632  # Published.
TOKENS = 196 - 49
COUNTS = {name: count for name, (_, count) in TIMM.items()} | {
    "R50+ViT-B/32": 328_994_856
    - (VIT_L16 + (2048 - 768 - TOKENS) * 1024)
    + (VIT_B16 + (2048 - 768 - TOKENS) * 768),
    "R50+ViT-L/16": 98_659_112
    - (VIT_B16 + (1024 - 768) * 768)
    + (VIT_L16 + (1024 - 768) * 1024),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    model = create_model(model_config(name), num_classes=1000, scan_layers=True)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)) == COUNTS[name]


@pytest.mark.parametrize("name", TIMM)
def test_parameter_counts_are_those_of_timm(name):
    timm = pytest.importorskip("timm", reason=PEERS, exc_type=ImportError)
    peer, count = TIMM[name]
    peer = timm.create_model(peer, num_classes=1000, device="meta")
    assert sum(x.numel() for x in peer.parameters()) == count


# The stem of R+ViT-Ti/16 lies directly in timm's backbone, that of the others in `stem`.
TIMM_NAMES = [
    (r"^cls$", "cls_token"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^(conv|gn)_root/", r"patch_embed/backbone/{stem}\1/"),
    (r"^block(\d+)/unit(\d+)/", r"patch_embed/backbone/stages/block\1/blocks/unit\2/"),
    (r"/(conv|gn)_proj/", r"/downsample/\1/"),
    (r"/gn(\d?)/", r"/norm\1/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_2/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_1/out/", "/attn/proj/"),
    (r"/MlpBlock_3/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_3/Dense_1/", "/mlp/fc2/"),
    (r"/(kernel|scale)$", "/weight"),
]


def to_timm(params, stem):
    """timm's state dict of the official tree, in NumPy."""
    result = {}
    for name, x in flatten_dict(params, sep="/").items():
        if re.search("/(query|key|value)/", name):
            continue
        if "1/out/kernel" in name:
            x = x.reshape(-1, x.shape[-1])
        if name.endswith("kernel"):
            x = x.T if x.ndim == 2 else x.transpose(3, 2, 0, 1)
        for pattern, replacement in TIMM_NAMES:
            name = re.sub(pattern, replacement.replace("{stem}", stem), name)
        name = re.sub(r"/(?:block|unit)(\d+)", lambda m: f"/{int(m[1]) - 1}", name)
        result[name.replace("/", ".")] = x
    for layer, block in params["Transformer"].items():
        if layer.startswith("encoderblock_"):
            parts = [block["MultiHeadDotProductAttention_1"][n] for n in ("query", "key", "value")]
            width = parts[0]["kernel"].shape[0]
            qkv = f"blocks.{layer.removeprefix('encoderblock_')}.attn.qkv"
            result[f"{qkv}.weight"] = np.concatenate(
                [part["kernel"].reshape(width, width).T for part in parts]
            )
            result[f"{qkv}.bias"] = np.concatenate([part["bias"].ravel() for part in parts])
    return result


# The encoder is held by test_vit.py: a few of its layers will do here.
@pytest.mark.parametrize(
    ("name", "image_size", "depth"),
    [
        ("R50+ViT-B/16", 96, 2),
        ("R50+ViT-L/32", 96, 1),
        ("R26+ViT-S/32", 128, 2),
        ("R+ViT-Ti/16", 224, 12),
    ],
)
def test_logits_are_those_of_timm(name, image_size, depth):
    timm = pytest.importorskip("timm", reason=PEERS, exc_type=ImportError)
    import torch

    peer = timm.create_model(TIMM[name][0], num_classes=7, img_size=image_size, depth=depth).eval()
    model = create_model(
        model_config(name) | {"num_layers": depth},
        num_classes=7,
        gelu="erf",
        group_norm_epsilon=1e-5,
    )
    images = np.random.default_rng(3).uniform(-1, 1, (2, image_size, image_size, 3))
    images = images.astype(np.float32)
    params = random_params(model, images)
    state = to_timm(params, "" if name.startswith("R+") else "stem/")
    peer.load_state_dict({k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in state.items()})
    with torch.inference_mode():
        expected = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits = jax.jit(model.apply)({"params": params}, images)
    assert np.ptp(expected) > 0.1  # Neither degenerate nor saturated.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_parameter_tree_is_the_official_one():
    model = create_model(model_config("R50+ViT-B/16"), num_classes=10)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    shapes = {name: x.shape for name, x in flatten_dict(params, sep="/").items()}
    expected = {
        "conv_root/kernel": (7, 7, 3, 64),
        "gn_root/scale": (64,),
        "gn_root/bias": (64,),
        "block1/unit1/conv1/kernel": (1, 1, 64, 64),
        "block1/unit1/conv2/kernel": (3, 3, 64, 64),
        "block1/unit1/conv3/kernel": (1, 1, 64, 256),
        "block1/unit1/conv_proj/kernel": (1, 1, 64, 256),
        "block1/unit1/gn_proj/scale": (256,),
        "block3/unit9/conv1/kernel": (1, 1, 1024, 256),
        "block3/unit9/gn2/bias": (256,),
        "block3/unit9/gn3/scale": (1024,),
        "embedding/kernel": (1, 1, 1024, 768),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not any(re.match("block./unit[2-9]/.*_proj", name) for name in shapes)
    stem = [name for name in shapes if re.match("block|conv_root|gn_root", name)]
    assert len(stem) == 3 + 16 * 9 + 3 * 3  # Root, 16 units, a projection a stage.


def test_remat_and_scan_change_neither_tree_nor_values_nor_gradients():
    plain, other = create_model(ONE_UNIT), create_model(ONE_UNIT, remat="dots", scan_layers=True)
    params = random_params(plain, IMAGES)
    assert jax.tree.structure(params) == jax.tree.structure(random_params(other, IMAGES))

    def loss(params, model):
        return jnp.sum(model.apply({"params": params}, IMAGES) ** 2)

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, expected_grads = value_and_grad(params, plain)
    value, grads = value_and_grad(params, other)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * largest)


def test_training_moves_every_parameter_and_lowers_the_loss():
    model, optimizer = create_model(TINY), optax.adam(1e-2)
    init = functools.partial(init_train_state, seed=0, image_size=16, average=False)
    state = jax.jit(init, static_argnums=(0, 1))(model, optimizer)
    start = jax.device_get(state.params)
    batch = {"image": IMAGES[:, :, :16], "label": jnp.array([1, 3])}
    step = jax.jit(lambda state: train_step(
        state, batch, objective=classification(model, "softmax"), optimizer=optimizer))  # fmt: skip
    losses = []
    for _ in range(8):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(5), rel=1e-5)  # The head starts at 0.
    assert losses[-1] < 0.5 * losses[0]
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), start, state.params)
    assert all(jax.tree.leaves(moved)), moved


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    model, exact = create_model(TINY, dtype="bfloat16"), create_model(TINY)
    params = random_params(model, IMAGES)
    apply = jax.jit(lambda p: model.apply({"params": p}, IMAGES, capture_intermediates=True))
    logits, state = apply(params)
    assert state["intermediates"]["block2"]["unit1"]["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    expected = np.asarray(jax.jit(exact.apply)({"params": params}, IMAGES))
    logits = np.asarray(logits)
    assert 0 < np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.05


def test_the_epsilon_of_group_norm_is_the_configs():
    params = random_params(create_model(ONE_UNIT), IMAGES)
    small, large = (
        jax.jit(create_model(ONE_UNIT, group_norm_epsilon=epsilon).apply)(
            {"params": params}, IMAGES
        )
        for epsilon in (1e-6, 1.0)
    )
    assert not np.allclose(small, large, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "downsampling"),
    [("R50+ViT-L/16", 16), ("R50+ViT-L/32", 32), ("R26+ViT-S/32", 32), ("R+ViT-Ti/16", 32)],
)
def test_the_image_must_be_a_multiple_of_the_total_downsampling(name, downsampling):
    model = create_model(model_config(name), num_classes=1)
    assert model.downsampling == downsampling
    message = f"image_size 200 is not a multiple of total downsampling {downsampling}: use "
    with pytest.raises(UserError, match=f"{message}{200 // downsampling * downsampling} or "):
        model.init(jax.random.key(0), jnp.zeros((1, 200, 200, 3)))


@pytest.mark.parametrize("name", ["R50+ViT-B/14", "R101+ViT-B/16", "R+ViT-B/32", "R50+B/16", "+"])
def test_unknown_hybrids_are_refused_and_the_known_ones_named(name):
    with pytest.raises(UserError, match="R50.ViT-SIZE/32, R50.ViT-SIZE/16") as error:
        model_config(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_a_stage_without_units_is_refused():
    with pytest.raises(UserError, match="resnet_layers .1, 0. is no list of units per stage"):
        create_model(TINY, resnet_layers=(1, 0)).init(jax.random.key(0), IMAGES)
