"""A detector as it is loaded, with random weights, and what it has to find."""

import jax
import numpy as np

from vit_jax import models
from vit_jax.checkpoints.detector import Detector
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.boxes import Boxes
from vit_jax.data.protocols import evaluation
from vit_jax.models.detection import HEAD, HeadShape, detector

from .segmenters import TINY


def random_detector(class_names, size=16, protocol="letterbox"):
    """Of images of 16 x 16 pixels; something is found everywhere, as the weights happen to."""
    rng, shape = np.random.default_rng(0), HeadShape(8, 1, 2)
    module = detector(models.create_model(TINY, num_classes=len(class_names)), shape)
    images = np.zeros((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    head = Detector(params.pop(HEAD), shape, tuple(class_names))
    rule = evaluation(protocol, size)
    return Pretrained(params, TINY, rule, None, "softmax", "random", detection=head)


def boxes_of(corners, classes=None, crowd=None, areas=None, **options):
    """Objects of one class, unless others are given."""
    corners = np.array(corners, np.float64).reshape(-1, 4)
    count = len(corners)
    return Boxes(
        corners,
        np.array(classes if classes is not None else [0] * count, np.int32),
        np.array(crowd if crowd is not None else [False] * count, bool),
        np.array(areas if areas is not None else [np.nan] * count, np.float64),
        **options,
    )
