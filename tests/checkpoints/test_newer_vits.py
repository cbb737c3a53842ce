"""DeiT, DeiT III, DINOv2, SigLIP and torchvision's ViT against timm, Transformers and torchvision.

Every tensor is random, so that a swapped pair cannot hide.
"""

import functools
import json

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoints.interpolation import interpolate
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params, load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError

from .small_model import MODEL
from .torch_models import (
    TINY,
    assert_close,
    assert_same_tensors,
    images,
    logits_of,
    logits_of_torch,
    randomize,
    safetensors_torch,
    timm,
    torch,
    transformers,
)

REGISTERS = {"num_classes": 0, "patch_size": 16}
# Where scales began is in no file: 1e-5 stands for any.
TIMM = {
    "DeiT": ("deit_tiny_distilled_patch16_224", {}, {"distillation_token": True}),
    "DeiT III": ("deit3_small_patch16_224", {}, {"layer_scale": 1e-5}),
    "DINOv2": ("vit_small_patch14_dinov2", REGISTERS, {"layer_scale": 1e-5}),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        REGISTERS,
        {"num_registers": 4, "layer_scale": 1e-5},
    ),
    "registers with positions": (
        "vit_small_patch16_224",
        {"reg_tokens": 3},
        {"num_registers": 3, "layer_scale": 0.0},
    ),
    "SwiGLU": (
        "vit_giant_patch14_dinov2",
        REGISTERS | {"mlp_ratio": 4},
        {"mlp": "swiglu", "mlp_dim": 32, "layer_scale": 1e-5},
    ),
    "SigLIP": ("vit_base_patch16_siglip_224", {"num_classes": 0}, {"classifier": "map"}),
    "SigLIP, tanh": ("vit_base_patch32_siglip_256", {}, {"classifier": "map", "gelu": "tanh"}),
}


def tiny_timm(case):
    name, options, _ = TIMM[case]
    options = TINY | {"img_size": 64} | options
    return randomize(timm.create_model(name, **options))


def assert_same_again(ours, path, format):
    save_pretrained(ours, path, format)
    again = load_pretrained(path)
    assert again.model == ours.model and again.preprocessing == ours.preprocessing
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


@pytest.mark.parametrize("case", TIMM)
def test_a_model_of_timm_agrees_both_ways(tmp_path, case):
    module = tiny_timm(case)
    timm.models.save_for_hf(module, tmp_path / "theirs", safe_serialization=True)
    ours = load_pretrained(tmp_path / "theirs", num_heads=2)
    assert TIMM[case][2].items() <= ours.model.items()
    x = images(64)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
    for path, format in (("a.safetensors", "timm"), ("b.npz", "official"), ("folder", "timm")):
        assert_same_again(ours, tmp_path / path, format)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    np.testing.assert_allclose(logits_of_torch(again, x), logits_of_torch(module, x), atol=1e-6)


SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip
HUGGING_FACE = {
    "DeiTForImageClassificationWithTeacher": {"intermediate_size": 32, "num_labels": 3},
    "Dinov2Model": {"mlp_ratio": 2, "layerscale_value": 0.5},
    "Dinov2WithRegistersModel": {"mlp_ratio": 3, "use_swiglu_ffn": True, "num_register_tokens": 3},
    "SiglipVisionModel": {"intermediate_size": 32},
}


def tiny_transformer(name, **options):
    config = name.removesuffix("Model").removesuffix("ForImageClassificationWithTeacher")
    config = getattr(transformers, f"{config}Config")(**SIZES | HUGGING_FACE[name] | options)
    return randomize(getattr(transformers, name)(config))


def output_of(module, x, **options):
    with torch.no_grad():
        found = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), **options)
    return getattr(found, "logits", getattr(found, "pooler_output", None)).numpy()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_model_of_transformers_agrees_both_ways(tmp_path, name):
    module = tiny_transformer(name)
    module.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    x = images(32)
    assert_close(logits_of(ours, x), output_of(module, x))
    assert_same_again(ours, tmp_path / "folder", "huggingface")
    again, told = type(module).from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    np.testing.assert_array_equal(output_of(again.eval(), x), output_of(module, x))


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("side", [16, 24])
def test_dinov2_sees_the_smaller_images_of_its_folder_as_in_transformers(tmp_path, registers, side):
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    module = tiny_transformer(name, image_size=40)
    module.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": side, "width": side}
    )
    processor.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert ours.preprocessing.image_size == side
    x = images(side)
    assert_close(logits_of(ours, x), output_of(module, x))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(37, (16, 16)), (4, (7, 3)), (5, (5, 5))])
def test_positions_are_interpolated_as_by_torch(antialias, old, new):
    positions = np.random.default_rng(0).normal(size=(1, 1 + old**2, 3)).astype(np.float32)
    grid = torch.from_numpy(positions[:, 1:].reshape(1, old, old, 3)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=new, mode="bicubic", align_corners=False, antialias=antialias
    )
    found = interpolate(positions, 1, new, antialias=antialias)
    np.testing.assert_array_equal(found[:, 0], positions[:, 0])
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 3).numpy()
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)


def test_the_heads_of_a_distilled_deit_are_those_of_timm(tmp_path):
    module = tiny_timm("DeiT")
    safetensors_torch.save_file(module.state_dict(), tmp_path / "a.safetensors")
    ours = load_pretrained(tmp_path / "a.safetensors", num_heads=2)
    assert ours.preprocessing.mean == (0.485, 0.456, 0.406)
    module.set_distilled_training()
    module.train()  # No dropout and no stochastic depth.
    x = images(64)
    with torch.no_grad():
        expected = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    model, variables = models.create_model(ours.model), {"params": ours.params}
    heads = jax.jit(lambda variables: model.apply(variables, x, method="heads"))(variables)
    for found, wanted in zip(heads, expected, strict=True):
        assert_close(np.asarray(found), wanted.numpy())


def test_a_whole_siglip_is_read_without_its_text(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "vocab_size": 9}
    vision = SIZES | HUGGING_FACE["SiglipVisionModel"]
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    module = randomize(transformers.SiglipModel(config))
    module.save_pretrained(tmp_path)
    x = images(32)
    assert_close(logits_of(load_pretrained(tmp_path), x), output_of(module.vision_model, x))


def published_names(state, table):
    for theirs, published in table.items():
        state = {name.replace(theirs, published): x for name, x in state.items()}
    return state


# The models' own files call otherwise what timm, and Hugging Face in memory, call so.
PUBLISHED = {
    "DeiT III": {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"},
    "DINOv2": {},
    "SwiGLU": {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."},
}


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_the_models_own_files_are_read(tmp_path, case, prefix):
    module = tiny_timm(case)
    state = published_names(module.state_dict(), PUBLISHED[case])
    state |= {} if case == "DeiT III" else {"mask_token": torch.zeros(1, 16)}
    state = {prefix + name: x for name, x in state.items()}
    beside = {"teacher.dino_head.mlp.0.weight": torch.ones(2, 2)} if "teacher" in prefix else {}
    safetensors_torch.save_file(state | beside, tmp_path / "a.safetensors")
    ours = load_pretrained(tmp_path / "a.safetensors", num_heads=2)
    x = images(64)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))


def state_of(case):
    """Random tensors by the names that a file of the model has."""
    if case in TIMM:
        return published_names(tiny_timm(case).state_dict(), PUBLISHED.get(case, {}))
    if case in HUGGING_FACE:
        return tiny_transformer(case).state_dict()
    return tiny_torchvision().state_dict()


@pytest.mark.parametrize("case", [*TIMM, *HUGGING_FACE, "torchvision"])
def test_a_model_inside_any_other_module_is_read_as_on_its_own(tmp_path, case):
    state = state_of(case)

    def read(prefix):
        path = tmp_path / f"{prefix}a.safetensors"
        safetensors_torch.save_file({prefix + name: x for name, x in state.items()}, path)
        return load_pretrained(path, num_heads=2)

    alone = read("")
    for prefix in ("module.", "teacher.", "backbone.", "teacher.backbone.", "model.encoder."):
        inside = read(prefix)
        assert (inside.model, inside.preprocessing) == (alone.model, alone.preprocessing)
        jax.tree.map(np.testing.assert_array_equal, inside.params, alone.params)


@pytest.mark.parametrize("named", ["teacher", "model"])
def test_a_model_in_a_container_is_read(tmp_path, named):
    module = tiny_timm("DeiT")
    other = {"student": randomize(tiny_timm("DeiT"), seed=1).state_dict()}
    torch.save({named: module.state_dict(), **other, "epoch": 3}, tmp_path / "a.pth")
    x = images(64)
    ours = load_pretrained(tmp_path / "a.pth", num_heads=2)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))


def test_a_teacher_beside_a_model_is_not_chosen(tmp_path):
    states = {name: tiny_timm("DeiT").state_dict() for name in ("teacher", "model")}
    torch.save(states, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds several models, named teacher, model: save"):
        load_pretrained(tmp_path / "a.pth")


def tiny_torchvision(seed=0, **options):
    vision = pytest.importorskip("torchvision", exc_type=ImportError).models.vision_transformer
    options = {"num_classes": 5} | options
    return randomize(vision.VisionTransformer(32, 8, 2, 2, 16, 32, **options), seed)


@pytest.mark.parametrize("hidden", [0, 7])
def test_torchvisions_vit_agrees_both_ways(tmp_path, hidden):
    module = tiny_torchvision(representation_size=hidden or None)
    safetensors_torch.save_file(module.state_dict(), tmp_path / "a.safetensors")
    ours = load_pretrained(tmp_path / "a.safetensors", num_heads=2)
    assert (ours.model["gelu"], ours.preprocessing.interpolation) == ("erf", "bilinear")
    assert (ours.model["representation_size"], ours.model["num_classes"]) == (hidden, 5)
    assert ours.preprocessing.mean == (0.485, 0.456, 0.406)
    x = images(32)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
    for path, format in (("b.npz", "official"), ("c.safetensors", "torchvision")):
        assert_same_again(ours, tmp_path / path, format)
    again = tiny_torchvision(1, representation_size=hidden or None)
    again.load_state_dict(safetensors_torch.load_file(tmp_path / "c.safetensors"), strict=True)
    assert_same_tensors(again.state_dict(), module.state_dict())


def test_weights_of_the_paper_give_torchvision_their_logits(tmp_path):
    # Google's conventions and no head, of which the notes of convert say what is to be set.
    model = models.prediction_defaults("vit") | MODEL | {"num_layers": 2, "num_classes": 0}
    model |= {"layer_norm_epsilon": 1e-3, "gelu": "tanh"}
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.float32(0.3 * noise.standard_normal(x.shape)), abstract_params(model, 32)
    )
    ours = Pretrained(params, model, evaluation("bit", 32), None, "softmax", "")
    save_pretrained(ours, tmp_path / "a.safetensors", "torchvision")
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-3)
    module = tiny_torchvision(norm_layer=norm)
    module.heads = torch.nn.Identity()
    for layer in module.encoder.layers:
        layer.mlp[1] = torch.nn.GELU("tanh")
    module.load_state_dict(safetensors_torch.load_file(tmp_path / "a.safetensors"), strict=True)
    x = images(32)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))


def test_older_names_of_torchvision_are_read(tmp_path):
    state = tiny_torchvision().state_dict()
    older = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
    for name, x in (("new", state), ("old", published_names(state, older))):
        safetensors_torch.save_file(x, tmp_path / f"{name}.safetensors")
    new, old = (load_pretrained(tmp_path / f"{x}.safetensors", num_heads=2) for x in ("new", "old"))
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)


def test_what_hugging_face_has_no_place_for_is_refused(tmp_path):
    module = tiny_timm("DeiT III")
    safetensors_torch.save_file(module.state_dict(), tmp_path / "a.safetensors")
    ours = load_pretrained(tmp_path / "a.safetensors", num_heads=2)
    with pytest.raises(UserError, match="dinov2 has no such head, of which its own reads the mean"):
        save_pretrained(ours, tmp_path / "folder", "huggingface")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("Dinov2Model", "use_swiglu_ffn", True, "use_swiglu_ffn is True, which the shapes"),
        ("Dinov2Model", "mlp_ratio", 5, "mlp_ratio is 5, which the shapes of the weights"),
        ("Dinov2Model", "model_type", "vit", "model_type is 'vit', but by the names of the"),
        ("Dinov2Model", "model_type", "beit", "model_type 'beit' is none of vit, deit, dinov2"),
        ("Dinov2WithRegistersModel", "num_register_tokens", 9, "num_register_tokens is 9, which"),
        ("SiglipVisionModel", "vision_use_head", False, "vision_use_head is False: only models"),
    ],
)
def test_a_configuration_of_another_model_is_refused(tmp_path, name, key, value, message):
    tiny_transformer(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_classifier_that_reads_the_patches_too_is_refused(tmp_path):
    config = transformers.Dinov2Config(**SIZES, num_labels=3)
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the classifier of this dinov2 reads the mean of the"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["registers", "SwiGLU", "SigLIP"])
def test_arrays_of_other_shapes_are_refused(tmp_path, case):
    state = tiny_timm(case).state_dict()
    name = {"registers": "reg_token", "SwiGLU": "blocks.1.mlp.fc1.weight"}.get(
        case, "attn_pool.latent"
    )
    state[name] = torch.zeros(5, 5)
    safetensors_torch.save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path / "a.safetensors", num_heads=2)
    assert "\n" not in str(caught.value)
