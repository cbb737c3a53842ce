"""A model of pixels as it is loaded, with random weights."""

import jax
import numpy as np

from vit_jax import models
from vit_jax.checkpoints.decoder import Decoder
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.protocols import Preprocessing

TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 8,
    "num_layers": 1,
    "mlp_dim": 8,
    "num_heads": 1,
    "num_classes": 0,
}


def random_segmenter(class_names):
    """Of images of 8 x 8 pixels; every class is predicted somewhere, as the weights happen to."""
    rng, images = np.random.default_rng(0), np.zeros((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(models.create_model(TINY).init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    kernel = rng.normal(size=(8, len(class_names))).astype(np.float32)
    decoder = Decoder({"kernel": kernel, "bias": np.zeros_like(kernel[0])}, tuple(class_names))
    return Pretrained(
        params, TINY, Preprocessing(8), None, "softmax", "random", segmentation=decoder
    )
