"""Whole models against Transformers' own, every tensor random, both ways."""

import dataclasses
import json

import numpy as np
import pytest

from vit_jax.checkpoints import foreign_configs, huggingface_config
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.errors import UserError

from .torch_models import (
    PHOTOGRAPHS,
    assert_close,
    assert_same_tensors,
    assert_same_view,
    images,
    logits_of,
    logits_of_torch,
    randomize,
    safetensors_torch,
    torch,
    transformer,
    transformers,
)


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


def test_a_transformers_model_of_images_that_are_no_squares_agrees_both_ways(tmp_path):
    size = [16, 40]
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 40})
    ours, again = transformers_round_trip(tmp_path, transformer(size), processor)
    assert ours.preprocessing.image_size == "16x40" and again.config.image_size == size
    cropped = dataclasses.replace(ours.preprocessing, center_crop=0.875)
    with pytest.raises(UserError, match="image_size is 16x40, but what Hugging Face's processors"):
        save_pretrained(
            dataclasses.replace(ours, preprocessing=cropped), tmp_path / "no", "huggingface"
        )
    assert not (tmp_path / "no").exists()


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


def test_every_field_of_transformers_config_is_known():
    known = {
        *huggingface_config.FIXED,
        *huggingface_config.READ,
        *huggingface_config.SHAPES,
        *huggingface_config.OF_HEADS,
    }
    assert transformers.ViTConfig().to_dict().keys() <= known | {*huggingface_config.HARMLESS}


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
