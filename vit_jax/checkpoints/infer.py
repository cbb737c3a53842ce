"""What the names and shapes of a model's parameters tell of its architecture."""

import math
import re
from collections import Counter
from typing import Any

from vit_jax.checkpoints.layouts import AXIAL_UNIT, BIT_ROOT, POSITIONS, Arrays
from vit_jax.errors import UserError
from vit_jax.models import SIZES, resnet

# Where weights do not tell, as those of a ResNet: the paper, BiT and big_vision pre-trained at it.
USUAL_IMAGE_SIZE = 224
_LAYER = "Transformer/encoderblock_0"
_TELLING = {
    "embedding/kernel": 4,
    f"{_LAYER}/MultiHeadDotProductAttention_1/query/kernel": 3,
    f"{_LAYER}/MlpBlock_3/Dense_0/kernel": 2,
}
# The two parts of an axial layer are of one size.
_AXIAL_TELLING = {name.replace(_LAYER, f"{_LAYER}/row"): rank for name, rank in _TELLING.items()}


def infer_model(arrays: Arrays) -> dict[str, Any]:
    """The sizes of a plain, hybrid or axial ViT, or of a ResNet, for `models.create_model`.

    Args:
        arrays: official names, joined by "/".

    Raises:
        UserError: a parameter without which nothing can be told is missing or misshapen.
    """
    if BIT_ROOT in arrays:
        shape = arrays[BIT_ROOT].shape
        if len(shape) != 4 or shape[3] < 1 or shape[3] % resnet.ROOT_WIDTH:
            raise UserError(f"{BIT_ROOT} has shape {shape}, which no ResNet has")
        return {
            "architecture": "resnet",
            "resnet_layers": _units(arrays, r"resnet/block(\d+)/.*/c/group_norm/gamma"),
            "width_factor": shape[3] // resnet.ROOT_WIDTH,
            "num_classes": _width(arrays, "resnet/head/conv2d/bias"),
        }
    if AXIAL_UNIT in arrays:
        return {
            "architecture": "axial_resnet",
            "resnet_layers": _units(arrays, r"block(\d+)/.*/conv1/"),
            "num_classes": _width(arrays, "head/bias"),
        }
    is_axial = any(name.startswith(f"{_LAYER}/row/") for name in arrays)
    telling = _AXIAL_TELLING if is_axial else _TELLING
    for name, rank in telling.items():
        if name not in arrays:
            raise UserError(f"{name} is missing: this is no whole ViT, fetch it again")
        if arrays[name].ndim != rank or 0 in arrays[name].shape:
            raise UserError(f"{name} has shape {arrays[name].shape}, which no ViT has")
    kernel, query, dense = (arrays[name].shape for name in telling)
    layers = {name.split("/")[1] for name in arrays if name.startswith(_LAYER[:-1])}
    model = {
        "architecture": "axial_vit" if is_axial else "vit",
        "patch_size": kernel[0],
        "hidden_size": kernel[-1],
        "num_layers": len(layers),
        "mlp_dim": dense[1],
        "num_heads": query[1],
        "num_classes": _width(arrays, "head/bias"),
        "classifier": "token" if "cls" in arrays else "gap",
        "representation_size": _width(arrays, "pre_logits/bias"),
    }
    if "conv_root/kernel" in arrays:
        layers = _units(arrays, r"block(\d+)/.*/conv1/")
        model |= {"architecture": "hybrid", "resnet_layers": layers}
    return model


def _units(arrays: Arrays, pattern: str) -> list[int]:
    """How many names of each stage, the pattern's group, there are."""
    units = Counter(int(match[1]) for name in arrays if (match := re.match(pattern, name)))
    return [units[stage] for stage in sorted(units)]


def _width(arrays: Arrays, bias: str) -> int:
    return arrays[bias].size if bias in arrays else 0


def infer_image_size(arrays: Arrays, downsampling: int) -> int:
    """The side in pixels of the images that the weights are for; 224 if they are of a ResNet (BiT).

    Raises:
        UserError: the position embeddings are not those of a square.
    """
    if AXIAL_UNIT in arrays:
        offsets = arrays[f"{AXIAL_UNIT.rpartition('/')[0]}/axial_embedding"].shape[1]
        return (offsets + 1) // 2 * resnet.downsampling(())
    return USUAL_IMAGE_SIZE if BIT_ROOT in arrays else infer_grid(arrays) * downsampling


def infer_grid(arrays: Arrays) -> int:
    """The side of the square of patches that the position embeddings are for.

    Raises:
        UserError: they are not those of a square.
    """
    positions = arrays.get(POSITIONS)
    if positions is None or positions.ndim != 3:
        raise UserError(f"{POSITIONS} is missing or misshapen: fetch the file again")
    patches = positions.shape[1] - ("cls" in arrays)
    side = math.isqrt(max(patches, 0))
    if side < 1 or side**2 != patches:
        raise UserError(
            f"{POSITIONS} has {positions.shape[1]} tokens, which are no square of patches: only "
            "models for square images are read"
        )
    return side


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
