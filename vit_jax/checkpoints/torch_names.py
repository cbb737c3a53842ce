"""Variants of PyTorch's names: models inside other modules, and of those who name them otherwise.

What comes out has the names of timm's or Hugging Face's models, see `layouts`.
"""

import re
from collections.abc import Iterable

import numpy as np

from vit_jax.errors import UserError, shortlist

Arrays = dict[str, np.ndarray]

# By the patch embedding: of Hugging Face's models, timm's and torchvision's.
_ROOT = (
    r"(.*?)(?:(?:(?:vit|deit|dinov2|dinov2_with_registers)\.)?"
    r"embeddings\.patch_embeddings?\.(?:projection\.)?weight"
    r"|patch_embed\.proj\.weight|conv_proj\.weight)"
)
# Of self-supervised training, beside the model: nobody reads them afterwards.
_PROJECTION_HEADS = re.compile(r"(.*\.)?(dino_head\.|ibot_head\.|head\.mlp\.\d|head\.last_layer\.)")


def unwrap(arrays: Arrays) -> Arrays:
    """Brings variants of PyTorch's names to those of a model on its own.

    Read are the names of Hugging Face's Flax models, with the layouts of Flax; and a model inside
    another module: `module.` of DistributedDataParallel, `model.` of Lightning, `teacher.backbone.`
    of self-supervised training without its projection heads, and so on.

    Raises:
        UserError: there are several models, or something beside the model.
    """
    if any(name.endswith("embeddings/patch_embeddings/projection/kernel") for name in arrays):
        arrays = dict(_flax_to_torch(name, x) for name, x in arrays.items())
    matches = [match for match in map(re.compile(_ROOT).fullmatch, arrays) if match]
    prefixes = sorted({match[1] for match in matches})
    if len(prefixes) > 1:
        raise UserError(
            f"holds several models, named {shortlist([repr(x) for x in prefixes])}: save the state "
            "dict of one of them alone"
        )
    prefix = prefixes[0] if prefixes else ""
    if prefixes:
        arrays = {name: x for name, x in arrays.items() if not _PROJECTION_HEADS.match(name)}
    if beside := sorted(name for name in arrays if not name.startswith(prefix)):
        raise UserError(
            f"holds {shortlist(beside, 2)} beside the model {prefix!r}: save the state dict of a "
            "plain ViT alone"
        )
    return {name.removeprefix(prefix): x for name, x in arrays.items()}


def _flax_to_torch(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    *path, leaf = name.split("/")
    if leaf == "kernel":
        x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    return ".".join([*path, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)]), x


def without_text(arrays: Arrays) -> Arrays:
    """Returns the vision model of a whole SigLIP, and anything else as it is."""
    if "vision_model.head.probe" not in arrays:
        return arrays
    return {name: x for name, x in arrays.items() if name.startswith("vision_model.")}


# torchvision's names and timm's; "#" stands for the number of a layer.
_LAYER = "encoder.layers.encoder_layer_#"
_TORCHVISION = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln": "norm",
    "heads.head": "head",
    "heads.pre_logits": "pre_logits.fc",
    f"{_LAYER}.ln_1": "blocks.#.norm1",
    f"{_LAYER}.ln_2": "blocks.#.norm2",
    f"{_LAYER}.self_attention.in_proj_weight": "blocks.#.attn.qkv.weight",
    f"{_LAYER}.self_attention.in_proj_bias": "blocks.#.attn.qkv.bias",
    f"{_LAYER}.self_attention.out_proj": "blocks.#.attn.proj",
    f"{_LAYER}.mlp.0": "blocks.#.mlp.fc1",
    f"{_LAYER}.mlp.3": "blocks.#.mlp.fc2",
}
# Of its older files, which torchvision brings to the names above.
_OLDER = {
    f"{_LAYER}.mlp.linear_1": "blocks.#.mlp.fc1",
    f"{_LAYER}.mlp.linear_2": "blocks.#.mlp.fc2",
}
# Of the published code of DINOv2 and of DeiT III, beside timm's names.
_PUBLISHED = {
    "register_tokens": "reg_token",
    "blocks.#.mlp.w3": "blocks.#.mlp.fc2",
    "blocks.#.gamma_1": "blocks.#.ls1.gamma",
    "blocks.#.gamma_2": "blocks.#.ls2.gamma",
}


def are_torchvisions(present: Iterable[str]) -> bool:
    """Tells whether parameter names are those of torchvision's ViT."""
    return "conv_proj.weight" in set(present)


def to_timm(arrays: Arrays) -> Arrays:
    """Brings the names of torchvision's ViT, of DINOv2's and DeiT III's own files to timm's.

    The mask token of DINOv2, of its training alone, is left out.
    """
    table = _TORCHVISION | _OLDER if are_torchvisions(arrays) else _PUBLISHED
    if not are_torchvisions(arrays) and "patch_embed.proj.weight" not in arrays:
        return arrays
    renamed = {_rename(name, table): x for name, x in arrays.items()}
    if any(name.endswith(".ls1.gamma") for name in renamed):
        renamed.pop("mask_token", None)
    return renamed


def to_torchvision(arrays: Arrays) -> Arrays:
    """Brings timm's names to those of torchvision's ViT, which has them all: the opposite."""
    names = {timms: theirs for theirs, timms in _TORCHVISION.items()}
    return {_rename(name, names): x for name, x in arrays.items()}


def _rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        pattern = re.escape(old).replace(r"\#", r"(?P<number>\d+)")
        if match := re.fullmatch(rf"{pattern}(?P<kind>\.weight|\.bias|)", name):
            number = match.groupdict().get("number", "")
            return new.replace("#", number) + match["kind"]
    return name


# By what some parameters are called, that are in no model here: what the model then is.
_OTHERS = {
    r"[qk]_norm\.|norm_[qk]\.": "a ViT that normalizes queries and keys",
    r"layers\.\d+\.blocks": "a Swin Transformer",
    r"lambda_[12]": "a BEiT, with LayerScale and other attention",
    r"relative_position|rel_pos": "a ViT with relative positions as BEiT has them",
    r"mlp\.(fc1_g|w1)\.": "a ViT with two layers of SwiGLU that are not packed",
    r"mlp\.norm\.|attn\.norm\.": "a ViT with more norms in its layers",
    r"norm_pre\.|pre_layernorm|pre_layrnorm|ln_pre|class_embedding": "a ViT with a norm before its "
    "layers, as CLIP",
    r"fc_norm\.": "a ViT that normalizes after its pooling",
    r"decoder": "an autoencoder of masked images",
    r"text_model\.|^transformer\.resblocks|token_embedding": "a model of text and images",
    r"\.running_mean": "a network with BatchNorm",
    r"\.lora_[AB]\.|lora_": "LoRA's additions to a model: merge them into it first, and it is read",
}


def other_model(present: Iterable[str]) -> str | None:
    """Identifies a model by parameters that no model here has; None if it is unknown.

    Args:
        present: the names in any layout.
    """
    present = list(present)
    for pattern, what in _OTHERS.items():
        if found := sorted(filter(re.compile(pattern).search, present)):
            return f"{what} ({shortlist(found, 1)})"
    return None
