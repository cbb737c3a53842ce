"""The configuration files of Hugging Face's and timm's folders: what they say of a model.

Fields are those of Transformers' ViTConfig and ViTImageProcessor, and of the `config.json` that
timm writes for the Hugging Face hub.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_jax.checkpoints import foreign_fields
from vit_jax.checkpoints.model_info import ModelInfo, read_json
from vit_jax.data import imagenet
from vit_jax.data.protocols import Preprocessing, resized_side
from vit_jax.errors import UserError, first_line
from vit_jax.models.vit import SIZES

TIMM_EPSILON, TIMM_GROUP_NORM_EPSILON, HUGGINGFACE_EPSILON = 1e-6, 1e-5, 1e-12
_GELU = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_tanh": "tanh",
}
_INTERPOLATION = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
_LOSS = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def find_folder(path: Path, layout: str) -> Path | None:
    """The folder whose configuration is that of the weights at a path, None if there is none.

    A file that is named itself has that of its folder, if a `config.json` in there is one of this
    layout.
    """
    if path.is_dir():
        return path
    telling = {"timm": ("pretrained_cfg", "architecture"), "huggingface": ("model_type",)}
    try:
        config = read_json(path.with_name("config.json"))
    except UserError:  # Whosever it is, nobody named it.
        return None
    return path.parent if config.keys() & set(telling.get(layout, ())) else None


def describe(folder: Path | None, layout: str, sizes: dict[str, Any], image_size: int) -> ModelInfo:
    """What is known of weights by their format, and by the configuration in their folder.

    Args:
        folder: None where only the format's conventions are known.
        layout: "official", "timm" or "huggingface".
        sizes: of the model, as far as shapes tell them.
        image_size: that of the position embeddings, for where the configuration names none.

    Raises:
        UserError: the configuration is of a model that is no plain or hybrid ViT.
    """
    if layout == "official":
        return ModelInfo({"architecture": sizes["architecture"]})
    files = {} if folder is None else {name: read_json(folder / name) for name in FILES[layout]}
    with _understanding(folder):
        return _described(files, layout, sizes, image_size)


@contextlib.contextmanager
def _understanding(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{folder}: a value in its configuration is not understood ({first_line(error)})"
        ) from error


# The configuration of a folder.
FILES = {"timm": ("config.json",), "huggingface": ("config.json", "preprocessor_config.json")}


def _described(
    files: dict[str, dict[str, Any]], layout: str, sizes: dict[str, Any], image_size: int
) -> ModelInfo:
    config = files.get("config.json", {})
    if layout == "timm":
        return _of_timm(config, sizes, image_size)
    if config.get("model_type", "vit") != "vit":
        raise UserError(f"model_type {config['model_type']!r} is not 'vit': only that is read")
    return _of_huggingface(config, files.get("preprocessor_config.json", {}), image_size)


def reconcile(
    said: ModelInfo,
    sidecar: ModelInfo,
    folder: Path,
    layout: str,
    sizes: dict[str, Any],
    image_size: int,
) -> ModelInfo:
    """What is known of a folder that we wrote, and that may have been changed since.

    The sidecar says more, and more exactly; but where the folder's own files no longer say what we
    would write for it, somebody changed them, and they are right.

    Args:
        said: by the folder's own files.
        sidecar: `said`, with what the sidecar replaces.
        folder: where both lie.
        layout: "timm" or "huggingface".
        sizes: of the model, as far as shapes tell them, with `num_heads` of any value.
        image_size: that of the position embeddings.
    """
    if sidecar == said or not (folder / "config.json").is_file():
        return sidecar
    shapes = {key: x for key, x in sizes.items() if key != "num_heads"}
    whole = dataclasses.replace(sidecar, model={"num_heads": 1, **sidecar.model, **shapes})
    with _understanding(folder):
        written = timm_files(whole) if layout == "timm" else huggingface_files(whole)
        written = {name: x for name, x in written.items() if (folder / name).is_file()}
        written = _described(written, layout, sizes, image_size)
    model = {key: x for key, x in sidecar.model.items() if key not in shapes}
    changed = said.model.items() - written.model.items()

    def as_told(field: str) -> Any:
        same = getattr(said, field) == getattr(written, field)
        return getattr(sidecar if same else said, field)

    return ModelInfo(
        model | dict(changed),
        as_told("preprocessing"),
        as_told("class_names"),
        said.loss or sidecar.loss,
    )


def _look_up(table: dict[Any, str], key: Any, name: str) -> str:
    if not isinstance(key, str | int) or key not in table:
        raise UserError(f"{name} {key!r} is none of {', '.join(map(str, table))}")
    return table[key]


def _of_huggingface(
    config: dict[str, Any], processor: dict[str, Any], image_size: int
) -> ModelInfo:
    known = (
        foreign_fields.HUGGINGFACE_READ
        + foreign_fields.HUGGINGFACE_SHAPES
        + foreign_fields.HUGGINGFACE_HARMLESS
    )
    foreign_fields.check_fields(config, foreign_fields.HUGGINGFACE_FIXED, known)
    labels = config.get("id2label")
    names = tuple(str(labels[str(i)]) for i in range(len(labels))) if labels else None
    if names == tuple(f"LABEL_{i}" for i in range(len(names or ()))):  # What stands for no names.
        names = None
    model = {
        "architecture": "vit",
        "gelu": _look_up(_GELU, config.get("hidden_act", "gelu"), "hidden_act"),
        "layer_norm_epsilon": float(config.get("layer_norm_eps", HUGGINGFACE_EPSILON)),
    }
    if "num_attention_heads" in config:
        model["num_heads"] = int(config["num_attention_heads"])
    size = processor.get("size", config.get("image_size", image_size))
    loss = config.get("problem_type")
    loss = None if loss is None else _look_up(_LOSS, loss, "problem_type")
    return ModelInfo(model, _huggingface_preprocessing(processor, size), names, loss)


def _huggingface_preprocessing(processor: dict[str, Any], size: Any) -> Preprocessing:
    foreign_fields.check_fields(
        processor, foreign_fields.PROCESSOR_FIXED, foreign_fields.PROCESSOR_KNOWN
    )
    for key in ("image_processor_type", "feature_extractor_type"):
        if processor.get(key, foreign_fields.PROCESSORS[0]) not in foreign_fields.PROCESSORS:
            raise UserError(
                f"{key} is {processor[key]!r}: only {', '.join(foreign_fields.PROCESSORS)} are read"
            )
    if not processor.get("do_resize", True) or not processor.get("do_rescale", True):
        raise UserError("do_resize or do_rescale is false: images must be resized and rescaled")
    squash = not (isinstance(size, dict) and "shortest_edge" in size)
    side = _square("size", size if squash else size["shortest_edge"])
    if processor.get("do_center_crop", not squash):
        image_size = _square("crop_size", processor.get("crop_size", side))
    elif squash:
        image_size = side
    else:
        raise UserError("size has shortest_edge without a center crop: images must be square")
    if image_size > side:
        raise UserError(f"crop_size {image_size} is above size {side}: padding is not supported")
    normalized = processor.get("do_normalize", True)
    if processor.get("rescale_factor", 1 / 255) != 1 / 255:
        raise UserError(f"rescale_factor {processor['rescale_factor']!r} is not 1/255")
    return Preprocessing(
        image_size,
        None if squash and image_size == side else image_size / side,
        _look_up(_INTERPOLATION, processor.get("resample", 2), "resample"),
        antialias=True,
        mean=tuple(processor.get("image_mean", (0.5,) * 3)) if normalized else (0.0,) * 3,
        std=tuple(processor.get("image_std", (0.5,) * 3)) if normalized else (1.0,) * 3,
        resize="huggingface",
        squash=squash and image_size != side,
    )


def _square(name: str, size: Any) -> int:
    height, width = _sides(size)
    if height != width:
        raise UserError(f"{name} is {height} x {width}: only square images are supported")
    return height


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        size = size.get("height"), size.get("width")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def huggingface_files(known: ModelInfo) -> dict[str, dict[str, Any]]:
    """The JSON files of a Hugging Face folder, by name; everything in `known` must be known."""
    model, preprocessing = known.model, known.preprocessing
    size = preprocessing.image_size
    config = {
        "architectures": ["ViTForImageClassification" if model["num_classes"] else "ViTModel"],
        "model_type": "vit",
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
        "hidden_act": "gelu" if model["gelu"] == "erf" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "hidden_size": model["hidden_size"],
        "image_size": size,
        "initializer_range": 0.02,
        "intermediate_size": model["mlp_dim"],
        "layer_norm_eps": model["layer_norm_epsilon"],
        "num_attention_heads": model["num_heads"],
        "num_channels": 3,
        "num_hidden_layers": model["num_layers"],
        "patch_size": model["patch_size"],
        "qkv_bias": True,
    }
    if model["num_classes"]:
        unnamed = [f"LABEL_{i}" for i in range(model["num_classes"])]
        names = [imagenet.readable(name) for name in known.class_names or unnamed]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
        if known.loss == "sigmoid":
            config["problem_type"] = "multi_label_classification"
    processor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocessing.mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(preprocessing.std),
        "resample": _RESAMPLE[_kernel(preprocessing)],
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
    if preprocessing.center_crop is not None:
        processor |= {
            "crop_size": {"height": size, "width": size},
            "do_center_crop": True,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": resized_side(preprocessing)},
        }
        if preprocessing.squash:
            side = resized_side(preprocessing)
            processor["size"] = {"height": side, "width": side}
    return {"config.json": config, "preprocessor_config.json": processor}


def _kernel(preprocessing: Preprocessing) -> str:
    # Where an image shrinks, PIL's bilinear comes nearest to the mean over areas, which has no name
    # in these files.
    if preprocessing.interpolation == "area":
        return "bilinear"
    return preprocessing.interpolation


def _crop_pct(preprocessing: Preprocessing) -> float:
    size, side = preprocessing.image_size, resized_side(preprocessing)
    told = preprocessing.center_crop or 1.0
    # timm takes the floor, which a quotient of whole numbers may miss by its rounding.
    return told if math.floor(size / told) == side else size / (side + 0.5)


def _of_timm(config: dict[str, Any], sizes: dict[str, Any], image_size: int) -> ModelInfo:
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg", config)  # Once all was in one dictionary.
    _check_timm(config, arguments, pretrained, sizes["classifier"] == "token")
    usual = "gelu_tanh" if config.get("architecture") in foreign_fields.TIMM_TANH else "gelu"
    model = {
        "architecture": sizes["architecture"],
        "gelu": _look_up(_GELU, arguments.get("act_layer") or usual, "act_layer"),
        "layer_norm_epsilon": TIMM_EPSILON,
    }
    if sizes["architecture"] == "hybrid":
        model["group_norm_epsilon"] = TIMM_GROUP_NORM_EPSILON
    num_heads = arguments.get(
        "num_heads", foreign_fields.TIMM_NUM_HEADS.get(config.get("architecture"))
    )
    if num_heads is not None:
        model["num_heads"] = int(num_heads)
    # The size of the position embeddings; a model that takes several may be used at another.
    size = arguments.get("img_size")
    size = (3, *_sides(size)) if size else pretrained.get("input_size", (3, *_sides(image_size)))
    if size[1] != size[2]:
        raise UserError(f"input_size {size} is not square: only square images are supported")
    names = config.get("label_names", pretrained.get("label_names"))
    return ModelInfo(
        model,
        _timm_preprocessing(int(size[1]), **pretrained),
        tuple(map(str, names)) if names else None,
    )


def _check_timm(
    config: dict[str, Any], arguments: dict[str, Any], pretrained: dict[str, Any], has_class: bool
) -> None:
    known = foreign_fields.TIMM_READ + foreign_fields.TIMM_SHAPES + foreign_fields.TIMM_HARMLESS
    foreign_fields.check_fields(arguments, foreign_fields.TIMM_FIXED, known)
    foreign_fields.check_fields(
        {"label_offset": pretrained.get("label_offset")}, {"label_offset": 0}, ()
    )
    norm = arguments.get("norm_layer") or "layernorm"
    if norm.replace("_", "").lower() != "layernorm":
        raise UserError(f"norm_layer is {norm!r}: only models with 'layernorm' are read")
    pool = arguments.get("global_pool", config.get("global_pool"))
    foreign_fields.check_timm_pooling(pool, has_class)


def _timm_preprocessing(
    image_size: int,
    *,
    crop_pct: float | None = None,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    mean: tuple[float, float, float] = (0.5,) * 3,
    std: tuple[float, float, float] = (0.5,) * 3,
    **_: Any,
) -> Preprocessing:
    """The evaluation of a timm `pretrained_cfg`; without crop_pct that of its ViTs of this size."""
    if crop_mode not in ("center", "squash"):
        raise UserError(f"crop_mode {crop_mode!r} is none of center, squash")
    crop_pct = crop_pct or (0.9 if image_size < 384 else 1.0)
    squash = crop_mode == "squash"
    whole = squash and math.floor(image_size / crop_pct) == image_size
    return Preprocessing(
        image_size,
        None if whole else crop_pct,
        _look_up(_INTERPOLATION, interpolation, "interpolation"),
        antialias=True,
        mean=tuple(mean),
        std=tuple(std),
        resize="timm",
        squash=squash and not whole,
    )


_TIMM_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
_TIMM_PATCHES = {
    "Ti": (16,),
    "S": (8, 16, 32),
    "B": (8, 16, 32),
    "L": (14, 16, 32),
    "H": (14,),
}
_TIMM_STEMS = {
    (3, 4, 6, 3): "vit_large_r50_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (): "vit_tiny_r_s16_p8_224",
}


def timm_files(known: ModelInfo) -> dict[str, dict[str, Any]]:
    """The JSON file of a timm folder, by name; `timm.create_model("local-dir:DIR")` reads it.

    Everything in `known` must be known.

    Raises:
        UserError: timm has no name for a hybrid of these sizes.
    """
    model, preprocessing = known.model, known.preprocessing
    size, crop = preprocessing.image_size, preprocessing.center_crop
    pool = "token" if model["classifier"] == "token" else "avg"
    arguments = {
        "act_layer": "gelu" if model["gelu"] == "erf" else "gelu_tanh",
        "depth": model["num_layers"],
        "embed_dim": model["hidden_size"],
        "img_size": size,
        "mlp_ratio": model["mlp_dim"] / model["hidden_size"],
        "num_heads": model["num_heads"],
        "num_classes": model["num_classes"],
        "patch_size": model["patch_size"],
    }
    if pool == "avg":
        arguments |= {"class_token": False, "fc_norm": False, "global_pool": "avg"}
    pretrained = {
        "classifier": "head",
        "crop_mode": "squash" if crop is None or preprocessing.squash else "center",
        "crop_pct": _crop_pct(preprocessing),
        "first_conv": "patch_embed.proj",
        "input_size": [3, size, size],
        "interpolation": _kernel(preprocessing),
        "mean": list(preprocessing.mean),
        "num_classes": model["num_classes"],
        "std": list(preprocessing.std),
    }
    config = {
        "architecture": _timm_name(model),
        "num_classes": model["num_classes"],
        "num_features": model["hidden_size"],
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    if known.class_names:
        config["label_names"] = list(known.class_names)
    return {"config.json": config}


def _timm_name(model: dict[str, Any]) -> str:
    # The name only decides the stem: `model_args` replace the sizes that go with it.
    if model["architecture"] == "hybrid":
        stem = tuple(model["resnet_layers"])
        if stem not in _TIMM_STEMS:
            raise UserError(f"timm has no stem of {stem} units: use --format official")
        return _TIMM_STEMS[stem]
    name = next((x for x in SIZES if SIZES[x].items() <= model.items()), None)
    if name is None or model["patch_size"] not in _TIMM_PATCHES[name]:
        return "vit_base_patch16_224"
    return f"vit_{_TIMM_SIZES[name]}_patch{model['patch_size']}_224"
