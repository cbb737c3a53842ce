"""Folders and files of timm's and Transformers' models as people have them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax.serialization import to_bytes
from flax.traverse_util import unflatten_dict

from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data.protocols import Preprocessing, resized_sides
from vit_jax.errors import UserError

from .torch_models import (
    TINY,
    assert_close,
    images,
    logits_of,
    logits_of_torch,
    randomize,
    safetensors_torch,
    save_state,
    timm,
    tiny_timm,
    torch,
    transformer,
    transformers,
)


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
    assert again.resize == format and resized_sides(again) == (side, side)
    assert (again.squash or again.center_crop is None) == (told.squash or crop is None)


def test_a_distillation_token_without_a_head_is_refused(tmp_path):
    module = transformers.DeiTForImageClassification(transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8))  # fmt: skip
    module.save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="a distillation token without a head of its own"):
        load_pretrained(tmp_path / "deit")


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


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("keeps_info", [False, True])
def test_one_label_of_a_sigmoid_does_not_become_several(tmp_path, multi_label, keeps_info):
    folder, ours = converted(tmp_path, "huggingface")
    if multi_label:
        shutil.rmtree(folder)
        save_pretrained(dataclasses.replace(ours, multi_label=True), folder, "huggingface")
    if not keeps_info:
        (folder / "vit_jax.json").unlink()
    assert load_pretrained(folder).multi_label == multi_label
    config = json.loads((folder / "config.json").read_text())
    assert ("problem_type" in config) == multi_label
    if keeps_info:  # As it was written for either before.
        config["problem_type"] = "multi_label_classification"
        (folder / "config.json").write_text(json.dumps(config))
        assert load_pretrained(folder).multi_label == multi_label


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
    "Beit": "with LayerScale",
    "ViTMAE": "an autoencoder of masked images",
    "CLIPVision": "norm before its layers, as CLIP",
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_kinds_are_named(tmp_path, name):
    sizes = transformer(32).to_dict()
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = getattr(transformers, f"{name}Config")(
        **{key: sizes[key] for key in (*keys, "image_size", "patch_size")}
    )
    suffix = {"ViTMAE": "ForPreTraining"}.get(name, "Model")
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
