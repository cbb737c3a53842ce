"""The architecture of a model, inferred from the names and shapes of its parameters."""

from typing import Any

from vit_jax import models
from vit_jax.checkpoints.layouts import Arrays
from vit_jax.errors import UserError
from vit_jax.models.vit import SIZES


def infer_model(arrays: Arrays) -> dict[str, Any]:
    """The architecture and its sizes, for `models.create_model`.

    Args:
        arrays: official names, joined by "/".

    Raises:
        UserError: a parameter without which nothing can be told is missing or misshapen.
    """
    architecture = models.recognize(arrays)
    return {"architecture": architecture, **models.family_of(architecture).infer(arrays)}


def usual_num_heads(hidden_size: int, num_layers: int, mlp_dim: int) -> int:
    """The heads of the paper's model of these sizes, which PyTorch's layouts do not tell.

    Raises:
        UserError: there is none, so that --num_heads must be given.
    """
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "mlp_dim": mlp_dim}
    for size in SIZES.values():
        if sizes.items() <= size.items():
            return size["num_heads"]
    raise UserError(
        f"how many heads a ViT of {num_layers} layers, width {hidden_size} and MLP width {mlp_dim} "
        "has is not in the weights: give --num_heads, or write it into a JSON file beside them, "
        'FILE.json: {"model": {"num_heads": N}}'
    )
