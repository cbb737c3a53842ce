"""The `config.json` that timm writes for the Hugging Face hub: read and written.

Its `model_args` are those of timm's VisionTransformer. Each is read, told by the shapes of the
arrays, without influence on predictions, or has one value in the paper's model; another value, or
an unknown argument, is refused: see `config_fields.check_fields`.
"""

import math
from typing import Any

from vit_jax.checkpoints.config_fields import (
    GELUS,
    INTERPOLATIONS,
    channels,
    check_fields,
    check_shapes,
    choose,
    height_and_width,
    labels,
    pil_interpolation,
    read_size,
    real,
    whole,
)
from vit_jax.checkpoints.model_info import ModelInfo
from vit_jax.data.protocols import Preprocessing, resized_sides
from vit_jax.errors import UserError, brief
from vit_jax.image_size import ImageSize, sides
from vit_jax.models.vit import SIZES

FILES = ("config.json",)
# What tells this configuration from others of the same name.
MARKS = ("pretrained_cfg", "architecture")

FIXED = {
    "attn_layer": None,
    "block_fn": None,
    "embed_layer": None,
    "embed_norm_layer": None,
    "final_norm": True,
    "mlp_layer": None,
    "pool_include_prefix": False,
    "pos_embed": "learn",
    "pre_norm": False,
    "proj_bias": True,
    "qk_norm": False,
    "qkv_bias": True,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
}
READ = (
    *("act_layer", "global_pool", "img_size", "init_values", "norm_layer", "num_heads"),
    "reg_tokens",
)
# What shapes tell, by its name here; the others in their own form.
SHAPES = {"depth": "num_layers", "embed_dim": "hidden_size", "in_chans": "channels"}
OTHER_SHAPES = (
    *("class_token", "fc_norm", "mlp_ratio", "no_embed_class", "num_classes", "patch_size"),
)
# Of training, and of how other image sizes are taken.
HARMLESS = (
    *("attn_drop_rate", "drop_path_rate", "drop_rate", "patch_drop_rate", "pos_drop_rate"),
    *("proj_drop_rate", "fix_init", "weight_init", "device", "dtype"),
    *("dynamic_img_pad", "dynamic_img_size", "strict_img_size"),
)
# Those of timm's plain ViTs whose GELU has its tanh form without their configs saying so.
TANH = frozenset(
    {
        "vit_base_patch32_siglip_256",
        "vit_base_patch32_siglip_gap_256",
        "vit_giantopt_patch16_siglip_256",
        "vit_giantopt_patch16_siglip_384",
        "vit_giantopt_patch16_siglip_gap_256",
        "vit_giantopt_patch16_siglip_gap_384",
        "vit_large_patch16_siglip_512",
        "vit_large_patch16_siglip_gap_512",
        "vit_so400m_patch16_siglip_256",
        "vit_so400m_patch16_siglip_384",
        "vit_so400m_patch16_siglip_512",
        "vit_so400m_patch16_siglip_gap_256",
        "vit_so400m_patch16_siglip_gap_384",
        "vit_so400m_patch16_siglip_gap_512",
    }
)


# Those of timm's plain ViTs whose heads are not 64 wide, which no file says.
NUM_HEADS = {"vit_base_patch16_gap_224": 16}

LAYER_NORM_EPSILON, GROUP_NORM_EPSILON = 1e-6, 1e-5
POOLS = {"token": "token", "gap": "avg", "map": "map"}
IMAGENET_STATISTICS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
_PATCHES = {
    "Ti": (16,),
    "S": (8, 16, 32),
    "B": (8, 16, 32),
    "L": (14, 16, 32),
    "H": (14,),
}
_STEMS = {
    (3, 4, 6, 3): "vit_large_r50_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (): "vit_tiny_r_s16_p8_224",
}


def read_config(config: dict[str, Any], sizes: dict[str, Any], image_size: ImageSize) -> ModelInfo:
    """Returns what the file tells of a model.

    Args:
        config: of `config.json`.
        sizes: of the model, as far as shapes tell them.
        image_size: that of the position embeddings, for where the file names none.

    Raises:
        UserError: a field or a value is not of the paper's model, or contradicts its shapes.
        TypeError, ValueError, LookupError, AttributeError, ArithmeticError: a value is of another
            form than timm writes.
    """
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg", config)  # Once all was in one dictionary.
    _check_arguments(config, arguments, pretrained, sizes)
    _check_sizes(config, arguments, sizes)
    names = config.get("label_names", pretrained.get("label_names"))
    size = _image_size(arguments, pretrained, image_size)
    return ModelInfo(
        _model(config.get("architecture"), arguments, sizes),
        preprocessing(size, **_usual_view(sizes) | pretrained) if size else None,
        labels(names, "label_names"),
    )


def _check_arguments(
    config: dict[str, Any],
    arguments: dict[str, Any],
    pretrained: dict[str, Any],
    sizes: dict[str, Any],
) -> None:
    check_fields(arguments, FIXED, (*READ, *SHAPES, *OTHER_SHAPES, *HARMLESS))
    check_fields({"label_offset": pretrained.get("label_offset")}, {"label_offset": 0}, ())
    norm = arguments.get("norm_layer") or "layernorm"
    if norm.replace("_", "").lower() != "layernorm":
        raise UserError(f"norm_layer is {brief(norm)}: only models with 'layernorm' are read")
    # The paper's pooling is the class token, or the mean where there is none.
    pool = arguments.get("global_pool", config.get("global_pool"))
    if pool not in (None, POOLS[sizes["classifier"]]):
        beside = "beside a" if sizes["classifier"] == "token" else "without a"
        raise UserError(
            f"global_pool is {brief(pool)} {beside} class token: only 'token' with one, and "
            "without one 'avg', or 'map' where the weights have attention pooling, are read"
        )


def _check_sizes(config: dict[str, Any], arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    told = dict(arguments)
    names = dict(SHAPES)
    if sizes["architecture"] == "vit":  # A hybrid's are of the feature map, and part of its name.
        names["patch_size"] = "patch_size"
        if arguments.get("patch_size") is not None:
            height, width = height_and_width(arguments["patch_size"], "patch_size")
            told["patch_size"] = height if height == width else arguments["patch_size"]
    check_shapes(told, sizes, names)
    check_shapes(config, sizes, {"num_features": "hidden_size"})
    for values in (arguments, config):
        # 0 and null, and weights without a head, are any.
        if values.get("num_classes") not in (None, 0) and sizes["num_classes"]:
            check_shapes(values, sizes, {"num_classes": "num_classes"})
    _check_parts(arguments, sizes)
    ratio = arguments.get("mlp_ratio")
    if ratio is not None and "mlp_dim" in sizes:
        # Of SwiGLU it is that of both layers that are packed in one.
        packed = 2 if sizes.get("mlp") == "swiglu" else 1
        wanted = real(ratio, "mlp_ratio") * sizes["hidden_size"] / packed
        if abs(wanted - sizes["mlp_dim"]) >= 1:  # timm takes the floor.
            raise UserError(
                f"mlp_ratio {ratio} of width {sizes['hidden_size']} is not the MLP width "
                f"{sizes['mlp_dim']} of the weights: they are of different models, fetch both again"
            )


def _check_parts(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Checks that LayerScale and registers are there if and only if the weights have them."""
    for field, key in (("init_values", "layer_scale"), ("reg_tokens", "num_registers")):
        told, found = arguments.get(field), sizes.get(key, 0)
        if field not in arguments or key not in sizes:
            continue
        is_same = bool(told) == bool(found) if field == "init_values" else (told or 0) == found
        if not is_same:
            raise UserError(
                f"{field} is {brief(told)}, but by the shapes of the weights "
                f"{'there are scales' if field == 'init_values' and found else found}: they are of "
                "different models, fetch both again"
            )


def _model(name: Any, arguments: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    architecture = sizes["architecture"]
    default_activation = "gelu_tanh" if name in TANH else "gelu"
    activations = {**GELUS, "silu": "erf"} if sizes.get("mlp") == "swiglu" else GELUS
    model = {
        "architecture": architecture,
        "gelu": choose(activations, arguments.get("act_layer") or default_activation, "act_layer"),
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
    }
    if arguments.get("init_values"):
        model["layer_scale"] = real(arguments["init_values"], "init_values")
    if architecture == "hybrid":
        model["group_norm_epsilon"] = GROUP_NORM_EPSILON
    num_heads = arguments.get("num_heads", NUM_HEADS.get(name))
    if num_heads is not None:
        model["num_heads"] = whole(num_heads, "num_heads")
    return model


def _image_size(
    arguments: dict[str, Any], pretrained: dict[str, Any], default: ImageSize
) -> ImageSize:
    # The size of the position embeddings; a model that takes several may be used at another.
    if size := arguments.get("img_size"):
        return read_size(size, "img_size")
    if "input_size" not in pretrained:
        return default
    _, height, width = pretrained["input_size"]
    return read_size((height, width), "input_size")


def _usual_view(sizes: dict[str, Any]) -> dict[str, Any]:
    """The channel statistics of models that nothing is said of: of DeiT and DINOv2 ImageNet's."""
    if sizes.get("layer_scale") or sizes.get("distillation_token"):
        return _imagenet_statistics(sizes)
    return {}


def _imagenet_statistics(sizes: dict[str, Any]) -> dict[str, Any]:
    """Statistics of RGB; of other channels nothing is known."""
    return dict(IMAGENET_STATISTICS) if sizes.get("channels", 3) == 3 else {}


def torchvision_info(sizes: dict[str, Any], image_size: ImageSize) -> ModelInfo:
    """Returns what is known of a ViT of torchvision, whose files hold arrays alone.

    Args:
        sizes: of the model.
        image_size: that of the position embeddings.
    """
    usual: dict[str, Any] = (
        {"crop_pct": 0.875, "interpolation": "bilinear"} if max(sides(image_size)) < 384 else {}
    )
    return ModelInfo(
        {"architecture": "vit", "gelu": "erf", "layer_norm_epsilon": LAYER_NORM_EPSILON},
        preprocessing(image_size, **_imagenet_statistics(sizes), **usual) if image_size else None,
    )


def preprocessing(
    image_size: ImageSize,
    *,
    crop_pct: float | None = None,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    mean: Any = (0.5, 0.5, 0.5),
    std: Any = (0.5, 0.5, 0.5),
    **_: Any,
) -> Preprocessing:
    """Returns the evaluation of a `pretrained_cfg`, whose fields are the arguments by name.

    Without `crop_pct` it is that of timm's ViTs of this size.

    Raises:
        UserError: a value is none that is known.
    """
    if crop_mode not in ("center", "squash"):
        raise UserError(f"crop_mode {brief(crop_mode)} is none of center, squash")
    both = sides(image_size)
    crop_pct = crop_pct or (0.9 if max(both) < 384 else 1.0)
    squash = crop_mode == "squash"
    is_whole = squash and all(math.floor(x / crop_pct) == x for x in both)
    return Preprocessing(
        image_size,
        None if is_whole else crop_pct,
        choose(INTERPOLATIONS, interpolation, "interpolation"),
        antialias=True,
        mean=channels(mean),
        std=channels(std),
        resize="timm",
        squash=squash and not is_whole,
    )


def config_files(info: ModelInfo) -> dict[str, dict[str, Any]]:
    """Returns the JSON file of a timm folder, by name, of a model of which all is known.

    `timm.create_model("local-dir:DIR")` reads it.

    Raises:
        UserError: timm has no name for a hybrid of these sizes.
    """
    model, view = info.model, info.require_preprocessing()
    pool = POOLS[model["classifier"]]
    arguments = {
        "act_layer": "gelu" if model["gelu"] == "erf" else "gelu_tanh",
        "depth": model["num_layers"],
        "embed_dim": model["hidden_size"],
        "img_size": _img_size(view.image_size),
        "mlp_ratio": model["mlp_dim"] / model["hidden_size"],
        "num_heads": model["num_heads"],
        "num_classes": model["num_classes"],
        "patch_size": model["patch_size"],
    }
    if view.channels != 3:
        arguments["in_chans"] = view.channels
    if pool != "token":
        arguments |= {"class_token": False, "fc_norm": False, "global_pool": pool}
    if model.get("layer_scale"):
        arguments["init_values"] = model["layer_scale"]
    if model.get("num_registers"):
        arguments["reg_tokens"] = model["num_registers"]
    if model.get("mlp") == "swiglu":
        arguments |= {"act_layer": "silu", "mlp_ratio": 2 * arguments["mlp_ratio"]}
    config = {
        "architecture": _timm_name(model),
        "num_classes": model["num_classes"],
        "num_features": model["hidden_size"],
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": _pretrained_cfg(view, model["num_classes"]),
    }
    if info.class_names:
        config["label_names"] = list(info.class_names)
    return {"config.json": config}


def _pretrained_cfg(view: Preprocessing, num_classes: int) -> dict[str, Any]:
    return {
        "classifier": "head",
        "crop_mode": "squash" if view.center_crop is None or view.squash else "center",
        "crop_pct": _crop_pct(view),
        "first_conv": "patch_embed.proj",
        "input_size": [view.channels, *sides(view.image_size)],
        "interpolation": pil_interpolation(view),
        "mean": list(view.mean),
        "num_classes": num_classes,
        "std": list(view.std),
    }


def _timm_name(model: dict[str, Any]) -> str:
    # The name only decides the stem: `model_args` replace the sizes that go with it.
    if model["architecture"] == "hybrid":
        stem = tuple(model["resnet_layers"])
        if stem not in _STEMS:
            raise UserError(f"timm has no stem of {stem} units: use --format official")
        return _STEMS[stem]
    # These two are classes of their own, and have a layer that no argument names.
    if model.get("distillation_token"):
        return "deit_base_distilled_patch16_224"
    if model.get("mlp") == "swiglu":
        return "vit_giant_patch14_dinov2"
    name = next((x for x in SIZES if SIZES[x].items() <= model.items()), None)
    if name is None or model["patch_size"] not in _PATCHES[name]:
        return "vit_base_patch16_224"
    return f"vit_{_SIZES[name]}_patch{model['patch_size']}_224"


def written_sides(preprocessing: Preprocessing) -> tuple[int, int]:
    """The height and width that timm resizes to by what `config_files` writes.

    They are `protocols.resized_sides`, unless no `crop_pct` gives both.
    """
    return _resized(sides(preprocessing.image_size), _crop_pct(preprocessing))


def _resized(view: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    return math.floor(view[0] / crop_pct), math.floor(view[1] / crop_pct)


def _crop_pct(preprocessing: Preprocessing) -> float:
    view, resized = sides(preprocessing.image_size), resized_sides(preprocessing)
    crop = preprocessing.center_crop or 1.0
    if _resized(view, crop) == resized:
        return crop
    # timm takes the floor, which others round: a side allows the fractions of an interval.
    least = max(x / (y + 1) for x, y in zip(view, resized, strict=True))
    most = min(x / y for x, y in zip(view, resized, strict=True))
    return (least + most) / 2 if least < most else crop


def _img_size(image_size: ImageSize) -> int | list[int]:
    return image_size if isinstance(image_size, int) else list(sides(image_size))
