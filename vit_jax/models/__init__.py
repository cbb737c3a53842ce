"""The models, by the paper's names."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer

# Table 1; Ti and S are from later work (DeiT, AugReg).
SIZES = {
    "Ti": {"hidden_size": 192, "num_layers": 12, "mlp_dim": 768, "num_heads": 3},
    "S": {"hidden_size": 384, "num_layers": 12, "mlp_dim": 1536, "num_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "mlp_dim": 3072, "num_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "mlp_dim": 4096, "num_heads": 16},
    "H": {"hidden_size": 1280, "num_layers": 32, "mlp_dim": 5120, "num_heads": 16},
}
ARCHITECTURES = {"vit": VisionTransformer}
DTYPES = ("float32", "bfloat16")


def architecture(name: str) -> dict[str, Any]:
    """The hyperparameters of a model of the paper, to be passed to `create_model`.

    Args:
        name: "ViT-B/16" and so on: any size of Table 1 (or Ti, S) with any patch size.

    Raises:
        UserError: the name is not of that form.
    """
    match = re.fullmatch(rf"ViT-({'|'.join(SIZES)})/([1-9]\d*)", name)
    if not match:
        raise UserError(
            f"model {name!r} is unknown: use ViT-SIZE/PATCH with SIZE one of {', '.join(SIZES)}, "
            "for example ViT-B/16"
        )
    size, patch_size = match.groups()
    return {"architecture": "vit", "patch_size": int(patch_size), **SIZES[size]}


def model_keys(architecture: str) -> set[str]:
    """The keys that a model's config may have: the fields of its module."""
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"model.architecture {architecture!r} is unknown: use {', '.join(ARCHITECTURES)}"
        )
    fields = {field.name for field in dataclasses.fields(ARCHITECTURES[architecture])}
    return {"architecture"} | fields - {"parent", "name"}


def check_types(config: Mapping[str, Any]) -> None:
    """Checks the keys of an architecture and some of its hyperparameters, and their types.

    Raises:
        UserError: a key is none of its architecture's, or a value is of another type.
    """
    valid = model_keys(config["architecture"])
    fields = dataclasses.fields(ARCHITECTURES[config["architecture"]])
    fields = {field.name: field.type for field in fields}
    for key in config.keys() - {"architecture"}:
        if key not in valid:
            raise UserError(f"model.{key} is not a key that anything reads")
        kind = (int, float) if fields[key] is float else fields[key]
        if isinstance(kind, type | tuple) and not isinstance(config[key], kind):
            raise UserError(
                f"model.{key} is {config[key]!r}: it must be of type {fields[key].__name__}"
            )


def create_model(config: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """Builds the module that a config's `model` section describes.

    Args:
        config: `architecture` and the fields of its module; `dtype` as a string.
        **overrides: replace entries of config.

    Raises:
        UserError: the architecture or the dtype is unknown.
    """
    config = {"dtype": "float32", **config, **overrides}
    if config["dtype"] not in DTYPES:
        raise UserError(f"model.dtype {config['dtype']!r} is unknown: use {' or '.join(DTYPES)}")
    config["dtype"] = jnp.dtype(config["dtype"])
    return ARCHITECTURES[config.pop("architecture")](**config)
