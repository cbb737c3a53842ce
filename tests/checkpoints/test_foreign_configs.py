"""Whole models against timm's and Transformers' own, every tensor random, both ways."""

import dataclasses
import inspect
import json
import pathlib

import numpy as np
import pytest
from flax.serialization import to_bytes
from flax.traverse_util import unflatten_dict
from PIL import Image

from vit_jax import models
from vit_jax.checkpoints import foreign_configs, huggingface_config, timm_config
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data.images import preprocess
from vit_jax.data.protocols import Preprocessing, resized_side
from vit_jax.errors import UserError

PEERS = "needs the peers extra: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=PEERS, exc_type=ImportError)
timm = pytest.importorskip("timm", reason=PEERS, exc_type=ImportError)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=PEERS, exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason=PEERS, exc_type=ImportError)

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomize(module, seed=0):
    """Every tensor random, so that a swapped pair cannot hide, and of a usual scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in module.state_dict().items():
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim == 1:
                x.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                x.copy_(noise / max(x[0].numel(), 1) ** 0.5)
    return module.eval()


def images(size, count=2):
    return np.random.default_rng(size).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


def logits_of_torch(module, x):
    with torch.no_grad():
        output = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    return getattr(output, "logits", output).numpy()


def logits_of(pretrained, x):
    return np.asarray(models.create_model(pretrained.model).apply({"params": pretrained.params}, x))


def assert_close(actual, expected):
    assert np.std(expected) > 1e-2
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(actual[name].numpy(), x.numpy(), err_msg=name)


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


def test_mean_pooling_is_timms_without_a_class_token(tmp_path):
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    timm_round_trip(tmp_path, "vit_tiny_patch16_224", 32, **TINY, **options)


def transformer(size, **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 32, "patch_size": 8, "image_size": size, **options}
    return transformers.ViTConfig(**sizes)


def transformers_round_trip(tmp_path, config, processor=None, **saving):
    """A Transformers model, read from its folder, written as one and read by Transformers again."""
    module = randomize(transformers.ViTForImageClassification(config))
    module.save_pretrained(tmp_path / "theirs", **saving)
    if processor:
        processor.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    x = images(config.image_size)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
    save_pretrained(ours, tmp_path / "folder", "huggingface")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "folder")
    assert_same_tensors(again.state_dict(), module.state_dict())
    np.testing.assert_array_equal(logits_of_torch(again.eval(), x), logits_of_torch(module, x))
    return ours, again


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_a_tiny_transformers_model_agrees_both_ways(tmp_path, size, activation):
    names = {0: "daisy", 1: "iris", 2: "rose"}
    config = transformer(size, hidden_act=activation, id2label=names, layer_norm_eps=1e-5)
    ours, again = transformers_round_trip(tmp_path, config)
    assert ours.class_names == ("daisy", "iris", "rose") and again.config.id2label == names
    assert ours.model["gelu"] == {"gelu": "erf"}.get(activation, "tanh")
    assert ours.model["layer_norm_epsilon"] == again.config.layer_norm_eps == 1e-5


def test_a_sharded_transformers_model_is_read(tmp_path):
    transformers_round_trip(tmp_path, transformer(32), max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 384])
def test_transformers_base_model_agrees_both_ways(tmp_path, size):
    transformers_round_trip(tmp_path, transformers.ViTConfig(image_size=size, num_labels=1000))


def test_the_processor_travels_both_ways(tmp_path):
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    ours, _ = transformers_round_trip(tmp_path, transformer(32), processor)
    assert ours.preprocessing.mean == (0.485, 0.456, 0.406)
    assert ours.preprocessing.interpolation == "bicubic" and ours.preprocessing.antialias
    assert ours.preprocessing.resize == "huggingface"
    again = transformers.ViTImageProcessor.from_pretrained(tmp_path / "folder")
    for key in ("size", "image_mean", "image_std", "resample", "do_normalize"):
        assert getattr(again, key) == getattr(processor, key)


def photograph(height, width):
    """Noise over patches of color: any pixel out of place shows."""
    rng = np.random.default_rng(height * width)
    patches = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((width, height))
    noise = rng.integers(-60, 61, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(patches) + noise, 0, 255).astype(np.uint8))


# Resized to 256 or 248, the longer sides of some leave an odd number of pixels to crop.
PHOTOGRAPHS = [(375, 500), (500, 333), (224, 224), (248, 251), (100, 1000), (301, 303), (256, 259)]


def assert_same_view(preprocessing, shape, theirs):
    """Against [3, height, width] of a peer; that evaluate sees the same, tests/data tells."""
    picture = photograph(*shape)
    ours = preprocess(np.asarray(picture), preprocessing)
    np.testing.assert_allclose(ours, theirs(picture).transpose(1, 2, 0), atol=1e-5)


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


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 224, "width": 224}}),
        ("ViTImageProcessorPil", {"size": {"height": 224, "width": 224}, "resample": 3}),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 256}, "crop_size": 224}),
        ("CLIPImageProcessorPil", {"size": {"height": 256, "width": 256}, "crop_size": 224}),
    ],
    ids=["bilinear", "bicubic", "crop", "squash and crop"],
)
def test_what_a_model_of_transformers_sees_is_what_pil_shows_it(kind, options, shape, tmp_path):
    processor = getattr(transformers, kind, None)
    if processor is None:  # The 4th version has no others under this name.
        processor = getattr(transformers, kind.removesuffix("Pil"))
    processor(**options).save_pretrained(tmp_path)
    ours = foreign_configs.read_folder(
        tmp_path, "huggingface", {"architecture": "vit", "classifier": "token"}, 224
    ).preprocessing

    def theirs(picture):
        return np.asarray(processor(**options)(picture, return_tensors="np")["pixel_values"][0])

    assert_same_view(ours, shape, theirs)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("format", ["timm", "huggingface"])
@pytest.mark.parametrize("side", [224, 248, 257])
def test_a_crop_is_told_to_peers_by_the_same_sides(format, side, squash, tmp_path):
    module = randomize(timm.create_model("vit_tiny_patch16_224", img_size=224, **TINY))
    safetensors_torch.save_file(module.state_dict(), tmp_path / "theirs.safetensors")
    ours = load_pretrained(tmp_path / "theirs.safetensors", num_heads=2)
    crop = None if side == 224 else 224 / side
    told = Preprocessing(
        224, crop, "bicubic", True, resize="huggingface", squash=squash and side != 224
    )
    save_pretrained(dataclasses.replace(ours, preprocessing=told), tmp_path / "folder", format)
    assert load_pretrained(tmp_path / "folder").preprocessing == told
    (tmp_path / "folder" / "vit_jax.json").unlink()
    again = load_pretrained(tmp_path / "folder", num_heads=2).preprocessing
    assert again.resize == format and resized_side(again) == side
    assert (again.squash or again.center_crop is None) == (told.squash or crop is None)


def test_a_vit_model_without_a_head_is_read_with_its_pooler(tmp_path):
    module = randomize(transformers.ViTModel(transformer(32)))
    module.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    x = images(32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()
    assert_close(logits_of(ours, x), expected)
    save_pretrained(ours, tmp_path / "folder", "huggingface")
    again = transformers.ViTModel.from_pretrained(tmp_path / "folder")
    assert_same_tensors(again.state_dict(), module.state_dict())


def test_names_that_transformers_uses_in_memory_are_read(tmp_path):
    module = randomize(transformers.ViTForImageClassification(transformer(32)))
    module.save_pretrained(tmp_path / "theirs")
    safetensors_torch.save_file(module.state_dict(), tmp_path / "theirs/model.safetensors")
    x = images(32)
    assert_close(logits_of(load_pretrained(tmp_path / "theirs"), x), logits_of_torch(module, x))


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
        ({"init_values": 1.0}, "ls1.gamma.*not part of a plain or hybrid ViT"),
        ({"reg_tokens": 1}, "reg_token.*not part of"),
        ({"global_pool": "avg"}, "fc_norm.bias.*not part of"),
        ({"qkv_bias": False}, "query/bias is missing"),
    ],
)
def test_what_is_not_the_papers_model_is_refused(tmp_path, options, message):
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY, **options)
    safetensors_torch.save_file(module.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "a.safetensors", num_heads=2)


def test_a_model_of_another_kind_is_refused(tmp_path):
    module = transformers.DeiTForImageClassification(transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8))  # fmt: skip
    module.save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="not part of a plain or hybrid ViT"):
        load_pretrained(tmp_path / "deit")


def save_state(path, state):
    if path.suffix == ".safetensors":
        safetensors_torch.save_file(state, path)
    else:
        torch.save(state, path)


def tiny_timm(**options):
    return randomize(timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY | options))


@pytest.mark.parametrize("named", [".", "pytorch_model.bin"])
def test_a_folder_of_pytorchs_pickles_is_read_with_its_configuration(tmp_path, named):
    names = {0: "daisy", 1: "iris", 2: "rose"}
    config = transformer(32, layer_norm_eps=1e-2, id2label=names)
    module = randomize(transformers.ViTForImageClassification(config))
    module.save_pretrained(tmp_path)
    state = safetensors_torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = load_pretrained(tmp_path / named)
    assert ours.class_names == ("daisy", "iris", "rose") and ours.model["num_heads"] == 4
    x = images(32)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))


def test_pytorchs_sharded_pickles_are_read(tmp_path):
    module = randomize(transformers.ViTForImageClassification(transformer(32)))
    module.save_pretrained(tmp_path)
    state = safetensors_torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {"pytorch_model-1-of-2.bin": {}, "pytorch_model-2-of-2.bin": {}}
    weight_map = {name: sorted(shards)[i % 2] for i, name in enumerate(state)}
    for name, shard in weight_map.items():
        shards[shard][name] = state[name].clone()
    for shard, arrays in shards.items():
        torch.save(arrays, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    x = images(32)
    assert_close(logits_of(load_pretrained(tmp_path), x), logits_of_torch(module, x))


@pytest.mark.parametrize("name", ["model.safetensors", "mine.safetensors", "mine.pth"])
def test_a_file_in_a_folder_of_timms_has_the_folders_configuration(tmp_path, name):
    module = tiny_timm(act_layer="gelu_tanh")
    timm.models.save_for_hf(module, tmp_path, safe_serialization=True)
    save_state(tmp_path / name, module.state_dict())
    ours = load_pretrained(tmp_path / name)  # The heads, too, are in config.json alone.
    x = images(32)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
    # A info file of the file's own says more than the folder.
    (tmp_path / f"{name}.json").write_text('{"model": {"gelu": "erf"}}')
    assert load_pretrained(tmp_path / name).model["gelu"] == "erf"


def test_a_config_json_of_another_kind_is_none_of_a_files(tmp_path):
    save_state(tmp_path / "a.safetensors", tiny_timm().state_dict())
    for text in ("{", "[]", '{"model": {"architecture": "vit"}, "seed": 0}'):  # The last: a run's.
        (tmp_path / "config.json").write_text(text)
        assert load_pretrained(tmp_path / "a.safetensors", num_heads=2).model["gelu"] == "erf"


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
    "attention pooling": ({"global_pool": "map", "class_token": False}, "with attention pooling"),
    "LayerScale": ({"init_values": 1.0}, r"with LayerScale.* \(blocks.0.ls1.gamma; and 3 more\)"),
    "registers": ({"reg_tokens": 2}, "a ViT with register tokens"),
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


def test_every_argument_of_timms_vit_and_transformers_config_is_known():
    arguments = inspect.signature(timm.models.VisionTransformer.__init__).parameters
    known = {
        *timm_config.FIXED,
        *timm_config.READ,
        *timm_config.SHAPES,
        *timm_config.HARMLESS,
    }
    assert arguments.keys() - {"self"} <= known
    known = {
        *huggingface_config.FIXED,
        *huggingface_config.READ,
        *huggingface_config.SHAPES,
    }
    assert transformers.ViTConfig().to_dict().keys() <= known | {*huggingface_config.HARMLESS}


def test_the_gelu_of_timms_architectures_is_that_of_timm():
    for name in timm.list_models("vit_*siglip_gap*"):
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


@pytest.mark.parametrize("change", [{"_attn_implementation_autoset": True}, {"_num_labels": 3},
                                    {"auto_map": {}}])  # fmt: skip
def test_what_older_transformers_wrote_is_read(tmp_path, change):
    transformers.ViTForImageClassification(transformer(32)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert load_pretrained(tmp_path).model["num_heads"] == config["num_attention_heads"]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875},
            "crop_pct is 0.875",
        ),
        ({"image_processor_type": "ConvNextImageProcessor"}, "is 'ConvNextImageProcessor': only"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True: only models with False"),
        ({"do_pad": True}, "do_pad is True"),
        ({"offset": True}, "offset is True"),
        ({"sharpen": 2}, "sharpen is 2, and nothing is known of this field"),
    ],
)
def test_a_processor_that_shows_other_pixels_is_refused(tmp_path, processor, message):
    transformers.ViTForImageClassification(transformer(32)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["ViT", "CLIP", "DeiT", "Bit"])
def test_every_field_of_the_processors_that_are_read_is_known(name):
    processor = getattr(transformers, f"{name}ImageProcessor")().to_dict()
    assert processor["image_processor_type"] in huggingface_config.PROCESSORS
    assert processor.keys() <= {
        *huggingface_config.PROCESSOR_FIXED,
        *huggingface_config.PROCESSOR_ACCEPTED,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": False}, "qkv_bias is False: only models with True"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is none of"),
        ({"pooler_act": "relu"}, "pooler_act is 'relu'"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"problem_type": "regression"}, "problem_type 'regression' is none of"),
        ({"residual_scale": 0.5}, "residual_scale is 0.5, and nothing is known of this field"),
    ],
)
def test_what_a_transformers_folder_says_of_another_model_is_refused(tmp_path, change, message):
    transformers.ViTForImageClassification(transformer(32)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def converted(tmp_path, format):
    """A folder that we wrote, of a model of which the info file says more than its files can."""
    transformers.ViTForImageClassification(transformer(32)).save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    preprocessing = dataclasses.replace(ours.preprocessing, resize="box", antialias=False)
    ours = dataclasses.replace(
        ours, class_names=("a", "b"), loss="sigmoid", preprocessing=preprocessing
    )
    ours.model["layer_norm_epsilon"] = 1e-6
    save_pretrained(ours, tmp_path / "ours", format)
    return tmp_path / "ours", ours


@pytest.mark.parametrize("format", ["timm", "huggingface"])
def test_new_class_names_in_a_folder_that_we_wrote_are_seen(tmp_path, format):
    folder, before = converted(tmp_path, format)
    config = json.loads((folder / "config.json").read_text())
    if format == "timm":
        config["label_names"] = ["x", "y"]
        config["model_args"]["act_layer"] = "gelu_tanh"
    else:
        config |= {"id2label": {"0": "x", "1": "y"}, "hidden_act": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(config))
    after = load_pretrained(folder)
    assert after.class_names == ("x", "y") and after.model["gelu"] == "tanh"
    # What nobody changed is as the info file says it.
    assert after.loss == "sigmoid" and not after.preprocessing.antialias
    assert after.model == before.model | {"gelu": "tanh"}


def test_another_resampling_in_a_folder_that_we_wrote_is_seen(tmp_path):
    folder, _ = converted(tmp_path, "huggingface")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 3}))
    seen = load_pretrained(folder).preprocessing
    # Of a folder's own preprocessing nothing is left to the info file, with which it may not go.
    assert (seen.interpolation, seen.resize, seen.antialias) == ("bicubic", "huggingface", True)


def test_a_folder_that_transformers_saved_anew_is_what_transformers_reads(tmp_path):
    folder, _ = converted(tmp_path, "huggingface")
    options = {"problem_type": "single_label_classification", "ignore_mismatched_sizes": True}
    module = transformers.ViTForImageClassification.from_pretrained(folder, num_labels=3, **options)
    randomize(module).save_pretrained(folder)
    ours = load_pretrained(folder)
    assert ours.model["num_classes"] == 3 and ours.class_names is None and ours.loss == "softmax"
    assert not ours.preprocessing.antialias
    x = images(32)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "net.backbone."])
def test_a_model_inside_another_module_is_read(tmp_path, prefix):
    module = tiny_timm()
    state = {f"{prefix}{name}": x.half() for name, x in module.state_dict().items()}
    checkpoint = {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": 7}}}}
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    ours = load_pretrained(tmp_path / "last.pth.tar", num_heads=2)
    x = images(32)
    expected = logits_of_torch(module.half().float(), x)
    assert_close(logits_of(ours, x), expected)


def test_the_average_of_a_timm_checkpoint_is_read(tmp_path):
    last, average = tiny_timm(), randomize(tiny_timm(), seed=1)
    checkpoint = {"state_dict": last.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    x = images(32)
    ours = load_pretrained(tmp_path / "last.pth.tar", num_heads=2)
    assert_close(logits_of(ours, x), logits_of_torch(average, x))


def test_several_models_in_one_file_are_refused(tmp_path):
    state = tiny_timm().state_dict()
    two = {
        f"{who}.{name}": x.clone() for who in ("student", "teacher") for name, x in state.items()
    }
    torch.save(two, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds several models, named 'student.'; 'teacher.': save"):
        load_pretrained(tmp_path / "a.pth")
    one = {f"backbone.{name}": x for name, x in state.items()} | {"loss.weight": torch.ones(3)}
    torch.save(one, tmp_path / "b.pth")
    with pytest.raises(UserError, match="holds loss.weight beside the model 'backbone.': save the"):
        load_pretrained(tmp_path / "b.pth")


OTHERS = {
    "DeiT": "a distilled DeiT",
    "Beit": "with LayerScale",
    "Dinov2": "with LayerScale",
    "Dinov2WithRegisters": "register tokens",
    "ViTMAE": "an autoencoder of masked images",
    "CLIPVision": "norm before its layers, as CLIP",
    "SiglipVision": "attention pooling",
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_kinds_are_named(tmp_path, name):
    sizes = transformer(32).to_dict()
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = getattr(transformers, f"{name}Config")(
        **{key: sizes[key] for key in (*keys, "image_size", "patch_size")}
    )
    suffix = {"ViTMAE": "ForPreTraining", "DeiT": "ForImageClassification"}.get(name, "Model")
    getattr(transformers, name + suffix)(config).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=f"is of .*{OTHERS[name]}") as caught:
            load_pretrained(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", [".", "flax_model.msgpack"])
def test_transformers_flax_weights_are_read(tmp_path, named):
    module = randomize(transformers.ViTForImageClassification(transformer(32)))
    module.save_pretrained(tmp_path)
    state = safetensors_torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tree = {}
    for name, x in state.items():  # As transformers' modeling_flax_pytorch_utils renames them.
        *path, leaf = name.split(".")
        x = x.numpy()
        if leaf == "weight" and "layernorm" in path[-1]:
            leaf = "scale"
        elif leaf == "weight":
            leaf, x = "kernel", x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
        tree[(*path, leaf)] = np.ascontiguousarray(x)
    (tmp_path / "flax_model.msgpack").write_bytes(to_bytes(unflatten_dict(tree)))
    x = images(32)
    assert_close(logits_of(load_pretrained(tmp_path / named), x), logits_of_torch(module, x))
