"""The names of the newer ViTs, as timm and Transformers publish them, to ours and back.

Values are compared with those libraries in test_newer_vits.py; this needs neither.
"""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints import layouts, torch_names
from vit_jax.checkpoints.pretrained import abstract_params
from vit_jax.errors import UserError

from .small_model import MODEL

LAYER = "encoder.layer.0."
CASES = {
    "DeiT": (
        {"distillation_token": True},
        {"timm": {"dist_token": (1, 1, 16), "head_dist.weight": (3, 16), "pos_embed": (1, 6, 16)},
         "huggingface": {"deit.embeddings.distillation_token": (1, 1, 16),
                         "cls_classifier.bias": (3,), "distillation_classifier.bias": (3,)}},
    ),
    "DINOv2": (
        {"layer_scale": 0.1, "num_classes": 0},
        {"timm": {"blocks.0.ls1.gamma": (16,), "blocks.0.ls2.gamma": (16,)},
         "huggingface": {LAYER + "norm1.weight": (16,), LAYER + "mlp.fc1.weight": (32, 16),
                         LAYER + "layer_scale2.lambda1": (16,), "layernorm.bias": (16,)}},
    ),
    "registers and SwiGLU": (
        {"layer_scale": 0.1, "num_registers": 3, "mlp": "swiglu", "num_classes": 0},
        {"timm": {"reg_token": (1, 3, 16), "blocks.0.mlp.fc1.weight": (64, 16)},
         "huggingface": {"embeddings.register_tokens": (1, 3, 16),
                         "embeddings.position_embeddings": (1, 5, 16),
                         LAYER + "mlp.weights_in.bias": (64,),
                         LAYER + "mlp.weights_out.weight": (16, 32)}},
    ),
    "SigLIP": (
        {"classifier": "map", "num_classes": 0},
        {"timm": {"attn_pool.latent": (1, 1, 16), "attn_pool.kv.weight": (32, 16)},
         "huggingface": {"vision_model.embeddings.position_embedding.weight": (4, 16),
                         "vision_model.head.attention.in_proj_weight": (48, 16),
                         "vision_model.encoder.layers.0.self_attn.q_proj.bias": (16,),
                         "vision_model.post_layernorm.bias": (16,)}},
    ),
}  # fmt: skip


def random_arrays(**options):
    shapes = flatten_dict(abstract_params(MODEL | options, 16), sep="/")
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("format", ["timm", "huggingface"])
@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_the_published_ones_and_go_back(case, format):
    options, expected = CASES[case]
    ours = random_arrays(**options)
    theirs = layouts.from_official(ours, format)
    assert {name: theirs[name].shape for name in expected[format]} == expected[format]
    read = torch_names.to_timm(torch_names.unwrap(torch_names.without_text(theirs)))
    assert torch_names.other_model(read) is None
    assert layouts.detect_format(read) == format
    again = layouts.to_official(read, format, num_heads=2)
    assert again.keys() == ours.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer_scale": 0.1, "distillation_token": True},
            "no model with a distillation token and La",
        ),
        ({"num_registers": 2}, "no model with registers and no other part: use"),
        ({"mlp": "swiglu"}, "no model with SwiGLU and no other part: use --fo"),
        ({"layer_scale": 0.1}, "dinov2 has no such head, of which its own reads the mean of the"),
        ({"classifier": "map"}, "siglip_vision_model has no such head"),
    ],
)
def test_what_transformers_has_no_place_for_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        layouts.from_official(random_arrays(**options), "huggingface")


def test_positions_of_registers_are_added_to_them():
    ours = random_arrays(num_registers=2, num_classes=0)
    theirs = layouts.from_official(ours, "timm")
    of_registers = np.arange(32, dtype=np.float32).reshape(1, 2, 16)
    theirs["pos_embed"][:, 1:3] = of_registers
    again = layouts.to_official(theirs, "timm", num_heads=2)
    np.testing.assert_allclose(again["register"], ours["register"] + of_registers)
    name = "Transformer/posembed_input/pos_embedding"
    np.testing.assert_array_equal(again[name], ours[name])


def test_timm_counts_the_stages_and_units_of_a_hybrid_from_zero():
    ours = random_arrays(architecture="hybrid", resnet_layers=(1, 1, 2), patch_size=1)
    theirs = layouts.from_official(ours, "timm")
    kernels = {name for name in theirs if name.endswith(".conv1.weight")}
    units = ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1")
    assert kernels == {f"patch_embed.backbone.stages.{unit}.conv1.weight" for unit in units}
    again = layouts.to_official(theirs, "timm", num_heads=2)
    assert again.keys() == ours.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
