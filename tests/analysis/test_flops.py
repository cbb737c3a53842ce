import pytest

from vit_jax.analysis import flops
from vit_jax.recipes import get_config

# Multiply-adds in units of 1e9 of one forward pass with a 1000-way head, as published.
PUBLISHED = [
    ("ViT-B/16", 224, 17.56),
    ("ViT-B/16", 384, 55.48),
    ("ViT-L/16", 224, 61.56),
    ("ViT-L/16", 384, 191.07),
    ("ViT-H/14", 224, 167.30),
    ("ViT-S/16", 224, 4.60),
]


@pytest.mark.parametrize(("name", "image_size", "giga"), PUBLISHED)
def test_multiply_adds_are_the_published_ones(name, image_size, giga):
    model = get_config(name, "finetune,cifar10").model
    assert flops.multiply_adds(model, image_size, 1000) / 1e9 == pytest.approx(giga, abs=0.01)


def test_the_pretraining_head_adds_its_hidden_layer():
    model = get_config("ViT-B/16").model
    without = model.copy_and_resolve_references()
    without.representation_size = 0
    added = flops.multiply_adds(model, 224, 1000) - flops.multiply_adds(without, 224, 1000)
    assert added == 768 * 768


def test_global_average_pooling_has_one_token_less():
    model = get_config("ViT-B/16", "finetune,cifar10").model
    with_token = flops.multiply_adds(model, 224, 1000)
    model.classifier = "gap"
    saved = with_token - flops.multiply_adds(model, 224, 1000)
    assert saved == 12 * (768 * (4 * 768 + 2 * 3072) + 2 * 768 * (197**2 - 196**2))


def test_peak_is_known_by_device_kind():
    assert flops.peak_flops("NVIDIA H200") == 989e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA L4") == 121e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    for unknown in ("cpu", "NVIDIA L40", "NVIDIA GB200"):
        assert flops.peak_flops(unknown) is None
