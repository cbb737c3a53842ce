"""Masked patch prediction whose patches can be looked at, by a small ViT, see docs/restoration.md.

    --config configs/restoration.py:folder:photos
    --config configs/restoration.py:oxford_flowers102

Every pixel of the masked patches is predicted, of images of 96 pixels, without a label. Any other
ViT: `--config vit:ViT-B/16,masked,DATASET --config.masking.target=pixels`.
"""

from ml_collections import ConfigDict

from vit_jax import recipes


def get_config(dataset: str = "folder:photos") -> ConfigDict:
    """Appendix B.1.2 with its target of whole patches, in some 20 minutes of a CPU core."""
    config = recipes.get_config("ViT-Ti/8", f"masked,{dataset}")
    config.masking.target = "pixels"
    config.batch_size = 32
    config.duration = "1900 steps"
    config.log_every = "50 steps"
    config.evals.val.every = "500 steps"
    config.checkpoint_every = "500 steps"
    config.dataset.image_size = 96
    config.model.hidden_size = 128
    config.model.num_layers = 6
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.position_embedding = "sincos2d"
    config.model.dtype = "float32"
    config.schedule.base_lr = 1e-3
    config.schedule.warmup = "200 steps"
    return config
