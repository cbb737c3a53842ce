import pathlib

import pytest
from flax.traverse_util import flatten_dict

from vit_jax.export import forward


@pytest.mark.parametrize("name", ["ViT-Ti/16", "R50x1"])
def test_features_are_exported_without_the_head(make_forward, name):
    options = {"image_size": 32, "weights": "shared"}
    whole, trunk = (
        {"/".join(path) for path in flatten_dict(make_forward(name, **options, **kind).params)}
        for kind in ({}, {"outputs": "features"})
    )
    assert trunk < whole
    assert all("head/" in name for name in whole - trunk)
    assert not any("head/" in name for name in trunk)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/runs/flowers/best/40", "flowers/best/40"),
        ("/data/runs/flowers/checkpoints/1000", "flowers/checkpoints/1000"),
        ("weights/b16.npz", "b16.npz"),
    ],
)
def test_metadata_names_a_step_with_its_run(source, name):
    assert forward._name(pathlib.Path(source)) == name
