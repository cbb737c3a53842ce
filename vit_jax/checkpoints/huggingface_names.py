"""The parameter names of Hugging Face's vision Transformers, as differences from those of its ViT.

Names are those on disk; those that Transformers 5 uses in memory are read too.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError

Arrays = dict[str, np.ndarray]

_LAYER = "encoder.layer.#."
# By `model_type` of config.json, what ViT calls otherwise, and how the model does. "#" stands for
# the number of a layer. All but the heads lie below "vit." in a model with a head.
_DINOV2 = {
    _LAYER + "layernorm_before.": _LAYER + "norm1.",
    _LAYER + "layernorm_after.": _LAYER + "norm2.",
    _LAYER + "intermediate.dense.": _LAYER + "mlp.fc1.",
}
_RENAMED = {
    "vit": {},
    "deit": {},
    "dinov2": _DINOV2 | {_LAYER + "output.dense.": _LAYER + "mlp.fc2."},
    "siglip_vision_model": {
        _LAYER + "layernorm_before.": "encoder.layers.#.layer_norm1.",
        _LAYER + "layernorm_after.": "encoder.layers.#.layer_norm2.",
        _LAYER + "attention.attention.query.": "encoder.layers.#.self_attn.q_proj.",
        _LAYER + "attention.attention.key.": "encoder.layers.#.self_attn.k_proj.",
        _LAYER + "attention.attention.value.": "encoder.layers.#.self_attn.v_proj.",
        _LAYER + "attention.output.dense.": "encoder.layers.#.self_attn.out_proj.",
        _LAYER + "intermediate.dense.": "encoder.layers.#.mlp.fc1.",
        _LAYER + "output.dense.": "encoder.layers.#.mlp.fc2.",
        "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
        "embeddings.position_embeddings": "embeddings.position_embedding.weight",
        "layernorm.": "post_layernorm.",
        "head.attention.in_proj.weight": "head.attention.in_proj_weight",
        "head.attention.in_proj.bias": "head.attention.in_proj_bias",
    },
}
_RENAMED["dinov2_with_registers"] = _RENAMED["dinov2"]
TYPES = tuple(_RENAMED)
# By the parts that the paper's model does not have.
_PARTS = {
    (): "vit",
    ("a distillation token",): "deit",
    ("LayerScale",): "dinov2",
    ("LayerScale", "SwiGLU"): "dinov2",
    ("LayerScale", "registers"): "dinov2_with_registers",
    ("LayerScale", "registers", "SwiGLU"): "dinov2_with_registers",
    ("attention pooling",): "siglip_vision_model",
}
_ROOT = re.compile(r"(?:vit|deit|dinov2|dinov2_with_registers)\.")
_PATCHES = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight")

_IN_MEMORY = {
    r"^layers\.(\d+)\.": r"encoder.layer.\1.",
    r"(layer\.\d+)\.attention\.([qkv])_proj\.": r"\1.attention.attention.\2.",
    r"(layer\.\d+)\.attention\.o_proj\.": r"\1.attention.output.dense.",
    r"attention\.q\.": "attention.query.",
    r"attention\.k\.": "attention.key.",
    r"attention\.v\.": "attention.value.",
    r"(layer\.\d+)\.mlp\.fc1\.": r"\1.intermediate.dense.",
    r"(layer\.\d+)\.mlp\.(?:fc2|down_proj|weights_out)\.": r"\1.output.dense.",
    r"(layer\.\d+)\.mlp\.gate_proj\.": r"\1.mlp.gate.",
    r"(layer\.\d+)\.mlp\.up_proj\.": r"\1.intermediate.dense.",
}


def are_these(present: Iterable[str]) -> bool:
    """Tells whether parameter names are those of one of these models."""
    return any(name.endswith(_PATCHES) for name in present)


def model_type(model: Mapping[str, Any]) -> str:
    """Names the model of Transformers that has the parts of a model, as config.json does.

    Args:
        model: entries of `models.create_model`, of which the parts beside the paper's are asked.

    Raises:
        UserError: there is none.
    """
    parts = {
        "a distillation token": model.get("distillation_token"),
        "LayerScale": model.get("layer_scale"),
        "attention pooling": model.get("classifier") == "map",
        "registers": model.get("num_registers"),
        "SwiGLU": model.get("mlp", "gelu") != "gelu",
    }
    found = tuple(part for part, is_there in parts.items() if is_there)
    if found not in _PARTS:
        raise UserError(
            f"Hugging Face has no model with {' and '.join(found)} and no other part: use --format "
            "timm or official"
        )
    return _PARTS[found]


def to_vit(arrays: Arrays) -> Arrays:
    """Brings the names of any of these models to those of a ViT, all below "vit." but the heads.

    Raises:
        UserError: a head reads what no model here gives it.
    """
    arrays = {_without_root(name): x for name, x in arrays.items()}
    kind = _kind(arrays)
    _check_heads(arrays, kind)
    result = {}
    for name, x in arrays.items():
        for theirs, ours in ((b, a) for a, b in _RENAMED[kind].items()):
            name = _replace(name, theirs, ours)
        for pattern, replacement in _IN_MEMORY.items():
            name = re.sub(pattern, replacement, name)
        if name == "embeddings.position_embeddings" and kind == "siglip_vision_model":
            x = x[None]  # It is an nn.Embedding.
        if name == "embeddings.mask_token" and kind == "dinov2":
            continue  # Of its pre-training.
        name = name.replace("cls_classifier.", "classifier.")
        result[name if _is_head(name) else f"vit.{name}"] = x
    return result


def from_vit(arrays: Arrays, kind: str) -> Arrays:
    """Undoes `to_vit` for a model of a type that `model_type` told.

    Raises:
        UserError: the model of Transformers has other heads.
    """
    _check_writable(arrays, kind)
    has_head = any(map(_is_head, arrays))
    is_gated = any(".mlp.weights_in." in name for name in arrays)
    root = f"{kind}." if has_head else ""
    if kind == "siglip_vision_model":  # Transformers 4 has it, 5 reads both.
        root = "vision_model."
    result = {}
    for name, x in arrays.items():
        name = name.removeprefix("vit.")
        for ours, theirs in _RENAMED[kind].items():
            name = _replace(name, ours, theirs)
        if is_gated:
            name = name.replace(".mlp.fc2.", ".mlp.weights_out.")
        if name == "embeddings.position_embedding.weight":
            x = x[0]
        if kind == "deit":
            name = re.sub("^classifier", "cls_classifier", name)
        result[name if _is_head(name) else root + name] = x
    if kind == "dinov2_with_registers":  # Its configuration cannot leave it out.
        width = arrays["vit.embeddings.cls_token"].shape[-1]
        result["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return result


def _without_root(name: str) -> str:
    match = _ROOT.match(name)
    return name[match.end() :] if match else name


def _replace(name: str, old: str, new: str) -> str:
    """Replaces the beginning of a name, with the number of its layer for "#"."""
    pattern = re.escape(old).replace(r"\#", r"(\d+)")
    return re.sub(f"^{pattern}", new.replace("#", r"\1"), name)


def _is_head(name: str) -> bool:
    return name.startswith(("classifier.", "cls_classifier.", "distillation_classifier."))


def _kind(present: Iterable[str]) -> str:
    present = set(present)
    if "embeddings.patch_embedding.weight" in present:
        return "siglip_vision_model"
    return "dinov2" if any(".layer_scale1." in name for name in present) else "vit"


def _check_heads(present: Iterable[str], kind: str) -> None:
    present = set(present)
    if "classifier.weight" in present and kind != "vit":
        raise UserError(
            f"the classifier of this {kind} reads the mean of the patches, which the head of no "
            "model here does: give the trunk alone, without the classifier"
        )
    has_token = "embeddings.distillation_token" in present
    if has_token and "classifier.weight" in present:
        raise UserError(
            "a distillation token without a head of its own: give a "
            "DeiTForImageClassificationWithTeacher, which has two"
        )


def _check_writable(arrays: Arrays, kind: str) -> None:
    heads = {name for name in arrays if _is_head(name)}
    if kind == "siglip_vision_model":
        wanted, what = "vit.head.probe", "attention pooling"
    else:
        wanted, what = "vit.embeddings.cls_token", "a class token"
    if wanted not in arrays:
        noun = "ViT" if kind == "vit" else kind
        raise UserError(f"Hugging Face's {noun} has {what}: use --format timm or official")
    if heads and kind not in ("vit", "deit"):
        raise UserError(
            f"Hugging Face's {kind} has no such head, of which its own reads the mean of the "
            "patches too: use --format timm or official"
        )
    if "vit.pooler.dense.weight" in arrays and (heads or kind != "vit"):
        raise UserError(
            "Hugging Face's ViT has no hidden layer (pre_logits) before its head: fine-tune the "
            "model, or use --format official"
        )
