"""The parameter names and array layouts of Google's, timm's and Hugging Face's models.

Those of torchvision are timm's under other names, see `torch_names`.

Everything is brought to one tree: that of Google's checkpoints, which is also the model's own. A
way there and the way back only rename, transpose, reshape and pad, so that a round trip is exact.
Hugging Face's names are those of its ViT; of its other models see `huggingface_names`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from vit_jax import models
from vit_jax.checkpoints import huggingface_names, torch_names
from vit_jax.errors import UserError, shortlist
from vit_jax.models.encoder import DEEPEST
from vit_jax.models.vit import DISTILLATION_HEAD, POOLING, POSITIONS, num_class_tokens

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
            f"{timm}.attn.{name}",  # timm joins the three, see `_PACKED`.
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
        *_linear(f"{ours}/MlpBlock_3/Gate", f"{timm}.mlp.gate", f"{theirs}.mlp.gate"),
        *_linear(f"{ours}/MlpBlock_3/Dense_0", f"{timm}.mlp.fc1", f"{theirs}.intermediate.dense"),
        *_linear(f"{ours}/MlpBlock_3/Dense_1", f"{timm}.mlp.fc2", f"{theirs}.output.dense"),
        *(
            Name(
                f"{ours}/LayerScale_{branch}/scale",
                f"{timm}.ls{branch + 1}.gamma",
                f"{theirs}.layer_scale{branch + 1}.lambda1",
            )
            for branch in (0, 1)
        ),
    ]


def _pooling_names() -> list[Name]:
    attention, timm, theirs = f"{POOLING}/MultiHeadDotProductAttention_0", "attn_pool", "vit.head"
    projections = [
        _linear(
            f"{attention}/{name}",
            f"{timm}.{name}",
            f"{theirs}.attention.{name}",
            PROJECTION,
            PROJECTION_BIAS,
        )
        for name in ("query", "key", "value")
    ]
    mlp = f"{POOLING}/MlpBlock_0"
    return [
        Name(f"{POOLING}/probe", f"{timm}.latent", f"{theirs}.probe"),
        *sum(projections, []),
        *_linear(f"{attention}/out", f"{timm}.proj", f"{theirs}.attention.out_proj", JOIN),
        *_affine(f"{POOLING}/LayerNorm_0", f"{timm}.norm", f"{theirs}.layernorm"),
        *_linear(f"{mlp}/Dense_0", f"{timm}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *_linear(f"{mlp}/Dense_1", f"{timm}.mlp.fc2", f"{theirs}.mlp.fc2"),
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
    Name("dist", "dist_token", "vit.embeddings.distillation_token"),
    Name("register", "reg_token", "vit.embeddings.register_tokens"),
    Name(POSITIONS, "pos_embed", "vit.embeddings.position_embeddings"),
    *_linear(
        "embedding", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection", CONVOLUTION
    ),
    *_affine("Transformer/encoder_norm", "norm", "vit.layernorm"),
    *_linear("pre_logits", "pre_logits.fc", "vit.pooler.dense"),
    *_linear("head", "head", "classifier"),
    *_linear(DISTILLATION_HEAD, "head_dist", "distillation_classifier"),
    *_pooling_names(),
]


class _Packed(NamedTuple):
    """An array whose rows are those of several: its name, and theirs, but for weight or bias."""

    name: str
    parts: tuple[str, ...]


_QKV = ("query", "key", "value")
# "#" stands for the number of a layer.
_PACKED = {
    "timm": (
        _Packed("blocks.#.attn.qkv", tuple(f"blocks.#.attn.{x}" for x in _QKV)),
        _Packed("blocks.#.mlp.w12", ("blocks.#.mlp.gate", "blocks.#.mlp.fc1")),
        _Packed("attn_pool.kv", ("attn_pool.key", "attn_pool.value")),
        _Packed("attn_pool.q", ("attn_pool.query",)),
    ),
    "huggingface": (
        _Packed(
            "vit.encoder.layer.#.mlp.weights_in",
            ("vit.encoder.layer.#.mlp.gate", "vit.encoder.layer.#.intermediate.dense"),
        ),
        _Packed("vit.head.attention.in_proj", tuple(f"vit.head.attention.{x}" for x in _QKV)),
    ),
}


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


def to_official(arrays: Arrays, layout: str, num_heads: int, patches: int | None = None) -> Arrays:
    """Brings arrays of a layout that `detect_format` told to the official names and shapes.

    Args:
        arrays: by parameter name.
        layout: "official" in any of its variants, BiT's too, "timm", whose names those of
            "torchvision" are brought to before, or "huggingface".
        num_heads: of the model; the official layout tells itself.
        patches: of an image; None is any square.

    Raises:
        UserError: an array is not one of a plain or hybrid ViT, or does not have its shape.
    """
    if layout == "official":
        arrays = _from_official(arrays)
        # What training left beside the weights is passed over.
        root = models.family_of(models.recognize(arrays)).root
        return {name: x for name, x in arrays.items() if name.startswith(root)}
    if layout in ("timm", "torchvision"):
        official = _from_torch(_split(_with_gates(arrays), "timm"), "timm", num_heads)
        return _with_timms_positions(official, patches)
    arrays = huggingface_names.to_vit(arrays)
    return _from_torch(_split(arrays, "huggingface"), "huggingface", num_heads)


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
    if layout in ("timm", "torchvision"):
        if layout == "timm" and "pre_logits/kernel" in arrays:
            raise UserError(
                "timm's ViT has no hidden layer (pre_logits) before its head: fine-tune the model, "
                "or use --format official"
            )
        joined = _join(_to_torch(_with_register_positions(arrays), "timm"), "timm")
        joined = {name.replace(".mlp.w12.", ".mlp.fc1."): x for name, x in joined.items()}
        return joined if layout == "timm" else torch_names.to_torchvision(joined)
    model_type = huggingface_names.model_type(family.infer(arrays))
    return huggingface_names.from_vit(
        _join(_to_torch(arrays, "huggingface"), "huggingface"), model_type
    )


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
            f"{shortlist(sorted(arrays))}: not part of a ViT that is read, or of a hybrid"
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


def _split(arrays: Arrays, layout: str) -> Arrays:
    result = {}
    for name, x in arrays.items():
        matches = ((packed.parts, _match(packed.name, name)) for packed in _PACKED[layout])
        parts, found = next((pair for pair in matches if pair[1]), ((), None))
        if found is None:
            result[name] = x
            continue
        number, suffix = found
        if x.ndim == 0 or len(x) % len(parts):
            raise UserError(
                f"{name} has shape {x.shape}: its rows must be as many of each of "
                f"{', '.join(part.split('.')[-1] for part in parts)}"
            )
        for part, rows in zip(parts, np.split(x, len(parts)), strict=True):
            result[part.replace("#", number) + suffix] = rows
    return result


def _match(template: str, name: str) -> tuple[str, str] | None:
    """The number of the layer and the suffix of a name of a template, None if it is of another."""
    pattern = re.escape(template).replace(r"\#", r"(?P<number>\d+)")
    match = re.fullmatch(rf"{pattern}(?P<suffix>\.weight|\.bias)", name)
    return match and (match.groupdict().get("number", ""), match["suffix"])


def _join(arrays: Arrays, layout: str) -> Arrays:
    result = dict(arrays)
    for packed in _PACKED[layout]:
        for name in arrays:
            found = _match(packed.parts[0], name)
            if not found:
                continue
            number, suffix = found
            rows = [result.pop(part.replace("#", number) + suffix) for part in packed.parts]
            result[packed.name.replace("#", number) + suffix] = np.concatenate(rows)
    return result


def _with_gates(arrays: Arrays) -> Arrays:
    """Names the packed layers of SwiGLU, which timm calls as an MLP's: it is twice as wide."""
    result = {}
    for name, x in arrays.items():
        match = re.fullmatch(r"(blocks\.\d+\.mlp\.)fc1(\.weight|\.bias)", name)
        after = arrays.get(f"{match[1]}fc2.weight") if match else None
        is_packed = (
            after is not None and x.ndim and after.ndim == 2 and len(x) == 2 * after.shape[1]
        )
        result[f"{match[1]}w12{match[2]}" if match and is_packed else name] = x
    return result


def _with_timms_positions(arrays: Arrays, patches: int | None) -> Arrays:
    """Brings timm's position embeddings to those of class and distillation token and patches.

    With its no_embed_class they are of the patches alone; else of registers too.
    """
    positions, registers = arrays.get(POSITIONS), arrays.get("register")
    if positions is None or positions.ndim != 3:
        return arrays
    first = num_class_tokens(arrays)
    padded = _with_class_positions(positions, first, patches)
    if padded is not positions or registers is None or registers.ndim != 3:
        return {**arrays, POSITIONS: padded}
    last = first + registers.shape[1]
    if not _is_grid(positions.shape[1] - last, patches):
        return arrays
    of_registers = positions[:, first:last]
    without = np.concatenate([positions[:, :first], positions[:, last:]], axis=1)
    return {**arrays, POSITIONS: without, "register": registers + of_registers}


def _with_register_positions(arrays: Arrays) -> Arrays:
    """Undoes that: positions of zero for registers, as timm's model has without no_embed_class."""
    if "register" not in arrays or POSITIONS not in arrays:
        return arrays
    positions, first = arrays[POSITIONS], num_class_tokens(arrays)
    zeros = np.zeros_like(arrays["register"])
    parts = [positions[:, :first], zeros, positions[:, first:]]
    return {**arrays, POSITIONS: np.concatenate(parts, axis=1)}


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
            result[POSITIONS] = _with_class_positions(result.pop(name), "cls" in result)
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


def _with_class_positions(
    positions: np.ndarray, count: int, patches: int | None = None
) -> np.ndarray:
    """big_vision, or timm if told to, adds no position to the class token: a zero is the same."""
    if not count or positions.ndim != 3 or not _is_grid(positions.shape[1], patches):
        return positions
    return np.pad(positions, ((0, 0), (count, 0), (0, 0)))


def _is_grid(count: int, patches: int | None) -> bool:
    """Tells whether there are so many patches, or those of any square."""
    return count == patches if patches else count > 0 and round(count**0.5) ** 2 == count


def has_fixed_positions(present: Iterable[str]) -> bool:
    """Tells whether these are big_vision's names without positions, which its code computes."""
    present = list(present)
    newer = any(_NEWER_MLP in name and "MAPHead_0/" not in name for name in present)
    return newer and not any(name.endswith("pos_embedding") for name in present)


def detect_format(present: Iterable[str]) -> str | None:
    """Tells "official", "timm" or "huggingface" by parameter names, None if it is none of them."""
    present = set(present)
    if any(present & _landmarks(prefix) for prefix in ("", *_PREFIXES)):
        return "official"
    if "patch_embed.proj.weight" in present:
        return "timm"
    return "huggingface" if huggingface_names.are_these(present) else None
