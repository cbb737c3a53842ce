"""Features of every patch of an image, for whatever is to be built on them.

A model is compiled for one size of images, of which its position embeddings are interpolated to the
grid (Section 3.2). `VisionModel.dense_features`, `vit-jax features` and the export share this.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.checkpoints.transfer import transfer
from vit_jax.data.images import preprocess
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.models import create_model, describe
from vit_jax.models.base import Grid
from vit_jax.models.dense import check_dense, dense_features, prefix_names, whole_patches

# A side, of the square that evaluation sees; or height and width, to which all of an image is
# resized.
ImageSize = int | Grid


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
        shape: (height, width, 3) of an image.
        preprocessing: of the model; its size is that of a square.
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
            image_size: in pixels; None: the model's.

        Raises:
            UserError: the model has no tokens or not so many layers, or is for no such size.
        """
        no_head: Any = {**pretrained.model, "num_classes": 0, "remat": "nothing"}
        config = check_dense(describe(no_head), layers)
        self._whole = isinstance(image_size, tuple)
        size = pretrained.preprocessing.image_size if image_size is None else image_size
        height, width = sides = size if isinstance(size, tuple) else (size, size)
        # Which refuses what is no side; of all of an image it tells no size.
        self.preprocessing, _ = (
            dataclasses.replace(pretrained.preprocessing, image_size=side) for side in sides
        )
        self.shape = height, width, 3
        self._layers = tuple(layers)
        self._prefix, self._grid = prefix_names(config), whole_patches(config, height, width)
        self._params = jax.device_put(fit(pretrained, height, width))
        self._apply: Any = jax.jit(
            functools.partial(dense_features, config.build(), layers=self._layers)
        )

    def view(self, image: np.ndarray) -> np.ndarray:
        """Prepares an image, uint8 [height, width, 3], for the model, float32 of `shape`."""
        if self._whole:
            return resize_whole(image, self.shape[:2], self.preprocessing)
        return preprocess(image, self.preprocessing)

    def __call__(self, images: np.ndarray) -> Any:
        """Starts to compute on prepared images [batch, *shape]; `collect` takes what comes."""
        return self._apply(self._params, images)

    def collect(self, parts: Sequence[Any], counts: Sequence[int]) -> DenseFeatures:
        """Joins the results of batches, of which the first so many rows are images."""
        pooled, tokens, *layers = (
            np.concatenate([np.asarray(x)[:n] for x, n in zip(xs, counts, strict=True)])
            for xs in zip(*((a, b, *rest) for a, b, rest in parts), strict=True)
        )
        by_number = dict(zip(self._layers, layers, strict=True))
        return DenseFeatures(pooled, tokens, by_number, self._prefix, self._grid)


def fit(pretrained: Pretrained, height: int, width: int) -> dict[str, Any]:
    """The parameters for images of another size: position embeddings are interpolated.

    Args:
        pretrained: the model.
        height: in pixels.
        width: likewise.

    Raises:
        UserError: a side is less than a patch, or the position embeddings are of one grid alone.
    """
    config: Any = describe(pretrained.model)
    side, step = pretrained.preprocessing.image_size, config.downsampling
    grid, own = whole_patches(config, height, width), config.grid(side, side)
    if grid == own:
        return pretrained.params
    if config.position_embedding == "relative":
        raise UserError(
            f"relative position embeddings of {own[0]} x {own[1]} patches cannot be those of "
            f"{grid[0]} x {grid[1]}: use image_size {side}"
        )
    images = jax.ShapeDtypeStruct((1, grid[0] * step, grid[1] * step, 3), np.float32)
    key = jax.ShapeDtypeStruct((2,), np.uint32)
    shapes = jax.eval_shape(create_model(pretrained.model).init, key, images)["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    fitted, _ = transfer(zeros, pretrained.params, keep_head=True, pretrained_grid=own, grid=grid)
    return fitted


# Of an image that shrinks all of these take means: the whole of a photograph is far larger.
_KERNELS = {
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def resize_whole(
    image: np.ndarray, size: tuple[int, int], preprocessing: Preprocessing
) -> np.ndarray:
    """Resizes all of an image, its aspect ratio given up, float32 [height, width, 3].

    By PIL, in 8 bits, with the model's kernel; then mean and std are those of the model.

    Args:
        image: uint8 [height, width, 3].
        size: height and width, in pixels.
        preprocessing: of the model; its crop is passed over.
    """
    kernel = _KERNELS[preprocessing.interpolation]
    pixels = np.asarray(Image.fromarray(image).resize(size[::-1], kernel), np.float32)
    mean, std = (np.array(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
    return (pixels / np.float32(255) - mean) / std
