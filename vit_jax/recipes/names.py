"""Names of models: the paper's, those of the official code, and the sizes that they stand for."""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax import models
from vit_jax.models.vit import SIZES
from vit_jax.recipes.paper import LEFT_TO_WEIGHTS

# What the official code and its files of weights call the models, in lower case and without "ViT-",
# "+" and "_": its ViT-B_16 and b16, R50+ViT-B_16 and r50_b16.
OFFICIAL_NAMES = {
    "ti16": "ViT-Ti/16",
    "s16": "ViT-S/16",
    "s32": "ViT-S/32",
    "b16": "ViT-B/16",
    "b32": "ViT-B/32",
    "l16": "ViT-L/16",
    "l32": "ViT-L/32",
    "h14": "ViT-H/14",
    "rti16": "R+ViT-Ti/16",
    "r26s32": "R26+ViT-S/32",
    "r26b32": "R26+ViT-B/32",
    "r50b16": "R50+ViT-B/16",
    "r50b32": "R50+ViT-B/32",
    "r50l16": "R50+ViT-L/16",
    "r50l32": "R50+ViT-L/32",
    "r50x1": "R50x1",
    "r50x2": "R50x2",
    "r101x1": "R101x1",
    "r152x1": "R152x1",
    "r152x2": "R152x2",
    "r152x4": "R152x4",
    "r200x3": "R200x3",
    "axialb16": "Axial-ViT-B/16",
    "axialb32": "Axial-ViT-B/32",
    "axialr50": "AxialResNet50",
}


def model_name(name: str) -> str:
    """The paper's name of a model for one of the official code, any other name as it is.

    big_vision's "B/16" is read too.
    """
    size, slash, _ = name.partition("/")
    if slash and size in SIZES:
        return f"ViT-{name}"
    return OFFICIAL_NAMES.get(re.sub(r"vit-|[+_]", "", name.lower()), name)


def name_of(model: Mapping[str, Any]) -> str | None:
    """The paper's name of the model of these sizes, None if it has none; S is also called b.

    Args:
        model: as `models.model_config` gives it; what else it has is not asked for.
    """
    given = {key: tuple(x) if isinstance(x, list) else x for key, x in model.items()}
    of_patches = [f"ViT-{size}/{given['patch_size']}" for size in SIZES if given.get("patch_size")]
    for name in (*OFFICIAL_NAMES.values(), *of_patches):
        if sizes_of(name).items() <= given.items():
            return name
    return None


def sizes_of(name: str) -> dict[str, Any]:
    """The architecture of a model and its sizes, without what travels with weights."""
    fields = models.model_config(name)
    return {key: x for key, x in fields.items() if key not in LEFT_TO_WEIGHTS}
