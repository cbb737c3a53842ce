"""The objective of a detector's cells (FCOS, Tian et al., 2019, arXiv 1904.01355).

A cell is to tell an object if its middle lies within the object's box, and within 1.5 cells of the
middle of the box ("center sampling" of the paper's later version); of several objects the one of
the smallest area. The classes have the focal loss, boxes that of the generalized IoU, and the
centerness the cross-entropy. As in torchvision all are divided by the number of such cells in the
batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.base import Grid
from vit_jax.models.detection import Cells, cell_centers

Array = jax.Array

RADIUS = 1.5  # of center sampling, in cells
# Of the focal loss (Lin et al., 2017, arXiv 1708.02002, Section 5.1).
ALPHA, GAMMA = 0.25, 2.0
_EPSILON = 1e-7


class Targets(NamedTuple):
    """The truth that the cells are to tell.

    Attributes:
        classes: int32 [batch, rows, columns], -1 where there is no object.
        distances: float32 [batch, rows, columns, 4], as `Cells.distances`; of cells without an
            object they mean nothing.
        centerness: float32 [batch, rows, columns] in [0, 1] (the paper's Eq. 3), likewise.
    """

    classes: Array
    distances: Array
    centerness: Array


def assign(labels: Array, grid: Grid, image: Grid) -> Targets:
    """Finds the object that each cell is to tell.

    Args:
        labels: float32 [batch, objects, 5]: left, top, right and bottom in pixels of the image, and
            the class, -1 of a row that is no object.
        grid: rows and columns of cells.
        image: height and width, in pixels.
    """
    centers = jnp.asarray(cell_centers(grid, image))[None, :, :, None]  # [1, rows, columns, 1, 2]
    size = jnp.array([image[1] / grid[1], image[0] / grid[0]], jnp.float32)
    boxes = labels[:, None, None]  # [batch, 1, 1, objects, 5]
    begin, end = boxes[..., :2], boxes[..., 2:4]
    inside = ((centers > begin) & (centers < end)).all(-1)
    near = (jnp.abs(centers - (begin + end) / 2) < RADIUS * size).all(-1)
    is_told = inside & near & (boxes[..., 4] >= 0)
    areas = jnp.where(is_told, jnp.prod(end - begin, axis=-1), jnp.inf)
    chosen = jnp.argmin(areas, axis=-1)  # Of equal ones the first. [batch, rows, columns]
    flat = chosen.reshape(len(labels), -1, 1)
    own = jnp.take_along_axis(labels, flat, axis=1).reshape(*chosen.shape, 5)
    middle = centers[..., 0, :]
    distances = jnp.concatenate(
        [(middle - own[..., :2]) / size, (own[..., 2:4] - middle) / size], axis=-1
    )
    has_object = is_told.any(-1)
    classes = jnp.where(has_object, own[..., 4].astype(jnp.int32), -1)
    return Targets(classes, distances, _centerness(distances, has_object))


def _centerness(distances: Array, has_object: Array) -> Array:
    distances = jnp.where(has_object[..., None], distances, 1.0)
    opposite = jnp.stack([distances[..., :2], distances[..., 2:]])
    return jnp.sqrt(jnp.prod(opposite.min(0) / opposite.max(0), axis=-1))


def giou(first: Array, second: Array) -> Array:
    """Generalized IoU (Rezatofighi et al., 2019, arXiv 1902.09630) of boxes around one point.

    Args:
        first: [..., 4], positive distances of the point to the left, upper, right and lower side.
        second: likewise.

    Returns:
        [...] in (-1, 1].
    """

    def area(distances: Array) -> Array:
        return jnp.prod(distances[..., :2] + distances[..., 2:], axis=-1)

    both, around = area(jnp.minimum(first, second)), area(jnp.maximum(first, second))
    union = area(first) + area(second) - both
    return both / (union + _EPSILON) - (around - union) / (around + _EPSILON)


def cell_losses(cells: Cells, targets: Targets) -> dict[str, Array]:
    """The losses of each image, summed over its cells.

    Args:
        cells: from the model.
        targets: of the same grid.

    Returns:
        "classes", "boxes" and "centerness", float32 [batch].
    """
    has_object = targets.classes >= 0
    one_hot = jax.nn.one_hot(targets.classes, cells.logits.shape[-1])  # -1 is none.
    focal = optax.sigmoid_focal_loss(cells.logits, one_hot, alpha=ALPHA, gamma=GAMMA)
    # Where nothing is learned the distances are as good as any: no NaN may come of them.
    distances = jnp.where(has_object[..., None], targets.distances, 1.0)
    outside = 1 - giou(cells.distances, distances)
    centerness = optax.sigmoid_binary_cross_entropy(cells.centerness, targets.centerness)
    return {
        "classes": focal.sum((1, 2, 3)),
        "boxes": jnp.where(has_object, outside, 0).sum((1, 2)),
        "centerness": jnp.where(has_object, centerness, 0).sum((1, 2)),
    }


def image_weight(targets: Targets) -> Array:
    """The factor of the sums of an image with which the mean over the images is the loss.

    That is the number of images by the number of cells with an object, of all images together, [].
    """
    return len(targets.classes) / jnp.maximum((targets.classes >= 0).sum(), 1)
