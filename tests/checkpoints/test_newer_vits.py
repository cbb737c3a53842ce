"""DeiT, DeiT III, DINOv2, SigLIP and torchvision's ViT against timm, Transformers and torchvision.

Every tensor is random, so that a swapped pair cannot hide.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoints.conversion import convert
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.errors import UserError

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

TIMM = {
    "DeiT": ("deit_tiny_distilled_patch16_224", {}, {"distillation_token": True}),
    "DeiT III": ("deit3_small_patch16_224", {}, {"layer_scale": 1e-6}),
    "DINOv2": ("vit_small_patch14_dinov2", {"num_classes": 0}, {"layer_scale": 1e-5}),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"num_classes": 0},
        {"num_registers": 4, "layer_scale": 1e-5},
    ),
    "registers with positions": (
        "vit_small_patch16_224",
        {"reg_tokens": 3},
        {"num_registers": 3, "layer_scale": 0.0},
    ),
    "SwiGLU": (
        "vit_giant_patch14_dinov2",
        {"num_classes": 0, "mlp_ratio": 4},
        {"mlp": "swiglu", "mlp_dim": 32, "layer_scale": 1e-5},
    ),
    "SigLIP": ("vit_base_patch16_siglip_224", {"num_classes": 0}, {"classifier": "map"}),
    "SigLIP with a head": (
        "vit_base_patch32_siglip_256",
        {},
        {"classifier": "map", "gelu": "tanh"},
    ),
}


def tiny(name, **options):
    options = TINY | {"embed_dim": 16, "img_size": 56 if "14" in name else 64} | options
    return randomize(timm.create_model(name, **options))


@pytest.mark.parametrize("case", TIMM)
def test_a_model_of_timm_agrees_both_ways(tmp_path, case):
    name, options, expected = TIMM[case]
    module = tiny(name, **options)
    timm.models.save_for_hf(module, tmp_path / "theirs", safe_serialization=True)
    ours = load_pretrained(tmp_path / "theirs", num_heads=2)
    assert expected.items() <= ours.model.items()
    x = images(ours.preprocessing.image_size)
    assert_close(logits_of(ours, x), logits_of_torch(module, x))
    for path, format in (("a.safetensors", "timm"), ("b.npz", "official"), ("folder", "timm")):
        assert convert(ours, str(tmp_path / path), format) == (0, 0)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    np.testing.assert_allclose(logits_of_torch(again, x), logits_of_torch(module, x), atol=1e-6)
