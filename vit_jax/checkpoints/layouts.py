"""The parameter names and array layouts of Google's, timm's and Hugging Face's models.

Everything is brought to one tree: that of Google's checkpoints, which is also the model's own. A
way there and the way back only rename, transpose and reshape, so that a round trip is exact.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from vit_jax import models
from vit_jax.errors import UserError, shortlist
from vit_jax.models.encoder import DEEPEST
from vit_jax.models.vit import POSITIONS

Arrays = dict[str, np.ndarray]

# Layers, and units of residual networks, are traced one by one, at some 10 ms each. What can be
# trained here can be read.
MAX_DEPTH = DEEPEST

# What big_vision calls an encoder layer's MLP, as newer Linen does.
_NEWER_MLP = "MlpBlock_0/"
_LAYER = "Transformer/encoderblock_"


class Rearrangement(NamedTuple):
    """The conversion of an array of the official layout to PyTorch's, and back, by num_heads."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray, int], np.ndarray]


def _split_heads(x: np.ndarray, num_heads: int) -> np.ndarray:
    """Splits the last axis, [..., D] to [..., heads, head_dim]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


SAME = Rearrangement(lambda x: x, lambda x, _: x)
DENSE = Rearrangement(lambda x: x.T, lambda x, _: x.T)
# [height, width, in, out] and [out, in, height, width].
CONVOLUTION = Rearrangement(lambda x: x.transpose(3, 2, 0, 1), lambda x, _: x.transpose(2, 3, 1, 0))
# [D, heads, head_dim] and [D, D]; PyTorch's rows are the outputs.
PROJECTION = Rearrangement(
    lambda x: x.reshape(len(x), -1).T, lambda x, heads: _split_heads(x.T, heads)
)
PROJECTION_BIAS = Rearrangement(lambda x: x.reshape(-1), _split_heads)
# [heads, head_dim, D] and [D, D].
JOIN = Rearrangement(
    lambda x: x.reshape(-1, x.shape[-1]).T,
    lambda x, heads: x.T.reshape(heads, -1, x.shape[0]),
)


class Name(NamedTuple):
    """The name of a parameter in the three layouts; None where a layout does not have it."""

    official: str
    timm: str | None
    huggingface: str | None
    rearrangement: Rearrangement = SAME


def _affine(official: str, timm: str | None, huggingface: str | None) -> list[Name]:
    """The names of a normalization's scale and bias."""
    torch = {"scale": "weight", "bias": "bias"}
    return [
        Name(f"{official}/{ours}", timm and f"{timm}.{x}", huggingface and f"{huggingface}.{x}")
        for ours, x in torch.items()
    ]


def _linear(
    official: str,
    timm: str,
    huggingface: str,
    kernel: Rearrangement = DENSE,
    bias: Rearrangement = SAME,
) -> list[Name]:
    return [
        Name(f"{official}/kernel", f"{timm}.weight", f"{huggingface}.weight", kernel),
        Name(f"{official}/bias", f"{timm}.bias", f"{huggingface}.bias", bias),
    ]


def _layer_names(i: int) -> list[Name]:
    ours, timm, theirs = f"{_LAYER}{i}", f"blocks.{i}", f"vit.encoder.layer.{i}"
    attention = f"{ours}/MultiHeadDotProductAttention_1"
    projections = [
        _linear(
            f"{attention}/{name}",
            f"{timm}.attn.{name}",  # timm joins the three, see `_join_qkv`.
            f"{theirs}.attention.attention.{name}",
            PROJECTION,
            PROJECTION_BIAS,
        )
        for name in ("query", "key", "value")
    ]
    return [
        *_affine(f"{ours}/LayerNorm_0", f"{timm}.norm1", f"{theirs}.layernorm_before"),
        *sum(projections, []),
        *_linear(f"{attention}/out", f"{timm}.attn.proj", f"{theirs}.attention.output.dense", JOIN),
        *_affine(f"{ours}/LayerNorm_2", f"{timm}.norm2", f"{theirs}.layernorm_after"),
        *_linear(f"{ours}/MlpBlock_3/Dense_0", f"{timm}.mlp.fc1", f"{theirs}.intermediate.dense"),
        *_linear(f"{ours}/MlpBlock_3/Dense_1", f"{timm}.mlp.fc2", f"{theirs}.output.dense"),
    ]


def _root_names(has_stages: bool) -> list[Name]:
    backbone = "patch_embed.backbone" + (".stem" if has_stages else "")
    return [
        Name("conv_root/kernel", f"{backbone}.conv.weight", None, CONVOLUTION),
        *_affine("gn_root", f"{backbone}.norm", None),
    ]


def _unit_names(stage: int, unit: int) -> list[Name]:
    ours = f"block{stage}/unit{unit}"
    theirs = f"patch_embed.backbone.stages.{stage - 1}.blocks.{unit - 1}"
    pairs = [(f"{i}", f"{theirs}.conv{i}", f"{theirs}.norm{i}") for i in (1, 2, 3)]
    pairs += [("_proj", f"{theirs}.downsample.conv", f"{theirs}.downsample.norm")]
    names = []
    for suffix, conv, norm in pairs:
        names += [Name(f"{ours}/conv{suffix}/kernel", f"{conv}.weight", None, CONVOLUTION)]
        names += _affine(f"{ours}/gn{suffix}", norm, None)
    return names


_ENDS = [
    Name("cls", "cls_token", "vit.embeddings.cls_token"),
    Name(POSITIONS, "pos_embed", "vit.embeddings.position_embeddings"),
    *_linear(
        "embedding", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection", CONVOLUTION
    ),
    *_affine("Transformer/encoder_norm", "norm", "vit.layernorm"),
    *_linear("pre_logits", "pre_logits.fc", "vit.pooler.dense"),
    *_linear("head", "head", "classifier"),
]


def names(present: Iterable[str]) -> Iterator[Name]:
    """Yields the names of a model as deep as one of these layouts says.

    Args:
        present: the parameter names of a model in any of the three layouts.
    """
    present = list(present)
    patterns = (
        rf"(?:{_LAYER}|blocks\.|vit\.encoder\.layer\.)(\d+)\D",
        r"block(\d+)/unit(\d+)/",
        r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.",
    )
    layers, ours, timm = (
        {tuple(map(int, match.groups())) for match in map(re.compile(p).match, present) if match}
        for p in patterns
    )
    yield from _ENDS
    for (layer,) in sorted(layers):
        yield from _layer_names(layer)
    units = sorted(ours | {(stage + 1, unit + 1) for stage, unit in timm})
    yield from _root_names(has_stages=bool(units))
    for stage, unit in units:
        yield from _unit_names(stage, unit)


def to_official(arrays: Arrays, layout: str, num_heads: int) -> Arrays:
    """Brings arrays of a layout that `detect_format` told to the official names and shapes.

    Args:
        arrays: by parameter name.
        layout: "official" in any of its variants, BiT's too, "timm" or "huggingface".
        num_heads: of the model; the official layout tells itself.

    Raises:
        UserError: an array is not one of a plain or hybrid ViT, or does not have its shape.
    """
    if layout == "official":
        arrays = _from_official(arrays)
        # What training left beside the weights is passed over.
        root = models.family_of(models.recognize(arrays)).root
        return {name: x for name, x in arrays.items() if name.startswith(root)}
    if layout == "timm":
        official = _from_torch(_split_qkv(arrays), "timm", num_heads)
        if POSITIONS in official:  # With timm's no_embed_class they are those of the patches alone.
            official[POSITIONS] = _with_class_position(official[POSITIONS], "cls" in official)
        return official
    # Names are those on disk; those that Transformers 5 uses in memory are read too.
    arrays = {_huggingface_on_disk(name): x for name, x in arrays.items()}
    return _from_torch(arrays, "huggingface", num_heads)


def from_official(arrays: Arrays, layout: str) -> Arrays:
    """The opposite of `to_official`.

    Raises:
        UserError: the layout has no place for one of the parameters.
    """
    if layout == "official":
        return arrays
    family = models.family_of(models.recognize(arrays))
    if layout not in family.formats:
        raise UserError(
            f"the {layout} format is not written for {family.noun}s: use --format official"
        )
    if layout == "timm":
        if "pre_logits/kernel" in arrays:
            raise UserError(
                "timm's ViT has no hidden layer (pre_logits) before its head: fine-tune the model, "
                "or use --format official"
            )
        return _join_qkv(_to_torch(arrays, "timm"))
    if "cls" not in arrays:
        raise UserError("Hugging Face's ViT has a class token: use --format timm or official")
    if "head/kernel" not in arrays:
        renamed = _to_torch(arrays, "huggingface")  # of a ViTModel
        return {name.removeprefix("vit."): x for name, x in renamed.items()}
    if "pre_logits/kernel" in arrays:
        raise UserError(
            "Hugging Face's ViT has no hidden layer (pre_logits) before its head: fine-tune the "
            "model, or use --format official"
        )
    return _to_torch(arrays, "huggingface")


_IN_MEMORY = {
    r"layers\.(\d+)\.attention\.([qkv])_proj": r"encoder.layer.\1.attention.attention.\2",
    r"layers\.(\d+)\.attention\.o_proj": r"encoder.layer.\1.attention.output.dense",
    r"layers\.(\d+)\.mlp\.fc1": r"encoder.layer.\1.intermediate.dense",
    r"layers\.(\d+)\.mlp\.fc2": r"encoder.layer.\1.output.dense",
    r"layers\.(\d+)\.": r"encoder.layer.\1.",
    r"attention\.q\.": "attention.query.",
    r"attention\.k\.": "attention.key.",
    r"attention\.v\.": "attention.value.",
}


def _huggingface_on_disk(name: str) -> str:
    if not name.startswith(("vit.", "classifier.")):
        name = f"vit.{name}"
    for pattern, replacement in _IN_MEMORY.items():
        name = re.sub(pattern, replacement, name)
    return name


def _from_torch(arrays: Arrays, layout: str, num_heads: int) -> Arrays:
    arrays = dict(arrays)
    result = {}
    for name in names(arrays):
        theirs = getattr(name, layout)
        if theirs not in arrays:
            continue  # What is missing is told by whoever knows the model.
        x = arrays.pop(theirs)
        try:
            result[name.official] = name.rearrangement.from_torch(x, num_heads)
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{theirs} has shape {x.shape}, which no ViT with num_heads {num_heads} has: "
                "use another file, or give the right --num_heads"
            ) from error
    if arrays:
        raise UserError(
            f"{shortlist(sorted(arrays))}: not part of a plain or hybrid ViT; only those are read"
        )
    return result


def _to_torch(arrays: Arrays, layout: str) -> Arrays:
    by_name = {name.official: name for name in names(arrays)}
    absent = [x for x in arrays if x not in by_name or getattr(by_name[x], layout) is None]
    if absent:
        raise UserError(
            f"the {layout} format has no place for {shortlist(sorted(absent))}: "
            "use --format official"
        )
    return {
        getattr(name, layout): np.ascontiguousarray(name.rearrangement.to_torch(arrays[official]))
        for official, name in by_name.items()
        if official in arrays
    }


def _split_qkv(arrays: Arrays) -> Arrays:
    result = {}
    for name, x in arrays.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)qkv(\.weight|\.bias)", name)
        if not match:
            result[name] = x
            continue
        if x.ndim == 0 or len(x) % 3:
            raise UserError(f"{name} has shape {x.shape}: its rows must be as many of q, k and v")
        for part, rows in zip(("query", "key", "value"), np.split(x, 3), strict=True):
            result[f"{match[1]}{part}{match[2]}"] = rows
    return result


def _join_qkv(arrays: Arrays) -> Arrays:
    result = {}
    for name, x in arrays.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)(query|key|value)(\.weight|\.bias)", name)
        if not match:
            result[name] = x
        elif match[2] == "query":
            parts = [arrays[match[1] + part + match[3]] for part in ("query", "key", "value")]
            result[f"{match[1]}qkv{match[3]}"] = np.concatenate(parts)
    return result


# The encoder layer of newer Linen code counts its submodules by rearrangement.
_NEWER = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
# Those of its attention pooling are as they are in the models here.
_POOLING = re.compile("MAPHead_0/|probe$|(MultiHeadDotProductAttention|LayerNorm|MlpBlock)_0/")
_PREFIXES = ("params/", "opt/target/", "target/", "optimizer/target/")


def _from_official(arrays: Arrays) -> Arrays:
    """Brings the variants of Google's names to those on the disk of the original checkpoints.

    Read are: the original names; newer Linen names (`MlpBlock_0`); the parameters under `params/`
    or `opt/target/`, the optimizer's state beside them being passed over; big_vision's
    `pos_embedding`, at the top or in the encoder, its position-less class token, its layers stacked
    in one `encoderblock`, and its attention pooling, of an early ViT-G at the top; GroupNorm
    parameters of shape [1, 1, 1, channels].
    """
    for prefix in _PREFIXES:
        if not arrays.keys().isdisjoint(_landmarks(prefix)):
            arrays = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
    arrays = _unstack(arrays)
    # Original names stand as they are: LayerNorm_1 only means LayerNorm_2 where that is absent.
    newer = not any("/LayerNorm_2/" in name for name in arrays)
    result = {}
    for name, x in arrays.items():
        if _POOLING.match(name):
            result[name if name.startswith("MAPHead_0/") else f"MAPHead_0/{name}"] = x
            continue
        parts = [_NEWER.get(part, part) if newer else part for part in name.split("/")]
        if parts[-2:-1] and parts[-2].startswith("gn") and x.shape[:-1] == (1,) * (x.ndim - 1):
            x = x.reshape(-1)
        result["/".join(parts)] = x
    for name in ("pos_embedding", "Transformer/pos_embedding"):
        if name in result:
            result[POSITIONS] = _with_class_position(result.pop(name), "cls" in result)
    return result


def _landmarks(prefix: str) -> set[str]:
    return {f"{prefix}{family.landmark}" for family in models.ARCHITECTURES.values()}


def _unstack(arrays: Arrays) -> Arrays:
    result = {}
    for name, x in arrays.items():
        match = re.fullmatch(r"Transformer/encoderblock/(.+)", name)
        if match and x.ndim:
            if len(x) > MAX_DEPTH:
                raise UserError(
                    f"{name} stacks {len(x)} layers, and a model has at most {MAX_DEPTH}: fetch "
                    "the file again"
                )
            result |= {f"{_LAYER}{i}/{match[1]}": layer for i, layer in enumerate(x)}
        else:
            result[name] = x
    return result


def _with_class_position(positions: np.ndarray, has_class: bool) -> np.ndarray:
    """big_vision, or timm if told to, adds no position to the class token: a zero is the same."""
    is_grid = positions.ndim == 3 and round(positions.shape[1] ** 0.5) ** 2 == positions.shape[1]
    if not (has_class and is_grid):
        return positions
    return np.pad(positions, ((0, 0), (1, 0), (0, 0)))


def has_fixed_positions(present: Iterable[str]) -> bool:
    """Tells whether these are big_vision's names without positions, which its code computes."""
    present = list(present)
    newer = any(_NEWER_MLP in name and "MAPHead_0/" not in name for name in present)
    return newer and not any(name.endswith("pos_embedding") for name in present)


_TORCH_ROOT = (
    r"(.*?)(?:(?:vit\.)?embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.weight"
)


def unwrap(arrays: Arrays) -> Arrays:
    """Brings variants of PyTorch's names to those of a model on its own.

    Read are the names of Hugging Face's Flax models, with the layouts of Flax; and a model inside
    another module: `module.` of DistributedDataParallel, `model.` of Lightning, and so on.

    Raises:
        UserError: there are several models, or something beside the model.
    """
    if any(name.endswith("embeddings/patch_embeddings/projection/kernel") for name in arrays):
        arrays = dict(_flax_to_torch(name, x) for name, x in arrays.items())
    matches = [match for match in map(re.compile(_TORCH_ROOT).fullmatch, arrays) if match]
    prefixes = sorted({match[1] for match in matches})
    if len(prefixes) > 1:
        raise UserError(
            f"holds several models, named {shortlist([repr(x) for x in prefixes])}: save the state "
            "dict of one of them alone"
        )
    prefix = prefixes[0] if prefixes else ""
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


# By what some parameters are called, that are in no plain ViT: what the model then is.
_OTHERS = {
    r"dist_token|distillation_token|head_dist": "a distilled DeiT, with a second class token",
    r"reg_token|register_tokens": "a ViT with register tokens",
    r"attn_pool\.|(?:^|\.)head\.probe": "a ViT with attention pooling",
    r"[qk]_norm\.|norm_[qk]\.": "a ViT that normalizes queries and keys",
    r"layers\.\d+\.blocks": "a Swin Transformer",
    r"\bls[12]\b|gamma_[12]|lambda_[12]|layer_scale": "a ViT with LayerScale, as DeiT III or BEiT",
    r"relative_position|rel_pos": "a ViT with relative positions as BEiT has them",
    r"mlp\.(w12|fc1_g|w1)\.|weights_in": "a ViT with SwiGLU in place of its MLP",
    r"mlp\.norm\.|attn\.norm\.": "a ViT with more norms in its layers",
    r"norm_pre\.|pre_layernorm|pre_layrnorm|ln_pre|class_embedding": "a ViT with a norm before its "
    "layers, as CLIP",
    r"fc_norm\.": "a ViT that normalizes after its pooling",
    r"mask_token|decoder": "an autoencoder of masked images",
    r"text_model\.|^transformer\.resblocks|token_embedding": "a model of text and images",
    r"\.running_mean": "a network with BatchNorm",
    r"encoder\.layers\.encoder_layer_": "torchvision's ViT, whose names are not read",
    r"\.lora_[AB]\.|lora_": "LoRA's additions to a model: merge them into it first, and it is read",
}


def other_model(present: Iterable[str]) -> str | None:
    """Identifies a model by parameters that no plain or hybrid ViT has; None if it is unknown.

    Args:
        present: the names in any layout.
    """
    present = list(present)
    for pattern, what in _OTHERS.items():
        if found := sorted(filter(re.compile(pattern).search, present)):
            return f"{what} ({shortlist(found, 1)})"
    return None


def detect_format(present: Iterable[str]) -> str | None:
    """Tells "official", "timm" or "huggingface" by parameter names, None if it is none of them."""
    present = set(present)
    if any(present & _landmarks(prefix) for prefix in ("", *_PREFIXES)):
        return "official"
    if "patch_embed.proj.weight" in present:
        return "timm"
    if any(n.endswith("embeddings.patch_embeddings.projection.weight") for n in present):
        return "huggingface"
    return None
