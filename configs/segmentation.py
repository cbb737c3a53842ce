"""Semantic segmentation by a ViT with a linear decoder, see docs/segmentation.md.

    --config configs/segmentation.py:ViT-S/16,folder:photos --config.init_from=S_16
    --config configs/segmentation.py:ViT-B/16,oxford_iiit_pet --config.init_from=B_16 \
        --config.model.num_classes=4
    --config configs/segmentation.py:tiny,folder:shapes

The first two are Segmenter's recipe (`vit_jax.recipes.presets.segmentation`). `tiny` is a ViT of 4
layers on images of 48 pixels, from scratch.
"""

from ml_collections import ConfigDict

from vit_jax import recipes
from vit_jax.errors import UserError, brief


def get_config(spec: str = "tiny,folder:shapes") -> ConfigDict:
    """The config of "MODEL,DATASET".

    Raises:
        UserError: it names no data set, or the model is unknown.
    """
    model, _, dataset = spec.partition(",")
    if not dataset:
        raise UserError(
            f"spec {brief(spec)} names no data set: for example {model},folder:PATH, with images/ "
            "and masks/ in it"
        )
    if model == "tiny":
        return _tiny(dataset)
    return recipes.get_config(recipes.model_name(model), f"segmentation,{dataset}")


def _tiny(dataset: str) -> ConfigDict:
    config = recipes.get_config("ViT-Ti/4", f"pretrain,{dataset}")
    config.objective = "segmentation"
    config.batch_size = 32
    config.duration = "1000 steps"
    config.log_every = "50 steps"
    config.evals.val.every = "250 steps"
    config.checkpoint_every = "250 steps"
    config.dataset.image_size = 48
    config.dataset.protocol = "pad"
    config.model.hidden_size = 64
    config.model.num_layers = 4
    config.model.mlp_dim = 128
    config.model.num_heads = 4
    config.model.dropout_rate = 0.0
    config.model.representation_size = 0
    config.model.dtype = "float32"
    config.optimizer.weight_decay = 0.05
    config.schedule.base_lr = 2e-3
    config.schedule.warmup = "50 steps"
    return config
