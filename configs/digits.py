"""A small ViT on scikit-learn's digits: trains in minutes on a CPU, downloads nothing."""

from ml_collections import ConfigDict

from vit_jax import recipes


def get_config() -> ConfigDict:
    """ImageNet's recipe, shortened to 1,442 images of 8 x 8 pixels."""
    config = recipes.get_config("ViT-Ti/2", "pretrain,digits")
    config.batch_size = 64
    config.duration = "65 epochs"
    config.label_smoothing = 0.1
    config.log_every = "5 epochs"
    config.evals.val.every = "5 epochs"
    config.checkpoint_every = "5 epochs"
    config.dataset.image_size = 8
    config.dataset.protocol = "pad"
    config.dataset.random_crop = False
    config.dataset.random_flip = False
    config.model.hidden_size = 64
    config.model.num_layers = 4
    config.model.mlp_dim = 128
    config.model.num_heads = 4
    config.model.representation_size = 0
    config.model.dtype = "float32"
    config.schedule.base_lr = 3e-3
    config.schedule.warmup = "5 epochs"
    return config
