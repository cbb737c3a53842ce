"""Whole models against timm's own, every tensor random, both ways."""

import inspect
import json
import pathlib

import numpy as np
import pytest

from vit_jax.checkpoints import foreign_configs, timm_config
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.errors import UserError

from .torch_models import (
    PHOTOGRAPHS,
    TINY,
    assert_close,
    assert_same_tensors,
    assert_same_view,
    images,
    logits_of,
    logits_of_torch,
    randomize,
    safetensors_torch,
    timm,
    tiny_timm,
    torch,
)


def timm_round_trip(tmp_path, name, size, act_layer="gelu", **options):
    """A timm model, read from its state dict, written as a folder and read by timm again."""
    module = randomize(timm.create_model(name, img_size=size, act_layer=act_layer, **options))
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "theirs.safetensors"
    safetensors_torch.save_file(module.state_dict(), path)
    gelu = "tanh" if act_layer == "gelu_tanh" else None
    ours = load_pretrained(path, num_heads=options.get("num_heads"), gelu=gelu)
    x = images(size)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
    save_pretrained(ours, tmp_path / "folder", "timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert_same_tensors(again.state_dict(), module.state_dict())
    np.testing.assert_array_equal(logits_of_torch(again.eval(), x), logits_of_torch(module, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_heads"),
    [
        ("vit_tiny_patch16_224", 3),
        ("vit_small_patch16_224", 6),
        ("vit_base_patch16_224", 12),
        ("vit_base_patch32_224", 12),
    ],
)
def test_timm_models_agree_both_ways(tmp_path, name, num_heads):
    timm_round_trip(tmp_path / "224", name, 224)
    timm_round_trip(tmp_path / "160", name, 160, depth=2, num_heads=num_heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # The shapes and heads of the large ones; two of their 24 and 32 equal layers.
        ("vit_large_patch16_224", {"num_heads": 16}),
        ("vit_huge_patch14_224", {"num_heads": 16}),
    ],
)
@pytest.mark.parametrize("size", [224, 112])
def test_large_timm_models_agree_both_ways(tmp_path, name, sizes, size):
    timm_round_trip(tmp_path, name, size, depth=2, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_heads", "sizes"),
    [
        ("vit_base_r50_s16_224", 12, (224, 160)),
        ("vit_small_r26_s32_224", 6, (224, 160)),
        ("vit_tiny_r_s16_p8_224", 3, (224, 160)),
    ],
)
def test_timm_hybrids_agree_both_ways(tmp_path, name, num_heads, sizes):
    for size in sizes:
        timm_round_trip(tmp_path / str(size), name, size, depth=2, num_heads=num_heads)


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("options", [{"act_layer": "gelu"}, {"act_layer": "gelu_tanh"}])
def test_a_tiny_timm_model_agrees_both_ways(tmp_path, size, options):
    timm_round_trip(tmp_path, "vit_tiny_patch16_224", size, **TINY, **options)


def test_a_timm_model_of_images_that_are_no_squares_agrees_both_ways(tmp_path):
    size = (32, 64)  # 8 patches and a class token, which are as many as 3 x 3.
    module = randomize(timm.create_model("vit_tiny_patch16_224", img_size=size, **TINY))
    timm.models.save_for_hf(
        module, tmp_path / "theirs", model_args={"img_size": size, **TINY}, safe_serialization=True
    )
    ours = load_pretrained(tmp_path / "theirs")
    assert ours.preprocessing.image_size == "32x64"
    x = images(size)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
    for path in (tmp_path / "folder", tmp_path / "a.safetensors"):
        save_pretrained(ours, path, "timm")
        assert load_pretrained(path).preprocessing == ours.preprocessing
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert again.pretrained_cfg["input_size"] == [3, *size]
    np.testing.assert_array_equal(logits_of_torch(again, x), logits_of_torch(module, x))


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (100, 1000), (301, 303)])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_view_that_is_no_square_is_what_timm_shows(shape, mode):
    told = {"crop_pct": 0.9, "crop_mode": mode, "interpolation": "bicubic"}
    theirs = timm.data.create_transform((3, 96, 128), mean=(0.5,) * 3, std=(0.5,) * 3, **told)
    ours = timm_config.preprocessing("96x128", **told)
    assert_same_view(ours, shape, lambda picture: theirs(picture).numpy())


def test_mean_pooling_is_timms_without_a_class_token(tmp_path):
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    timm_round_trip(tmp_path, "vit_tiny_patch16_224", 32, **TINY, **options)


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"crop_pct": 0.875, "interpolation": "bilinear"},
        {"crop_pct": 1.0},
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"crop_mode": "squash", "crop_pct": 1.0, "mean": (0.48, 0.45, 0.4), "std": (0.2, 0.3, 0.1)},
    ],
    ids=["default", "bilinear", "whole", "squash", "squash whole"],
)
def test_what_a_model_of_timm_sees_is_what_timm_shows_it(told, shape):
    module = timm.create_model("vit_tiny_patch16_224", **TINY)
    config = timm.data.resolve_data_config({}, pretrained_cfg={**module.default_cfg, **told})
    transform = timm.data.create_transform(**config)
    ours = foreign_configs.read_folder(
        pathlib.Path("a.npz"), "timm", {"architecture": "vit", "classifier": "token"}, 224
    ).preprocessing
    if told:
        ours = timm_config.preprocessing(224, **{**module.default_cfg, **told})
    assert_same_view(ours, shape, lambda picture: transform(picture).numpy())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_timm_state_dict_is_read_from_any_file(tmp_path, suffix):
    module = randomize(timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY))
    path = tmp_path / f"theirs{suffix}"
    if suffix == ".pth":
        torch.save(module.state_dict(), path)
    elif suffix == ".npz":
        np.savez(path, **{name: x.numpy() for name, x in module.state_dict().items()})
    else:
        safetensors_torch.save_file(module.state_dict(), path)
    x = images(32)
    ours = load_pretrained(path, num_heads=2)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))


def test_the_configuration_that_timm_writes_is_read(tmp_path):
    module = randomize(timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY))
    timm.models.save_for_hf(module, tmp_path / "hub", safe_serialization=True)
    config = json.loads((tmp_path / "hub/config.json").read_text())
    config["pretrained_cfg"] |= {"crop_pct": 0.95, "interpolation": "bilinear", "std": [0.25] * 3}
    config["pretrained_cfg"]["input_size"] = [3, 32, 32]
    config["label_names"] = list("abcde")
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    ours = load_pretrained(tmp_path / "hub", num_heads=2)
    assert ours.class_names == tuple("abcde")
    assert ours.preprocessing.center_crop == 0.95 and ours.preprocessing.resize == "timm"
    assert ours.preprocessing.std == (0.25,) * 3 and ours.preprocessing.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg"}, "fc_norm.bias.*not part of"),
        ({"qkv_bias": False}, "query/bias is missing"),
    ],
)
def test_what_is_not_the_papers_model_is_refused(tmp_path, options, message):
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY, **options)
    safetensors_torch.save_file(module.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "a.safetensors", num_heads=2)


NOT_READ = {
    "class token and mean": ({"global_pool": "avg", "fc_norm": False}, "global_pool is 'avg' besi"),
    "normalized after pooling": ({"global_pool": "avg"}, r"normalizes after its pooling \(fc_norm"),
    "mean, normalized after": (
        {"global_pool": "avg", "class_token": False},
        "normalizes after its pooling",
    ),
    "largest": (
        {"global_pool": "max", "class_token": False, "fc_norm": False},
        "global_pool is 'max' without a class token",
    ),
    "registers without a class": (
        {"reg_tokens": 2, "class_token": False, "global_pool": "avg", "fc_norm": False},
        "num_registers is 2, which goes with a class token",
    ),
    "qk_norm": ({"qk_norm": True}, "normalizes queries and keys"),
    "pre_norm": ({"pre_norm": True}, "a norm before its layers"),
    "activation": ({"act_layer": "quick_gelu"}, "act_layer 'quick_gelu' is none of"),
    "norm": ({"norm_layer": "rmsnorm"}, "norm_layer is 'rmsnorm': only models with 'layernorm'"),
    "channels": ({"in_chans": 4}, "in_chans is 4: only models with 3 are read"),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_a_timm_folder_says_of_another_model_is_refused(tmp_path, case):
    options, message = NOT_READ[case]
    timm.models.save_for_hf(tiny_timm(**options), tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"global_pool": "token"}, {"drop_path_rate": 0.1},
    {"global_pool": "avg", "class_token": False, "fc_norm": False}, {"no_embed_class": True},
    {"dynamic_img_size": True}, {"norm_layer": "layernorm"}])  # fmt: skip
def test_what_a_timm_folder_says_of_the_papers_model_is_read(tmp_path, options):
    module = tiny_timm(**options)
    timm.models.save_for_hf(module, tmp_path, safe_serialization=True)
    x = images(32)
    assert_close(logits_of(load_pretrained(tmp_path), x), logits_of_torch(module, x))


def test_every_argument_of_timms_vit_is_known():
    arguments = inspect.signature(timm.models.VisionTransformer.__init__).parameters
    known = {
        *timm_config.FIXED,
        *timm_config.READ,
        *timm_config.SHAPES,
        *timm_config.OTHER_SHAPES,
        *timm_config.HARMLESS,
    }
    assert arguments.keys() - {"self"} <= known


def test_the_gelu_of_timms_architectures_is_that_of_timm():
    for name in timm.list_models("vit_*siglip_*"):
        with torch.device("meta"):
            module = timm.create_model(name, depth=1)
        tanh = type(module.blocks[0].mlp.act).__name__ == "GELUTanh"
        assert tanh == (name in timm_config.TANH), name


def test_the_heads_of_timms_architectures_are_those_of_timm(tmp_path):
    with torch.device("meta"):
        plain = {"vit_base_patch16_gap_224", "vit_base_patch16_224", "vit_small_patch16_224"}
        modules = {name: timm.create_model(name, depth=1) for name in plain}
    for name, module in modules.items():
        usual = module.embed_dim // 64
        assert module.blocks[0].attn.num_heads == timm_config.NUM_HEADS.get(name, usual), name
    module = timm.create_model("vit_base_patch16_gap_224", depth=1, img_size=32, num_classes=3)
    timm.models.save_for_hf(randomize(module), tmp_path, safe_serialization=True)
    assert "num_heads" not in json.loads((tmp_path / "config.json").read_text())["model_args"]
    ours = load_pretrained(tmp_path)
    x = images(32)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
