"""Features of every patch of an image, for whatever is to be built on them.

A model is compiled for one size of images, of which its position embeddings are interpolated to the
grid (Section 3.2). `VisionModel.dense_features` and `vit-jax features` share this.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vit_jax.checkpoints.pretrained import Pretrained, resize
from vit_jax.image_size import ImageSize, of_sides, sides
from vit_jax.models import describe, prediction_fields
from vit_jax.models.base import Grid
from vit_jax.models.dense import check_dense, dense_features, prefix_names, whole_patches


@dataclasses.dataclass(frozen=True)
class DenseFeatures:
    """Pooled features of images, and those of their patches.

    Attributes:
        pooled: [n, features] float32, what the head is applied to.
        tokens: [n, tokens, hidden_size] float32, after the last LayerNorm: those of `prefix` first,
            then the patches, row by row.
        layers: by its number from 1 on the result of each layer that was asked for, likewise,
            before any LayerNorm.
        prefix: the names of the tokens before the patches: "class", "distillation", "register_1".
        shape: rows and columns of patches.
    """

    pooled: np.ndarray
    tokens: np.ndarray
    layers: dict[int, np.ndarray]
    prefix: tuple[str, ...]
    shape: Grid

    @property
    def grid(self) -> np.ndarray:
        """The patches of `tokens`, [n, rows, columns, hidden_size]."""
        return self.on_grid(self.tokens)

    def on_grid(self, tokens: np.ndarray) -> np.ndarray:
        """The patches of tokens, such as those of one of `layers`, as `grid`."""
        patches = tokens[:, len(self.prefix) :]
        return patches.reshape(len(tokens), *self.shape, tokens.shape[-1])


class Extractor:
    """A model that is compiled for images of one size, and gives what `DenseFeatures` are made of.

    Attributes:
        preprocessing: what evaluation makes of an image at that size.
        is_own_size: whether the model's parameters are used as they are.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        layers: Sequence[int] = (),
        image_size: ImageSize | None = None,
    ):
        """Fits the model to the size.

        Args:
            pretrained: the model.
            layers: see `DenseFeatures`.
            image_size: in pixels; None: the model's. Its sides need be no multiples of a patch's.

        Raises:
            UserError: the model has no tokens or not so many layers, or is for no such size.
        """
        # `scan_layers` and `remat` would hide the layers.
        model = prediction_fields(pretrained.model)
        config = check_dense(describe(model, num_classes=0, remat="nothing"), layers)
        old = pretrained.preprocessing
        size = old.image_size if image_size is None else image_size
        self.preprocessing = dataclasses.replace(old, image_size=size)
        self._layers = tuple(layers)
        self._prefix, self._grid = prefix_names(config), whole_patches(config, *sides(size))
        whole = of_sides(*(side * config.downsampling for side in self._grid))
        self.is_own_size = whole == old.image_size
        if not self.is_own_size:
            pretrained = resize(pretrained, whole)
        self._params = jax.device_put(pretrained.params)
        self._apply: Any = jax.jit(
            functools.partial(dense_features, config.build(), layers=self._layers)
        )

    def __call__(self, images: np.ndarray) -> Any:
        """Starts to compute on prepared images; `collect` takes what comes."""
        return self._apply(self._params, images)

    def collect(self, parts: Sequence[Any], counts: Sequence[int]) -> DenseFeatures:
        """Joins the results of batches, of which the first so many rows are images."""
        pooled, tokens, *layers = (
            np.concatenate([np.asarray(x)[:n] for x, n in zip(xs, counts, strict=True)])
            for xs in zip(*((a, b, *rest) for a, b, rest in parts), strict=True)
        )
        by_number = dict(zip(self._layers, layers, strict=True))
        return DenseFeatures(pooled, tokens, by_number, self._prefix, self._grid)
