"""AxialResNet50 under the paper's recipes; see vit_jax.recipes.get_config for the spec."""

from ml_collections import ConfigDict

from vit_jax import recipes


def get_config(spec: str = "") -> ConfigDict:
    """Pre-trains on ImageNet; "pretrain,imagenet21k", "finetune,cifar10" and so on do the rest."""
    return recipes.get_config("AxialResNet50", spec)
