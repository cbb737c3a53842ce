"""Vision Transformers in JAX/Flax, faithful to "An Image is Worth 16x16 Words" (ICLR 2021).

>>> import vit_jax
>>> vit = vit_jax.load("ViT-B_16-224")
>>> vit.predict("photo.jpg", topk=3)
"""

import importlib
from typing import TYPE_CHECKING, Any

from vit_jax.xla_flags import avoid_stale_weights

if TYPE_CHECKING:
    from vit_jax.inference import VisionModel, load
    from vit_jax.models import create_model

__version__ = "0.1.0"
__all__ = ["VisionModel", "create_model", "load"]

# Imported when they are asked for: JAX takes a second, for which --help should not wait.
_MODULES = {"VisionModel": "inference", "create_model": "models", "load": "inference"}

avoid_stale_weights()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
