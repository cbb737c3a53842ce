"""Object detection by a dense head on the grid of patches (FCOS, Tian et al., 2019, 1904.01355).

At each cell of the grid the head tells how probable each class is, how far away the four sides of
the object's box are, and how near to the middle of it the cell lies. There is one grid, the last of
a plain ViT, as ViTDet argues for (Li et al., 2022, arXiv 2203.16527), perhaps enlarged; the trunk
is that of every other use. See `detection_loss` for what it learns.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize, sides
from vit_jax.models.activations import gelu_erf
from vit_jax.models.base import Arrays, Grid, Model
from vit_jax.models.vit import VisionTransformer

Array = jax.Array

# What the names of the parameters begin with that no other model has.
HEAD = "detection_head"
UPSAMPLES = (1, 2, 4)
# The probability of each class at first (Lin et al., 2017, arXiv 1708.02002, Section 4.1), so that
# the many cells without an object do not drown the others.
PRIOR = 0.01
# The exponent of a distance is cut off here: e^8 cells are 48,000 pixels.
_LARGEST_EXPONENT = 8.0
_INIT_STD = 0.01
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """The size of a head.

    Attributes:
        width: channels of its layers.
        layers: convolutions of each of its two towers; FCOS has four.
        upsample: cells on each side of a patch, one of `UPSAMPLES`.
    """

    width: int = 256
    layers: int = 4
    upsample: int = 1


class Cells(NamedTuple):
    """The outputs of the head: what is told of every cell of the grid, float32.

    Attributes:
        logits: [batch, rows, columns, classes], of the classes, each for itself.
        distances: [batch, rows, columns, 4], from the middle of the cell to the left, upper, right
            and lower side of the box, in sides of a cell.
        centerness: [batch, rows, columns], the logit of how near to the middle of its box it lies.
    """

    logits: Array
    distances: Array
    centerness: Array


class DetectionHead(nn.Module):
    """Two towers of convolutions on a grid of features: one for classes, one for boxes.

    Convolutions are 3 x 3, each followed by LayerNorm over the channels, as in ViTDet's heads, and
    ReLU. Before them the grid gets the width of the head; where it is enlarged by transposed
    convolutions of 2 x 2 with stride 2, each followed by LayerNorm and GELU, as there.
    """

    num_classes: int
    shape: HeadShape
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Cells:
        """Maps features [batch, rows, columns, hidden_size] to what is told of the cells."""
        for index in range(int(math.log2(self.shape.upsample))):
            x = self._twice(x, f"up_{index}")
            x = gelu_erf(self._norm(f"up_norm_{index}")(x))
        if self.shape.upsample == 1:
            x = nn.Dense(self.shape.width, dtype=self.dtype, name="neck")(x)
            x = self._norm("neck_norm")(x)
        of_classes, of_boxes = self._tower(x, "class"), self._tower(x, "box")
        prior = -math.log((1 - PRIOR) / PRIOR)
        exponents = self._output(of_boxes, 4, "boxes")
        return Cells(
            self._output(of_classes, self.num_classes, "classes", prior),
            jnp.exp(jnp.minimum(exponents, _LARGEST_EXPONENT)),
            self._output(of_boxes, 1, "centerness")[..., 0],
        )

    def _twice(self, x: Array, name: str) -> Array:
        """A transposed convolution of 2 x 2 with stride 2: nothing overlaps, so it is a product."""
        batch, rows, columns, _ = x.shape
        x = nn.Dense(4 * self.shape.width, dtype=self.dtype, name=name)(x)
        x = x.reshape(batch, rows, columns, 2, 2, -1).swapaxes(2, 3)
        return x.reshape(batch, 2 * rows, 2 * columns, -1)

    def _tower(self, x: Array, name: str) -> Array:
        for index in range(self.shape.layers):
            x = self._conv(self.shape.width, f"{name}_{index}", self.dtype)(x)
            x = nn.relu(self._norm(f"{name}_norm_{index}")(x))
        return x

    def _output(self, x: Array, features: int, name: str, bias: float = 0.0) -> Array:
        return self._conv(features, name, jnp.float32, bias)(x.astype(jnp.float32))

    def _conv(self, features: int, name: str, dtype: Any, bias: float = 0.0) -> nn.Conv:
        return nn.Conv(
            features,
            (3, 3),
            dtype=dtype,
            kernel_init=nn.initializers.normal(_INIT_STD),
            bias_init=nn.initializers.constant(bias),
            name=name,
        )

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(_EPSILON, dtype=self.dtype, name=name)


def shape_of(arrays: Arrays) -> tuple[HeadShape, int]:
    """The size of a head and its number of classes, by its parameters without `HEAD`.

    Raises:
        UserError: they are of no head.
    """
    layers = sum(f"class_{i}/kernel" in arrays for i in range(len(arrays)))
    ups = sum(f"up_{i}/kernel" in arrays for i in range(len(arrays)))
    bias, kernel = arrays.get("classes/bias"), arrays.get("classes/kernel")
    if bias is None or kernel is None or np.ndim(kernel) != 4 or 2**ups not in UPSAMPLES:
        raise UserError(f"{HEAD} is no head of a detector: fetch the file again")
    return HeadShape(np.shape(kernel)[2], layers, 2**ups), np.size(bias)


class DetectionTransformer(VisionTransformer):
    """A ViT, or with its stem a hybrid, with a head that detects in place of the classifier.

    The parameters of the trunk keep their names; added are those of `detection_head`. `num_classes`
    is that of the objects, and representation_size is not read.
    """

    shape: HeadShape = HeadShape()

    @nn.compact
    def __call__(  # ty: ignore[incompatible-method-override]  # It has no classifier, so no heads.
        self, images: Array, *, train: bool = False
    ) -> Cells:
        """Computes what is told of every cell.

        Args:
            images: [batch, height, width, channels], values in [-1, 1].
            train: whether dropout is on; then the "dropout" RNG is needed.

        Raises:
            UserError: as `VisionTransformer` does.
        """
        config = self.config
        grid = config.grid(*images.shape[1:3])
        z = self._encode(self._embed(images), grid, train)
        patches = z[:, config.num_prefix_tokens :].reshape(-1, *grid, config.hidden_size)
        head = DetectionHead(config.num_classes, self.shape, config.compute_dtype, name=HEAD)
        return head(patches)


def detector(trunk: Model, shape: HeadShape) -> DetectionTransformer:
    """The model that detects with the trunk of another model, whose `num_classes` it takes.

    Raises:
        UserError: the model has no patches that attend to all others, pools by attention, which
            nothing here trains, or has no class.
    """
    config = trunk.config
    if not (config.has_patch_embeddings and isinstance(trunk, VisionTransformer)):
        raise UserError(
            f"objective detection is for ViTs and hybrids: a {type(trunk).__name__} has no tokens "
            "of patches"
        )
    if trunk.config.classifier == "map":
        raise UserError(
            "model.classifier is 'map', but objective detection has no pooling: set "
            "--config.model.classifier=gap, which leaves the pooling out"
        )
    if config.num_classes < 1:
        raise UserError(f"model.num_classes is {config.num_classes}: a detector has 1 or more")
    return _with_head(type(trunk))(trunk.config, shape)


@functools.cache
def _with_head(trunk: type[VisionTransformer]) -> type[DetectionTransformer]:
    """The class that embeds and encodes as that of the trunk does."""
    return type(f"Detection{trunk.__name__}", (DetectionTransformer, trunk), {})


def grid_of_cells(config: Any, image_size: ImageSize, upsample: int) -> Grid:
    """The rows and columns of cells.

    Args:
        config: of the trunk, a `ViTConfig`.
        image_size: of the image.
        upsample: see `HeadShape`.
    """
    rows, columns = config.grid(*sides(image_size))
    return rows * upsample, columns * upsample


def multiply_adds(model: DetectionTransformer, image_size: ImageSize, channels: int) -> int:
    """Multiply-adds of one image's forward pass.

    Those of convolutions with the zeros around the grid are not counted, as nowhere here.

    Args:
        model: from `detector`.
        image_size: of the image.
        channels: likewise.
    """
    shape, width = model.shape, model.config.hidden_size
    trunk = model.without_head().config.multiply_adds(image_size, channels)
    rows, columns = model.config.grid(*sides(image_size))
    total = 0 if shape.upsample > 1 else rows * columns * width * shape.width
    for _ in range(int(math.log2(shape.upsample))):
        total += rows * columns * width * 4 * shape.width
        rows, columns, width = 2 * rows, 2 * columns, shape.width
    # Of a row of n cells the three of a kernel meet 3 n - 2.
    a_channel = (3 * rows - 2) * (3 * columns - 2) * shape.width
    total += a_channel * shape.width * 2 * shape.layers
    return trunk + total + a_channel * (model.config.num_classes + 5)


class Found(NamedTuple):
    """The best candidates of each image, the most probable first.

    Attributes:
        scores: float32 [batch, candidates] in [0, 1].
        classes: int32 [batch, candidates].
        corners: float32 [batch, candidates, 4]: left, top, right and bottom in pixels of the
            image that the model sees.
    """

    scores: Array
    classes: Array
    corners: Array


def cell_centers(grid: Grid, image: Grid) -> np.ndarray:
    """The middles of cells, float32 [rows, columns, 2], x and y in pixels of an image.

    Args:
        grid: rows and columns.
        image: height and width.
    """
    y, x = (
        (np.arange(count) + 0.5) * size / count for count, size in zip(grid, image, strict=True)
    )
    return np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32)


def scores_and_corners(cells: Cells, image: Grid) -> tuple[Array, Array]:
    """The score of every class and the box of every cell.

    A score is the geometric mean of the probability of the class and the centerness, as in FCOS's
    later code and torchvision.

    Args:
        cells: from the model.
        image: its height and width.

    Returns:
        float32 [batch, rows, columns, classes], and corners, float32 [batch, rows, columns, 4]:
        left, top, right and bottom in pixels, cut off at the edge of the image.
    """
    probabilities = jax.nn.sigmoid(cells.logits) * jax.nn.sigmoid(cells.centerness)[..., None]
    rows, columns = cells.logits.shape[1:3]
    centers = cell_centers((rows, columns), image)
    size = np.array([image[1] / columns, image[0] / rows], np.float32)
    corners = [centers - cells.distances[..., :2] * size, centers + cells.distances[..., 2:] * size]
    edge = np.array([image[1], image[0]] * 2, np.float32)
    return jnp.sqrt(probabilities), jnp.clip(jnp.concatenate(corners, axis=-1), 0, edge)


def scores_and_boxes(cells: Cells) -> Array:
    """The output of an exported model: float32 [batch, cells, classes + 4], all in [0, 1].

    Of each cell the score of every class, then left, top, right and bottom of its box in shares of
    the width and height of the image that the model sees: so one tolerance holds for all, and half
    precision is precise. The cells are those of the grid, row by row.

    Args:
        cells: from the model.
    """
    scores, corners = scores_and_corners(cells, (1, 1))
    _, rows, columns, classes = scores.shape
    return jnp.concatenate([scores, corners], axis=-1).reshape(-1, rows * columns, classes + 4)


def candidates(cells: Cells, image: Grid, most: int) -> Found:
    """The pairs of a cell and a class with the highest scores.

    Args:
        cells: from the model.
        image: its height and width.
        most: how many, of fewer all.
    """
    scores, corners = scores_and_corners(cells, image)
    batch, rows, columns, classes = scores.shape
    count = rows * columns * classes
    scores, places = jax.lax.top_k(scores.reshape(batch, count), min(most, count))
    corners = corners.reshape(batch, rows * columns, 4)
    chosen = jnp.take_along_axis(corners, (places // classes)[..., None], axis=1)
    return Found(scores, (places % classes).astype(jnp.int32), chosen)
