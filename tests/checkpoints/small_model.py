"""A ViT of three classes that takes no time, as a model and as what is saved with it."""

from vit_jax.checkpoints.model_info import ModelInfo
from vit_jax.data.protocols import Preprocessing

MODEL = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 16,
    "num_layers": 1,
    "mlp_dim": 32,
    "num_heads": 2,
    "num_classes": 3,
    "classifier": "token",
    "representation_size": 0,
    "gelu": "erf",
    "layer_norm_epsilon": 1e-6,
}
INFO = ModelInfo(MODEL, Preprocessing(16, 0.875), ("a", "b", "c"))
