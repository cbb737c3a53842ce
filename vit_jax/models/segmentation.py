"""Semantic segmentation by a linear decoder (Segmenter, Strudel et al., 2021, arXiv 2105.05633).

A linear layer maps each patch to logits of the classes, and these are enlarged bilinearly to the
pixels of the image (Section 3.2, "Linear"). The trunk is that of every other use.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize, sides
from vit_jax.models.base import Grid, Model, linear_head
from vit_jax.models.vit import VisionTransformer
from vit_jax.pixel_classes import IGNORED, MOST_CLASSES

Array = jax.Array

# The parameters that no other model has: a kernel [hidden_size, classes] and a bias [classes].
HEAD = "segmentation_head"


def interpolation(length: int, size: int) -> np.ndarray:
    """The weights by which `length` samples of an axis become `size`, float32 [size, length].

    Bilinear with half-pixel centers: PyTorch's `interpolate` with align_corners=False.
    """
    centers = (np.arange(size) + 0.5) * length / size - 0.5
    centers = np.clip(centers, 0, length - 1)[:, None]
    return np.maximum(0, 1 - np.abs(centers - np.arange(length))).astype(np.float32)


def upsample(x: Array, size: Grid) -> Array:
    """Enlarges x [batch, rows, columns, channels] to [batch, height, width, channels].

    One product an axis: the same in every form in which a model is exported.

    Args:
        x: float32.
        size: height and width.
    """
    batch, rows, columns, channels = x.shape
    (height, width), precise = size, jax.lax.Precision.HIGHEST  # Else a GPU rounds to ten bits.
    x = x.reshape(batch, rows, columns * channels)
    x = jnp.matmul(interpolation(rows, height), x, precision=precise)
    x = x.reshape(batch, height, columns, channels)
    return jnp.matmul(interpolation(columns, width), x, precision=precise)


class SegmentationTransformer(VisionTransformer):
    """A ViT, or with its stem a hybrid, with a linear decoder in place of the classifier.

    The parameters of the trunk keep their names; added is `segmentation_head`, of which the kernel
    starts at zero. `num_classes` is that of the pixels, and representation_size is not read.
    """

    @nn.compact
    def __call__(  # ty: ignore[incompatible-method-override]  # It has no classifier, so no heads.
        self, images: Array, *, train: bool = False
    ) -> Array:
        """Computes the logits of every pixel.

        Args:
            images: [batch, height, width, channels], values in [-1, 1].
            train: whether dropout is on; then the "dropout" RNG is needed.

        Returns:
            [batch, height, width, num_classes] float32.

        Raises:
            UserError: as `VisionTransformer` does.
        """
        config = self.config
        height, width = images.shape[1:3]
        grid = config.grid(height, width)
        z = self._encode(self._embed(images), grid, train)
        patches = z[:, config.num_prefix_tokens :].astype(jnp.float32)
        logits = linear_head(patches, config, HEAD)
        return upsample(logits.reshape(-1, *grid, config.num_classes), (height, width))


def segmenter(trunk: Model) -> SegmentationTransformer:
    """The model that segments with the trunk of another model, whose `num_classes` it takes.

    Raises:
        UserError: the model has no patches that attend to all others, pools by attention, which
            nothing here trains, or has no class or more than masks can tell apart.
    """
    config = trunk.config
    if not (config.has_patch_embeddings and isinstance(trunk, VisionTransformer)):
        raise UserError(
            f"objective segmentation is for ViTs and hybrids: a {type(trunk).__name__} has no "
            "tokens of patches"
        )
    if trunk.config.classifier == "map":
        raise UserError(
            "model.classifier is 'map', but objective segmentation has no pooling: set "
            "--config.model.classifier=gap, which leaves the pooling out"
        )
    if not 1 <= config.num_classes <= MOST_CLASSES:
        raise UserError(
            f"model.num_classes is {config.num_classes}: masks have from 1 to {MOST_CLASSES} "
            f"classes, of which {IGNORED} is none"
        )
    return _with_decoder(type(trunk))(trunk.config)


@functools.cache
def _with_decoder(trunk: type[VisionTransformer]) -> type[SegmentationTransformer]:
    """The class that embeds and encodes as that of the trunk does."""
    return type(f"Segmentation{trunk.__name__}", (SegmentationTransformer, trunk), {})


def multiply_adds(model: SegmentationTransformer, image_size: ImageSize, channels: int) -> int:
    """Multiply-adds of one image's forward pass.

    Args:
        model: from `segmenter`.
        image_size: of the image.
        channels: likewise.
    """
    trunk = model.without_head().config.multiply_adds(image_size, channels)
    (height, width), classes = sides(image_size), model.config.num_classes
    rows, columns = model.config.grid(height, width)
    enlarging = height * columns * (rows + width) * classes
    return trunk + math.prod((rows, columns, model.config.hidden_size, classes)) + enlarging


def pixel_scores(logits: Array, labels: Array) -> dict[str, Array]:
    """Scores predictions of pixels, of which those that are `IGNORED` count for nothing.

    Args:
        logits: [batch, height, width, classes].
        labels: uint8 [batch, height, width], the class of each pixel or `IGNORED`.

    Returns:
        "loss" [batch], the mean cross-entropy of an image's pixels, in nats; "correct" [batch], the
        share of them that was right. Of an image in which no pixel counts both are 0.
    """
    counted = labels != IGNORED
    labels = jnp.where(counted, labels, 0).astype(jnp.int32)
    number = jnp.maximum(counted.sum(axis=(1, 2)), 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, -1) == labels) & counted
    return {
        "loss": jnp.where(counted, losses, 0).sum(axis=(1, 2)) / number,
        "correct": correct.sum(axis=(1, 2)) / number,
    }
