"""A small ViT on CIFAR-10 from scratch, sized for half an hour on two CPU cores.

vit-jax train --config experiments/cifar10_from_scratch.py
"""

from ml_collections import ConfigDict

from vit_jax import recipes


def get_config() -> ConfigDict:
    """ImageNet's recipe for images of 32 x 32 pixels: patches of 4, no dropout, a higher rate."""
    config = recipes.get_config("ViT-Ti/4", "pretrain,cifar10")
    config.batch_size = 128
    config.duration = "10 epochs"
    config.log_every = "100 steps"
    config.eval_every = "1 epoch"
    config.checkpoint_every = "1 epoch"
    config.dataset.image_size = 32
    config.dataset.protocol = "pad"
    config.model.hidden_size = 96
    config.model.num_layers = 6
    config.model.mlp_dim = 192
    config.model.num_heads = 3
    config.model.representation_size = 0
    config.model.dropout_rate = 0.0
    config.model.dtype = "float32"
    config.schedule.base_lr = 1e-3
    config.schedule.warmup = "500 steps"
    return config
