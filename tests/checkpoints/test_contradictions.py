"""Configurations that are not of the weights beside them, or of no model: one line each."""

import copy
import functools
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints import foreign_configs, layouts
from vit_jax.checkpoints.formats.safetensors import write_safetensors
from vit_jax.checkpoints.model_info import info_from_run
from vit_jax.checkpoints.pretrained import abstract_params, load_pretrained
from vit_jax.config import to_dict
from vit_jax.errors import UserError
from vit_jax.recipes import get_config

from .small_model import INFO, MODEL


@pytest.fixture(scope="module")
def weights():
    shapes = flatten_dict(abstract_params(MODEL, 16), sep="/")
    tree = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    return {format: layouts.from_official(tree, format) for format in ("huggingface", "timm")}


def write(folder, format, weights, file, key, value):
    documents = copy.deepcopy(foreign_configs.config_files(INFO, format))
    *sections, name = key.split(".")
    functools.reduce(dict.get, sections, documents[file])[name] = value
    for written, document in documents.items():
        (folder / written).write_text(json.dumps(document))
    write_safetensors(folder / "model.safetensors", weights[format])


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SQUARE, OBLONG = {"height": 384, "width": 384}, {"height": 8, "width": 16}


@pytest.mark.parametrize(
    ("format", "file", "key", "value", "message"),
    [
        ("huggingface", CONFIG, "num_attention_heads", True, "num_attention_heads is True: it mu"),
        ("huggingface", CONFIG, "num_attention_heads", 2.5, "num_attention_heads is 2.5: it must"),
        ("huggingface", CONFIG, "num_attention_heads", "2", "num_attention_heads is '2': it must"),
        ("huggingface", CONFIG, "num_attention_heads", 3, "which no ViT with num_heads 3 has: use"),
        ("huggingface", CONFIG, "hidden_size", 2**40, "hidden_size is 1099511627776: it must be a"),
        ("huggingface", CONFIG, "hidden_size", 32, "hidden_size is 32, but by the shapes of the"),
        ("huggingface", CONFIG, "intermediate_size", 64, "intermediate_size is 64, but by the sha"),
        ("huggingface", CONFIG, "num_hidden_layers", 2, "num_hidden_layers is 2, but by the shape"),
        ("huggingface", CONFIG, "patch_size", [16, 16], "patch_size is 16, but by the shapes of t"),
        ("huggingface", CONFIG, "num_labels", 1000, "num_labels is 1000, but by the shapes of the"),
        ("huggingface", CONFIG, "image_size", 10**6, "image_size is 1000000, but by the shapes of"),
        ("huggingface", CONFIG, "layer_norm_eps", float("nan"), "layer_norm_eps is nan: it must"),
        ("huggingface", CONFIG, "layer_norm_eps", "1e-6", "layer_norm_eps is '1e-6': it must be"),
        ("huggingface", PROCESSOR, "do_normalize", "no", "do_normalize is 'no': it must be true o"),
        ("huggingface", PROCESSOR, "size", {"shortest_edge": 10**5}, "is cut from 100000 pixels: "),
        ("huggingface", PROCESSOR, "crop_size", 10**6, "crop_size 1000000 is above size 18: padd"),
        ("huggingface", PROCESSOR, "crop_size", SQUARE, "crop_size 384 is above size 18: padding"),
        ("huggingface", PROCESSOR, "crop_size", OBLONG, "crop_size is 8 x 16: only square images"),
        ("huggingface", PROCESSOR, "image_std", [1e-300] * 3, "is not positive, of at least 1e-6"),
        ("huggingface", PROCESSOR, "image_mean", [True] * 3, "is not numbers of at most 1e6"),
        ("timm", CONFIG, "model_args.embed_dim", 32, "embed_dim is 32, but by the shapes of the w"),
        ("timm", CONFIG, "model_args.depth", 2**40, "depth is 1099511627776: it must be a whole n"),
        ("timm", CONFIG, "model_args.depth", True, "depth is True: it must be a whole number from"),
        ("timm", CONFIG, "model_args.mlp_ratio", 4, "mlp_ratio 4 of width 16 is not the MLP width"),
        ("timm", CONFIG, "model_args.mlp_ratio", float("inf"), "mlp_ratio is inf: it must be a fi"),
        ("timm", CONFIG, "model_args.num_heads", True, "num_heads is True: it must be a whole num"),
        ("timm", CONFIG, "model_args.num_classes", 4, "num_classes is 4, but by the shapes of the"),
        ("timm", CONFIG, "model_args.in_chans", 4, "in_chans is 4, but by the shapes of the weig"),
        ("timm", CONFIG, "model_args.patch_size", 16, "patch_size is 16, but by the shapes of th"),
        ("timm", CONFIG, "model_args.img_size", 10**6, "image_size is 1000000: it must be a whole"),
        ("timm", CONFIG, "num_features", 8, "num_features is 8, but by the shapes of the weights"),
        ("timm", CONFIG, "label_names", "abc", "label_names is 'abc': it must be a list of names"),
        ("timm", CONFIG, "pretrained_cfg.crop_pct", 1e-3, "is cut from 16000 pixels: at most 1"),
    ],
)  # fmt: skip
def test_a_configuration_of_another_model_is_refused(
    weights, tmp_path, format, file, key, value, message
):
    write(tmp_path, format, weights, file, key, value)
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path)
    line = str(caught.value)
    assert message in line and line.isprintable() and str(tmp_path) in line


def test_a_configuration_of_something_else_is_none_of_the_file_beside_it(weights, tmp_path):
    write_safetensors(tmp_path / "a.safetensors", weights["timm"])
    (tmp_path / CONFIG).write_text('{"num_features": 8}')
    assert load_pretrained(tmp_path / "a.safetensors", num_heads=2).model["hidden_size"] == 16


def test_positions_of_no_square_need_the_size_of_the_images(tmp_path):
    shapes = flatten_dict(abstract_params(MODEL, "16x24"), sep="/")
    tree = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    write_safetensors(tmp_path / "a.safetensors", layouts.from_official(tree, "timm"))
    with pytest.raises(UserError, match="has 7 tokens, which are no square of patches: write"):
        load_pretrained(tmp_path / "a.safetensors", num_heads=2)


@pytest.mark.parametrize("format", ["huggingface", "timm"])
def test_the_configuration_of_the_weights_is_read(weights, tmp_path, format):
    write(tmp_path, format, weights, CONFIG, "architectures", ["any"])
    assert MODEL.items() <= load_pretrained(tmp_path).model.items()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"model": {"num_heads": True}}, "model.num_heads is True: it must be of type int"),
        ({"model": {"hidden_size": 2**40}}, "model.hidden_size is 1099511627776: it must be at m"),
        ({"model": {"hidden_size": 32}}, "hidden_size is 32 by what is said of it, 16 by its sha"),
        ({"model": {"layer_norm_epsilon": float("nan")}}, "model.layer_norm_epsilon is nan: it mu"),
        ({"model": {"architecture": ["vit"]}}, "model.architecture ['vit'] is no name"),
        ({"class_names": "abc"}, "class_names is 'abc': it must be a list of names"),
        (
            {"preprocessing": {"image_size": 16.0}},
            "image_size is 16.0: it must be a whole number fr",
        ),
        (
            {"preprocessing": {"image_size": True}},
            "image_size is True: it must be a whole number fr",
        ),
        ({"preprocessing": {"image_size": 16, "antialias": "no"}}, "antialias 'no' is none of Fal"),
    ],
)
def test_an_info_file_of_another_model_is_refused(weights, tmp_path, document, message):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, weights["timm"])
    (tmp_path / "a.safetensors.json").write_text(
        json.dumps({**document, "model": {"num_heads": 2, **document.get("model", {})}})
    )
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    assert message in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_heads", True, "model.num_heads is True: it must be of type int"),
        ("model.hidden_size", 2**40, "model.hidden_size is 1099511627776: it must be at most"),
        ("model", 3, "the config beside the weights is none of a run"),
        ("dataset", {}, "the config beside the weights is none of a run ('protocol')"),
        ("dataset.image_size", 10**6, "image_size is 1000000: it must be a whole number"),
    ],
)
def test_the_config_in_a_checkpoint_is_checked(key, value, message):
    config = to_dict(get_config("ViT-B/16", "pretrain,digits"))
    assert info_from_run({"config": config}).model["hidden_size"] == 768
    *sections, name = key.split(".")
    functools.reduce(dict.get, sections, config)[name] = value
    with pytest.raises(UserError) as caught:
        info_from_run({"config": config})
    assert message in str(caught.value)
