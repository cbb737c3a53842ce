"""The architecture of a model, inferred from the names and shapes of its parameters."""

from typing import Any

from vit_jax import models
from vit_jax.checkpoints.layouts import MAX_DEPTH, Arrays
from vit_jax.errors import UserError, shortlist
from vit_jax.models.vit import SIZES

# DINOv2's ViT-g, SigLIP's SoViT-400m and DeiT III's ViT-M.
_OTHER_SIZES = (
    {"hidden_size": 1536, "num_layers": 40, "mlp_dim": 4096, "num_heads": 24},
    {"hidden_size": 1152, "num_layers": 27, "mlp_dim": 4304, "num_heads": 16},
    {"hidden_size": 512, "num_layers": 12, "mlp_dim": 2048, "num_heads": 8},
)
# What a unit of a residual network has; a layer of a ViT has 16.
_ARRAYS_OF_A_LAYER = 9


def infer_model(arrays: Arrays) -> dict[str, Any]:
    """The architecture and its sizes, for `models.create_model`.

    What they make the model take is bounded: it has at most `MAX_DEPTH` layers, and each of them
    has its arrays.

    Args:
        arrays: official names, joined by "/".

    Raises:
        UserError: a parameter without which nothing can be told is missing or misshapen, one has no
            values, or there are more layers than arrays for them.
    """
    if empty := [name for name, x in arrays.items() if not x.size]:
        raise UserError(f"no values in {shortlist(empty)}: every parameter of a model has some")
    architecture = models.recognize(arrays)
    sizes = models.family_of(architecture).infer(arrays)
    depth = sizes.get("num_layers", 0) + sum(sizes.get("resnet_layers", ()))
    if depth > min(MAX_DEPTH, len(arrays) // _ARRAYS_OF_A_LAYER):
        raise UserError(
            f"{len(arrays)} arrays name {depth} layers: a layer has {_ARRAYS_OF_A_LAYER} arrays or "
            f"more, and a model at most {MAX_DEPTH} layers; fetch the file again"
        )
    return {"architecture": architecture, **sizes}


def usual_num_heads(hidden_size: int, num_layers: int, mlp_dim: int) -> int:
    """The heads of the paper's model of these sizes, which PyTorch's layouts do not tell.

    Raises:
        UserError: there is none, so that --num_heads must be given.
    """
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "mlp_dim": mlp_dim}
    for size in (*SIZES.values(), *_OTHER_SIZES):
        if sizes.items() <= size.items():
            return size["num_heads"]
    raise UserError(
        f"how many heads a ViT of {num_layers} layers, width {hidden_size} and MLP width {mlp_dim} "
        "has is not in the weights: give --num_heads, or write it into a JSON file beside them, "
        'FILE.json: {"model": {"num_heads": N}}'
    )
