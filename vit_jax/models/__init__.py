"""The models, by the paper's names."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError, brief, brief_name
from vit_jax.models.axial import AxialResNetConfig, AxialViTConfig
from vit_jax.models.base import DTYPES, Model, ModelConfig, type_problem
from vit_jax.models.bit import BiTConfig
from vit_jax.models.hybrid import HybridConfig
from vit_jax.models.vit import ViTConfig

__all__ = ["ARCHITECTURES", "DTYPES", "Model", "ModelConfig", "create_model", "model_config"]

# A family of models a line: what its file says of it, see `ModelConfig`.
ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "vit": ViTConfig,
    "hybrid": HybridConfig,
    "resnet": BiTConfig,
    "axial_vit": AxialViTConfig,
    "axial_resnet": AxialResNetConfig,
}


def model_config(name: str) -> dict[str, Any]:
    """The hyperparameters of a model of the paper, to be passed to `create_model`.

    Args:
        name: "ViT-B/16" and so on, or for example "ViT-8-1024-2048/32", "R50+ViT-B/16", "R152x4",
            "Axial-ViT-B/16" or "AxialResNet50"; see `parse` of the descriptions in `ARCHITECTURES`.

    Raises:
        UserError: the name is of none of these forms.
    """
    # No name is longer, and Python reads no number of thousands of digits.
    for architecture, family in ARCHITECTURES.items() if len(name) <= 100 else ():
        if (fields := family.parse(name)) is not None:
            return {"architecture": architecture, **fields}
    names = ", or ".join(family.names for family in ARCHITECTURES.values())
    raise UserError(f"model {brief(name)} is unknown: use {names}")


def family_of(architecture: str | None) -> type[ModelConfig]:
    """The description of an architecture's models.

    Raises:
        UserError: there is no such architecture.
    """
    family = ARCHITECTURES.get(architecture or "")
    if family is None:
        raise UserError(
            f"model.architecture {architecture!r} is unknown: use {', '.join(ARCHITECTURES)}"
        )
    return family


def recognize(arrays: Mapping[str, np.ndarray]) -> str:
    """The architecture whose parameters these are; a plain ViT if they are nobody's.

    Args:
        arrays: official names, joined by "/".
    """
    names = (name for name, family in ARCHITECTURES.items() if family.recognizes(arrays))
    return next(names, "vit")


def model_fields(architecture: str | None) -> dict[str, dataclasses.Field]:
    """The fields of an architecture's description, by name: the keys of a config beside it."""
    return {field.name: field for field in dataclasses.fields(family_of(architecture))}


def model_keys(architecture: str) -> set[str]:
    """The keys that a model's config may have."""
    return {"architecture", *model_fields(architecture)}


def field_type(field: dataclasses.Field) -> type:
    """The type of a field's values: tuple of `tuple[int, ...]`."""
    return typing.get_origin(field.type) or typing.cast(type, field.type)


def prediction_defaults(architecture: str) -> dict[str, Any]:
    """The default of every field that predictions depend on and that has one."""
    return family_of(architecture).prediction_defaults()


def prediction_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a config's `model` section that predictions depend on."""
    fields = model_fields(config.get("architecture"))
    training_only = {key for key, field in fields.items() if field.metadata.get("training_only")}
    return {key: x for key, x in config.items() if key not in training_only}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's `model` section with the model's default for whatever is None."""
    defaults = prediction_defaults(config["architecture"])
    return {key: defaults.get(key) if x is None else x for key, x in config.items()}


def check_fields(config: Mapping[str, Any]) -> None:
    """Checks the keys of a config's `model` section, or of a part of it, each for itself.

    Raises:
        UserError: a key is none of its architecture's, or a value is of another type, not finite or
            out of its range.
    """
    if not isinstance(config["architecture"], str):
        raise UserError(f"model.architecture {brief(config['architecture'])} is no name")
    fields = model_fields(config["architecture"])
    for key in config.keys() - {"architecture"}:
        if key not in fields:
            raise UserError(f"model.{brief_name(key)} is not a key that anything reads")
        check = fields[key].metadata.get("check")
        problem = type_problem(config[key], field_type(fields[key]))
        if problem := problem or (check and check(config[key])):
            raise UserError(f"model.{key} {problem}")


def describe(config: Mapping[str, Any], **overrides: Any) -> ModelConfig:
    """The description of a model that a config's `model` section gives.

    Args:
        config: `architecture` and the fields of its description; tuples also as the lists that they
            are in JSON. None is the model's default.
        **overrides: replace entries of config.

    Raises:
        UserError: the architecture is unknown, or the description refuses a value.
    """
    fields = with_defaults({**config, **overrides})
    family = family_of(fields.pop("architecture"))
    values: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in fields.items()}
    return family(**values)


def create_model(config: Mapping[str, Any], **overrides: Any) -> Model:
    """Builds the module that a config's `model` section describes, see `describe`."""
    return describe(config, **overrides).build()
