"""Object detection by a ViT with a dense head, see docs/detection.md.

    --config configs/detection.py:ViT-B/16,folder:coco --config.init_from=B_16
    --config configs/detection.py:ViT-S/16,voc/2012 --config.init_from=S_16
    --config configs/detection.py:tiny,folder:shapes

The first two are ViTDet's recipe (`vit_jax.recipes.presets.detection`). `tiny` is a ViT of 4 layers
on images of 64 pixels, from scratch.
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
            f"spec {brief(spec)} names no data set: for example {model},folder:PATH, with "
            "annotations/instances_train.json in it"
        )
    if model == "tiny":
        return _tiny(dataset)
    return recipes.get_config(recipes.model_name(model), f"detection,{dataset}")


def _tiny(dataset: str) -> ConfigDict:
    config = recipes.get_config("ViT-Ti/8", f"pretrain,{dataset}")
    config.objective = "detection"
    config.batch_size = 32
    config.duration = "2000 steps"
    config.log_every = "50 steps"
    config.evals.val.every = "500 steps"
    config.checkpoint_every = "500 steps"
    config.dataset.image_size = 64
    config.dataset.protocol = "letterbox"
    config.detection.update({"width": 64, "layers": 2, "upsample": 2, "most_boxes": 20})
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
