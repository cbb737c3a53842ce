"""Every field of Transformers' ViTConfig and of timm's VisionTransformer: what becomes of it here.

A field is read, told by the shapes of the arrays, without influence on predictions, or has one
value in the paper's model. Another value of those, and a field that is none of these, is refused:
the model would compute something else, and nobody would notice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.errors import UserError

# What has one value, None being as good as silence.
HUGGINGFACE_FIXED = {
    "auto_map": {},
    "num_channels": 3,
    "pooler_act": "tanh",
    "pruned_heads": {},
    "qkv_bias": True,
    "quantization_config": None,
}
HUGGINGFACE_READ = (
    *("hidden_act", "id2label", "image_size", "layer_norm_eps", "model_type"),
    *("num_attention_heads", "problem_type"),
)
HUGGINGFACE_SHAPES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_labels", "patch_size"),
    "pooler_output_size",
)
# Of training, of masked images, of where the file came from, and of PreTrainedConfig for all
# models, which no ViT reads.
HUGGINGFACE_HARMLESS = (
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

# Of preprocessor_config.json, and the processors that read it as `foreign_configs` does.
PROCESSORS = tuple(
    name + kind
    for name in ("ViT", "CLIP", "DeiT", "Bit")
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
PROCESSOR_KNOWN = (
    *("crop_size", "do_center_crop", "do_normalize", "do_rescale", "do_resize", "image_mean"),
    *("image_processor_type", "feature_extractor_type", "image_std", "resample", "rescale_factor"),
    *("size", "_processor_class", "_valid_processor_keys", "data_format", "default_to_square"),
    *("device", "disable_grouping", "do_convert_rgb", "do_grayscale", "image_seq_length"),
    *("input_data_format", "processor_class", "return_tensors"),
)

TIMM_FIXED = {
    "attn_layer": None,
    "block_fn": None,
    "embed_layer": None,
    "embed_norm_layer": None,
    "final_norm": True,
    "in_chans": 3,
    "init_values": None,
    "mlp_layer": None,
    "pool_include_prefix": False,
    "pos_embed": "learn",
    "pre_norm": False,
    "proj_bias": True,
    "qk_norm": False,
    "qkv_bias": True,
    "reg_tokens": 0,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
}
TIMM_READ = ("act_layer", "global_pool", "img_size", "norm_layer", "num_heads")
TIMM_SHAPES = (
    *("class_token", "depth", "embed_dim", "fc_norm", "mlp_ratio", "no_embed_class"),
    *("num_classes", "patch_size"),
)
# Of training, and of how other image sizes are taken.
TIMM_HARMLESS = (
    *("attn_drop_rate", "drop_path_rate", "drop_rate", "patch_drop_rate", "pos_drop_rate"),
    *("proj_drop_rate", "fix_init", "weight_init", "device", "dtype"),
    *("dynamic_img_pad", "dynamic_img_size", "strict_img_size"),
)
# Those of timm's plain ViTs whose GELU has its tanh form without their configs saying so.
TIMM_TANH = frozenset(
    {
        "vit_base_patch32_siglip_gap_256",
        "vit_giantopt_patch16_siglip_gap_256",
        "vit_giantopt_patch16_siglip_gap_384",
        "vit_large_patch16_siglip_gap_512",
        "vit_so400m_patch16_siglip_gap_256",
        "vit_so400m_patch16_siglip_gap_384",
        "vit_so400m_patch16_siglip_gap_512",
    }
)


# Those of timm's plain ViTs whose heads are not of the usual size, as no file says.
TIMM_NUM_HEADS = {"vit_base_patch16_gap_224": 16}


def check_fields(values: Mapping[str, Any], fixed: Mapping[str, Any], known: Iterable[str]) -> None:
    """Checks that a configuration says nothing that is not understood.

    Args:
        values: its fields.
        fixed: those that must have one value, which None stands for as well.
        known: those that may have any.

    Raises:
        UserError: a field has another value, or is in neither.
    """
    known = set(known)
    for key, value in values.items():
        said = f"{key if key.isprintable() else ascii(key)} is {value!r}"[:100]
        if key in fixed:
            if value is not None and value != fixed[key]:
                raise UserError(f"{said}: only models with {fixed[key]!r} are read, as the paper's")
        elif key not in known:
            raise UserError(
                f"{said}, and nothing is known of this field: take it out of the file if "
                "predictions do not depend on it"
            )


def check_timm_pooling(pool: str | None, has_class: bool) -> None:
    """Checks that timm's pooling is the paper's: the class token, or the mean where there is none.

    Args:
        pool: timm's `global_pool`, None where nothing says it.
        has_class: whether there is a class token.

    Raises:
        UserError: it is another.
    """
    if pool not in (None, "token" if has_class else "avg"):
        raise UserError(
            f"global_pool is {pool!r} {'beside a' if has_class else 'without a'} class token: only "
            "'token' with one and 'avg' without are read"
        )
