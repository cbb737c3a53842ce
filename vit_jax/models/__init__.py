"""The models, by the paper's names."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.axial import AxialResNet, AxialVisionTransformer
from vit_jax.models.hybrid import HybridVisionTransformer
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import VisionTransformer

# Table 1; Ti and S are from later work (DeiT, AugReg). b, of Figure 4, is B with every hidden size
# halved, which is S: with half the heads, as all these have heads of 64 (H of 80).
SIZES = {
    "Ti": {"hidden_size": 192, "num_layers": 12, "mlp_dim": 768, "num_heads": 3},
    "S": {"hidden_size": 384, "num_layers": 12, "mlp_dim": 1536, "num_heads": 6},
    "b": {"hidden_size": 384, "num_layers": 12, "mlp_dim": 1536, "num_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "mlp_dim": 3072, "num_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "mlp_dim": 4096, "num_heads": 16},
    "H": {"hidden_size": 1280, "num_layers": 32, "mlp_dim": 5120, "num_heads": 16},
}
HEAD_SIZE = 64
# The stem of a hybrid and the suffix of its name. The suffix is the total downsampling, but for
# R+ViT-Ti/16 of AugReg: its published weights have patches of 8 x 8 on the root's stride of 4.
STEMS = {
    ("R50", "32"): {"resnet_layers": (3, 4, 6, 3), "patch_size": 1},
    ("R50", "16"): {"resnet_layers": (3, 4, 9), "patch_size": 1},
    ("R26", "32"): {"resnet_layers": (2, 2, 2, 2), "patch_size": 1},
    ("R", "16"): {"resnet_layers": (), "patch_size": 8},
}
# Units of the stages of a ResNet (BiT), by its depth: of "R50x1".
RESNETS = {
    "R50": (3, 4, 6, 3),
    "R101": (3, 4, 23, 3),
    "R152": (3, 8, 36, 3),
    "R200": (3, 24, 36, 3),
}
ARCHITECTURES = {
    "vit": VisionTransformer,
    "hybrid": HybridVisionTransformer,
    "resnet": ResNet,
    "axial_vit": AxialVisionTransformer,
    "axial_resnet": AxialResNet,
}
DTYPES = ("float32", "bfloat16")


def architecture(name: str) -> dict[str, Any]:
    """The hyperparameters of a model of the paper, to be passed to `create_model`.

    Args:
        name: "ViT-B/16" and so on: any size of Table 1 (or Ti, S, b) with any patch size. Or any
            shape, as layers, width and MLP width: "ViT-8-1024-2048/32" is where Appendix D.2
            starts; heads are of 64, the width a multiple of that. Or a hybrid: "R50+ViT-B/16",
            "R26+ViT-S/32", "R+ViT-Ti/16" and so on, any size on one of STEMS. Or a ResNet (BiT):
            "R152x4" and so on, any depth of RESNETS, any number of times as wide. Or an axial model
            of Appendix D.6: "Axial-ViT-B/16" and so on, any size, or "AxialResNet50".

    Raises:
        UserError: the name is not of that form.
    """
    if match := re.fullmatch(rf"({'|'.join(RESNETS)})x([1-9]\d*)", name):
        layers = {"resnet_layers": RESNETS[match[1]], "width_factor": int(match[2])}
        return {"architecture": "resnet", **layers, "group_norm_epsilon": 1e-5}
    if match := re.fullmatch(r"ViT-([1-9]\d*)-([1-9]\d*)-([1-9]\d*)/([1-9]\d*)", name):
        num_layers, hidden_size, mlp_dim, patch_size = map(int, match.groups())
        if hidden_size % HEAD_SIZE:
            raise UserError(f"model {name!r} has a width that is not a multiple of {HEAD_SIZE}")
        return {
            "architecture": "vit",
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "mlp_dim": mlp_dim,
            "num_heads": hidden_size // HEAD_SIZE,
        }
    if (match := re.fullmatch(r"AxialResNet(\d+)", name)) and f"R{match[1]}" in RESNETS:
        layers = RESNETS[f"R{match[1]}"]
        return {
            "architecture": "axial_resnet",
            "resnet_layers": layers,
            "group_norm_epsilon": 1e-4,
        }
    if match := re.fullmatch(rf"Axial-ViT-({'|'.join(SIZES)})/([1-9]\d*)", name):
        axial = {"architecture": "axial_vit", "classifier": "gap"}
        return {**axial, "patch_size": int(match[2]), **SIZES[match[1]]}
    match = re.fullmatch(rf"(?:(R\d*)\+)?ViT-({'|'.join(SIZES)})/([1-9]\d*)", name)
    stem, size, suffix = match.groups() if match else (None, None, None)
    if stem and (stem, suffix) in STEMS:
        stem_config = {**STEMS[stem, suffix], "group_norm_epsilon": 1e-6}
        return {"architecture": "hybrid", **stem_config, **SIZES[size]}
    if stem or not match:
        hybrids = ", ".join(f"{stem}+ViT-SIZE/{suffix}" for stem, suffix in STEMS)
        raise UserError(
            f"model {name!r} is unknown: use ViT-SIZE/PATCH with SIZE one of {', '.join(SIZES)}, "
            f"for example ViT-B/16, or ViT-LAYERS-WIDTH-MLP/PATCH, or {hybrids}, or DEPTHxWIDTH "
            f"with DEPTH one of {', '.join(RESNETS)}, for example R50x1, or "
            "Axial-ViT-SIZE/PATCH, or AxialResNet50"
        )
    return {"architecture": "vit", "patch_size": int(suffix), **SIZES[size]}


def model_keys(architecture: str) -> set[str]:
    """The keys that a model's config may have: the fields of its module."""
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"model.architecture {architecture!r} is unknown: use {', '.join(ARCHITECTURES)}"
        )
    fields = {field.name for field in dataclasses.fields(ARCHITECTURES[architecture])}
    return {"architecture"} | fields - {"parent", "name"}


# Fields that only training reads.
TRAINING_FIELDS = (
    "attention_dropout_rate",
    "dropout_rate",
    "dtype",
    "head_bias_init",
    "remat",
    "scan_layers",
    "stochastic_depth",
)


def prediction_defaults(architecture: str) -> dict[str, Any]:
    """The default of every field that predictions depend on and that has one."""
    return {
        field.name: field.default
        for field in dataclasses.fields(ARCHITECTURES[architecture])
        if field.name in model_keys(architecture)
        and field.name not in TRAINING_FIELDS
        and field.default is not dataclasses.MISSING
    }


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's `model` section with the model's default for whatever is None."""
    defaults = prediction_defaults(config["architecture"])
    return {key: defaults.get(key) if x is None else x for key, x in config.items()}


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
        config: `architecture` and the fields of its module; `dtype` as a string, tuples also as
            the lists that they are in JSON. None is the model's default.
        **overrides: replace entries of config.

    Raises:
        UserError: the architecture or the dtype is unknown.
    """
    config = with_defaults({"dtype": "float32", **config, **overrides})
    if config["dtype"] not in DTYPES:
        raise UserError(f"model.dtype {config['dtype']!r} is unknown: use {' or '.join(DTYPES)}")
    config["dtype"] = jnp.dtype(config["dtype"])
    if "resnet_layers" in config:
        config["resnet_layers"] = tuple(config["resnet_layers"])
    return ARCHITECTURES[config.pop("architecture")](**config)
