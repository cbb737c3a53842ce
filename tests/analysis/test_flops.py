import jax
import jax.numpy as jnp
import pytest

from vit_jax.analysis import flops
from vit_jax.models import architecture, create_model
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


# Table 6: exaFLOPs of pre-training on the 303M images of JFT. The two of R50+L/16 contradict each
# other by 3%: 859 is not half of 1668.
TABLE_6 = [
    ("ViT-B/32", 7, 55),
    ("ViT-B/16", 7, 224),
    ("ViT-L/32", 7, 196),
    ("ViT-L/16", 7, 783),
    ("ViT-L/16", 14, 1567),
    ("ViT-H/14", 14, 4262),
    ("R50+ViT-B/32", 7, 106),
    ("R50+ViT-B/16", 7, 274),
    ("R50+ViT-L/32", 7, 246),
    ("R50+ViT-L/16", 7, 859),
    ("R50+ViT-L/16", 14, 1668),
]


@pytest.mark.parametrize(("name", "epochs", "exaflops"), TABLE_6)
def test_multiply_adds_give_the_exaflops_of_table_6(name, epochs, exaflops):
    model = get_config(name, "pretrain,jft").model
    needed = flops.train_flops(flops.multiply_adds(model, 224, 18_291)) * 303e6 * epochs
    assert needed / 1e18 == pytest.approx(exaflops, rel=0.03)


@pytest.mark.parametrize(
    ("name", "image_size", "smaller"),
    [
        ("R26+ViT-S/32", 224, {"resnet_layers": (2, 1), "num_layers": 1}),
        ("R+ViT-Ti/16", 224, {"num_layers": 2}),
        ("ViT-Ti/16", 224, {"num_layers": 2, "classifier": "gap"}),
    ],
)
def test_multiply_adds_are_those_that_xla_counts(name, image_size, smaller):
    config = {**architecture(name), "classifier": "token", "representation_size": 0, **smaller}
    model = create_model(config, num_classes=10)
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = jax.jit(model.apply).lower(variables, images).compile().cost_analysis()
    counted = 2 * 2 * flops.multiply_adds(config, image_size, 10)
    assert counted == pytest.approx(cost["flops"], rel=0.03)


def test_peak_is_known_by_device_kind():
    assert flops.peak_flops("NVIDIA H200") == 989e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA L4") == 121e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    for unknown in ("cpu", "NVIDIA L40", "NVIDIA GB200"):
        assert flops.peak_flops(unknown) is None
