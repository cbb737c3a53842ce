"""Hugging Face's `config.json` and `preprocessor_config.json`: read and written.

Fields are those of Transformers' ViTConfig, of the configurations of the other models that
`huggingface_names` lists, and of its image processors. Each is read, told by
the shapes of the arrays, without influence on predictions, or has one value in the paper's model;
another value, or an unknown field, is refused: see `config_fields.check_fields`.
"""

from typing import Any

from vit_jax.checkpoints.config_fields import (
    GELUS,
    INTERPOLATIONS,
    channels,
    check_fields,
    check_shapes,
    choose,
    height_and_width,
    pil_interpolation,
    read_size,
    real,
    whole,
    yes_or_no,
)
from vit_jax.checkpoints.huggingface_names import TYPES, model_type
from vit_jax.checkpoints.model_info import ModelInfo
from vit_jax.checkpoints.timm_config import IMAGENET_STATISTICS
from vit_jax.data import imagenet
from vit_jax.data.protocols import Preprocessing, resized_sides
from vit_jax.errors import UserError, brief
from vit_jax.image_size import ImageSize, sides

FILES = ("config.json", "preprocessor_config.json")
# What tells this configuration from others of the same name.
MARKS = ("model_type",)

# What has one value in the paper's model; null counts as that value.
FIXED = {
    "auto_map": {},
    "pooler_act": "tanh",
    "pruned_heads": {},
    "qkv_bias": True,
    "quantization_config": None,
}
READ = (
    *("hidden_act", "id2label", "image_size", "layer_norm_eps", "model_type"),
    *("num_attention_heads", "problem_type"),
)
# What shapes tell, by its name here.
SHAPES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "mlp_dim",
    "num_channels": "channels",
    "num_hidden_layers": "num_layers",
    "patch_size": "patch_size",
}
# Those of the parts that a model need not have.
OF_HEADS = {"num_labels": "num_classes", "pooler_output_size": "representation_size"}
# Those that other models than ViT have beside these.
_READ_OF_DINOV2 = ("layerscale_value", "mlp_ratio", "num_register_tokens", "use_swiglu_ffn")
_HARMLESS_OF_DINOV2 = (
    *("apply_layernorm", "drop_path_rate", "out_features", "out_indices", "reshape_hidden_states"),
    *("stage_names", "use_mask_token"),
)
BESIDE = {
    "vit": (),
    "deit": (),
    "dinov2": (*_READ_OF_DINOV2, *_HARMLESS_OF_DINOV2),
    "dinov2_with_registers": (*_READ_OF_DINOV2, *_HARMLESS_OF_DINOV2),
    "siglip_vision_model": ("attention_dropout", "initializer_factor"),
}
FIXED_OF_SIGLIP = {"vision_use_head": True}
# Of training, of masked images, of where the file came from, and of PreTrainedConfig for all
# models, which no ViT reads.
HARMLESS = (
    *("attention_probs_dropout_prob", "encoder_stride", "hidden_dropout_prob", "initializer_range"),
    *("_attn_implementation_autoset", "_num_labels"),
    *("_attn_implementation", "_commit_hash", "_name_or_path", "architectures", "label2id"),
    *("attn_implementation", "dtype", "torch_dtype", "torchscript", "transformers_version"),
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id"),
    *("chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("eos_token_id", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "is_decoder"),
    *("is_encoder_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_past", "pad_token_id", "prefix"),
    *("remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate"),
    *("sep_token_id", "suppress_tokens", "task_specific_params", "temperature"),
    *("tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k"),
    *("top_p", "transformers.js_config", "typical_p", "use_bfloat16", "use_cache"),
)

# Of preprocessor_config.json, and the processors that read it as it is read here.
PROCESSORS = tuple(
    name + kind
    for name in ("ViT", "CLIP", "DeiT", "Bit", "Siglip")
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
)
PROCESSOR_FIXED = {
    "auto_map": {},
    "crop_pct": None,
    "do_flip_channel_order": False,
    "do_pad": False,
    "offset": False,
    "pad_size": None,
    "size_divisor": None,
}
PROCESSOR_ACCEPTED = (
    *("crop_size", "do_center_crop", "do_normalize", "do_rescale", "do_resize", "image_mean"),
    *("image_processor_type", "feature_extractor_type", "image_std", "resample", "rescale_factor"),
    *("size", "_processor_class", "_valid_processor_keys", "data_format", "default_to_square"),
    *("device", "disable_grouping", "do_convert_rgb", "do_grayscale", "image_seq_length"),
    *("input_data_format", "processor_class", "return_tensors"),
)

LAYER_NORM_EPSILON = 1e-12
# What differs from a ViT's where its files do not tell.
_ELSE: dict[str, dict[str, Any]] = {
    "dinov2": {"layer_norm_eps": 1e-6},
    "dinov2_with_registers": {"layer_norm_eps": 1e-6},
    "siglip_vision_model": {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}
_IMAGENET = {f"image_{key}": x for key, x in IMAGENET_STATISTICS.items()}
_USUAL_PROCESSORS: dict[str, dict[str, Any]] = {
    "deit": {"resample": 3, **_IMAGENET},
    "dinov2": {"resample": 3, **_IMAGENET},
    "dinov2_with_registers": {"resample": 3, **_IMAGENET},
    "siglip_vision_model": {"resample": 3},
}
_LOSSES = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def _usual_processor(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The processor where there is none; ImageNet's statistics are of RGB."""
    usual, is_rgb = _USUAL_PROCESSORS.get(kind, {}), sizes.get("channels", 3) == 3
    return {key: x for key, x in usual.items() if is_rgb or key not in _IMAGENET}


def read_config(
    config: dict[str, Any],
    processor: dict[str, Any],
    sizes: dict[str, Any],
    image_size: ImageSize,
) -> ModelInfo:
    """Returns what the two files tell of a model.

    Args:
        config: of `config.json`.
        processor: of `preprocessor_config.json`.
        sizes: of the model, as far as shapes tell them.
        image_size: that of the position embeddings, for where the files name none.

    Raises:
        UserError: a field or a value is not of the paper's model, or contradicts its shapes.
        TypeError, ValueError, LookupError, AttributeError, ArithmeticError: a value is of another
            form than Transformers writes.
    """
    kind = model_type(sizes)
    config = _of_vision(config, kind)
    fixed = FIXED | (FIXED_OF_SIGLIP if kind == "siglip_vision_model" else {})
    check_fields(config, fixed, (*READ, *SHAPES, *OF_HEADS, *BESIDE[kind], *HARMLESS))
    _check_parts(config, sizes)
    config = _ELSE.get(kind, {}) | config
    processor = processor or _usual_processor(kind, sizes)
    told = {**config, **_one_side(config, "patch_size")}
    check_shapes(told, sizes, SHAPES)
    image_size = _image_size(config, image_size)
    check_shapes(told, {key: x for key, x in sizes.items() if x}, OF_HEADS)
    labels = config.get("id2label")
    names = tuple(str(labels[str(i)]) for i in range(len(labels))) if labels else None
    if names == tuple(f"LABEL_{i}" for i in range(len(names or ()))):  # Placeholders.
        names = None
    model = {
        "architecture": "vit",
        "gelu": choose(GELUS, config.get("hidden_act", "gelu"), "hidden_act"),
        "layer_norm_epsilon": real(
            config.get("layer_norm_eps", LAYER_NORM_EPSILON), "layer_norm_eps"
        ),
    }
    if config.get("layerscale_value"):
        model["layer_scale"] = real(config["layerscale_value"], "layerscale_value")
    if "num_attention_heads" in config:
        model["num_heads"] = whole(config["num_attention_heads"], "num_attention_heads")
    size = processor.get("size")
    if size is None and image_size:
        size = list(sides(image_size))
    loss = config.get("problem_type")
    loss = None if loss is None else choose(_LOSSES, loss, "problem_type")
    view = None if size is None else _preprocessing(processor, size)
    return ModelInfo(model, view, names, loss, loss == "sigmoid")


def _image_size(config: dict[str, Any], by_shapes: ImageSize) -> ImageSize:
    """The size of the position embeddings; of a rectangle they have its number of patches alone."""
    size = config.get("image_size")
    if size is None:
        return by_shapes
    told = read_size(size, "image_size")
    if by_shapes and isinstance(told, int):
        check_shapes({"image_size": told}, {"image_size": by_shapes}, {"image_size": "image_size"})
    return told


def _of_vision(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The configuration of a vision model, also of a SigLIP's within that of the whole.

    Raises:
        UserError: it is of another model than the weights, which are of `kind`.
    """
    if config.get("model_type") == "siglip":
        config = dict(config.get("vision_config") or {})
        config.setdefault("model_type", "siglip_vision_model")
    told = config.get("model_type", kind)
    if told not in TYPES:
        raise UserError(
            f"model_type {brief(told)} is none of {', '.join(TYPES)}: only these are read"
        )
    if told != kind:
        raise UserError(
            f"model_type is {brief(told)}, but by the names of the weights {kind!r}: they are of "
            "different models, fetch both again"
        )
    return config


def _check_parts(config: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Checks what DINOv2's configuration says in its own way against the shapes of the weights."""
    is_gated = sizes.get("mlp") == "swiglu"
    told = {"use_swiglu_ffn": is_gated, "num_register_tokens": sizes.get("num_registers", 0)}
    if "mlp_ratio" in config:
        hidden = int(sizes["hidden_size"] * real(config["mlp_ratio"], "mlp_ratio"))
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if is_gated else hidden
        told |= {"mlp_ratio": config["mlp_ratio"] if hidden == sizes["mlp_dim"] else None}
    for field, expected in told.items():
        if field in config and config[field] != expected:
            raise UserError(
                f"{field} is {config[field]!r}, which the shapes of the weights contradict: they "
                "are of different models, fetch both again"
            )


def _preprocessing(processor: dict[str, Any], size: Any) -> Preprocessing:
    _check_processor(processor)
    squash = not (isinstance(size, dict) and "shortest_edge" in size)
    if not yes_or_no(processor.get("do_center_crop", not squash), "do_center_crop"):
        if not squash:
            raise UserError("size has shortest_edge without a center crop: give height and width")
        image_size, center_crop = read_size(size, "size"), None
    else:
        # Of a rectangle the two sides would each have a fraction of its own.
        side = _square("size", size if squash else size["shortest_edge"])
        image_size = _square("crop_size", processor.get("crop_size", side))
        if image_size > side:
            raise UserError(
                f"crop_size {image_size} is above size {side}: padding is not supported"
            )
        center_crop = None if squash and image_size == side else image_size / side
    normalized = yes_or_no(processor.get("do_normalize", True), "do_normalize")
    return Preprocessing(
        image_size,
        center_crop,
        choose(INTERPOLATIONS, processor.get("resample", 2), "resample"),
        antialias=True,
        mean=channels(processor.get("image_mean", (0.5,) * 3) if normalized else (0.0,) * 3),
        std=channels(processor.get("image_std", (0.5,) * 3) if normalized else (1.0,) * 3),
        resize="huggingface",
        squash=squash and center_crop is not None,
    )


def _check_processor(processor: dict[str, Any]) -> None:
    check_fields(processor, PROCESSOR_FIXED, PROCESSOR_ACCEPTED)
    for key in ("image_processor_type", "feature_extractor_type"):
        if processor.get(key, PROCESSORS[0]) not in PROCESSORS:
            raise UserError(f"{key} is {processor[key]!r}: only {', '.join(PROCESSORS)} are read")
    if not all(yes_or_no(processor.get(x, True), x) for x in ("do_resize", "do_rescale")):
        raise UserError("do_resize or do_rescale is false: images must be resized and rescaled")
    if processor.get("rescale_factor", 1 / 255) != 1 / 255:
        raise UserError(f"rescale_factor {processor['rescale_factor']!r} is not 1/255")


def _one_side(config: dict[str, Any], field: str) -> dict[str, int]:
    size = config.get(field)
    return {} if size is None else {field: _square(field, size)}


def _square(name: str, size: Any) -> int:
    height, width = height_and_width(size, name)
    if height != width:
        raise UserError(f"{name} is {height} x {width}: only square images are supported")
    return height


def config_files(info: ModelInfo) -> dict[str, dict[str, Any]]:
    """Returns the JSON files of a folder, by name, of a model of which all is known.

    Raises:
        UserError: Transformers has no such model, or no such rule for its images.
    """
    preprocessing = info.require_preprocessing()
    if not isinstance(preprocessing.image_size, int):
        _check_rectangle(preprocessing, model_type(info.model))
    return {
        "config.json": _config(info, preprocessing),
        "preprocessor_config.json": _processor(preprocessing),
    }


def _check_rectangle(preprocessing: Preprocessing, kind: str) -> None:
    """Refuses images that are no square where Transformers has no place for these."""
    size = preprocessing.image_size
    if kind not in _CLASSIFIERS:
        raise UserError(
            f"image_size is {size}, but Hugging Face's {kind} is for squares: use --format timm or "
            "official"
        )
    if preprocessing.center_crop is not None:
        raise UserError(
            f"image_size is {size}, but what Hugging Face's processors crop is a square here: use "
            "--format timm or official"
        )


_CLASSES = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "siglip_vision_model": "SiglipVisionModel",
}
_CLASSIFIERS = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
}


def _config(info: ModelInfo, preprocessing: Preprocessing) -> dict[str, Any]:
    model, kind = info.model, model_type(info.model)
    size = preprocessing.image_size
    names = _CLASSIFIERS if model["num_classes"] else _CLASSES
    config = {
        "architectures": [names.get(kind, _CLASSES[kind])],
        "model_type": kind,
        "dtype": "float32",
        "hidden_act": "gelu" if model["gelu"] == "erf" else "gelu_pytorch_tanh",
        "hidden_size": model["hidden_size"],
        "image_size": size if isinstance(size, int) else list(sides(size)),
        "layer_norm_eps": model["layer_norm_epsilon"],
        "num_attention_heads": model["num_heads"],
        "num_channels": preprocessing.channels,
        "num_hidden_layers": model["num_layers"],
        "patch_size": model["patch_size"],
        **_beside(model, kind),
    }
    if model["num_classes"]:
        unnamed = [f"LABEL_{i}" for i in range(model["num_classes"])]
        names = [imagenet.readable(name) for name in info.class_names or unnamed]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
        if info.multi_label:  # Theirs for the sigmoid of one label is no other than the softmax's.
            config["problem_type"] = "multi_label_classification"
    return config


def _beside(model: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields that not all models have.

    Raises:
        UserError: the MLP is of a width that Transformers does not make of a ratio.
    """
    if kind == "siglip_vision_model":
        return {"attention_dropout": 0.0, "intermediate_size": model["mlp_dim"]}
    common = {
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "qkv_bias": True,
    }
    if not kind.startswith("dinov2"):
        return {**common, "intermediate_size": model["mlp_dim"]}
    fields = {
        "layerscale_value": model["layer_scale"],
        "mlp_ratio": _mlp_ratio(model),
        "use_swiglu_ffn": model["mlp"] == "swiglu",
    }
    if kind == "dinov2":  # The mask token is of pre-training.
        return {**common, **fields, "use_mask_token": False}
    return {**common, **fields, "num_register_tokens": model["num_registers"]}


def _mlp_ratio(model: dict[str, Any]) -> int:
    """The whole number of which Transformers makes the width of DINOv2's MLP."""
    width, wanted = model["hidden_size"], model["mlp_dim"]
    for ratio in range(1, 65):
        made = width * ratio
        if model["mlp"] == "swiglu":
            made = (int(made * 2 / 3) + 7) // 8 * 8
        if made == wanted:
            return ratio
    raise UserError(
        f"Hugging Face's DINOv2 has no MLP of width {wanted} on {width}, no multiple: use --format "
        "timm or official"
    )


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    height, width = sides(preprocessing.image_size)
    processor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocessing.mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(preprocessing.std),
        "resample": _RESAMPLE[pil_interpolation(preprocessing)],
        "rescale_factor": 1 / 255,
        "size": {"height": height, "width": width},
    }
    if preprocessing.center_crop is not None:
        processor |= {
            "crop_size": {"height": height, "width": width},
            "do_center_crop": True,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": min(resized_sides(preprocessing))},
        }
        if preprocessing.squash:
            tall, wide = resized_sides(preprocessing)
            processor["size"] = {"height": tall, "width": wide}
    return processor
