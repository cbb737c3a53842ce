"""Boxes of objects: what a data set says of an image, and what a view of the image shows of it."""

import dataclasses
import hashlib

import numpy as np

from vit_jax.data.resampling import Box
from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize, sides

# The class of a row that is no object, in an array of as many rows as an image may have objects.
NO_OBJECT = -1
# What is left of an object at the edge of a view counts from so many pixels on, of either side.
_LEAST = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of an image.

    Attributes:
        corners: float64 [objects, 4]: left, top, right and bottom, in pixels from the top left
            corner of the image, or in shares of its width and height.
        classes: int32 [objects].
        crowd: bool [objects]: whether it is a group of objects, or one that nobody is expected to
            find. Such are not trained on, and to find them is neither right nor wrong.
        areas: float64 [objects] in square pixels, by which COCO tells small objects from large
            ones; NaN where it is that of the box, as far as that lies in the image.
        is_relative: whether corners are shares.
        size: height and width that the image must have, in pixels, if they are known.
    """

    corners: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    is_relative: bool = False
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Returns the number of objects."""
        return len(self.classes)

    def within(self, height: int, width: int) -> "Boxes":
        """Leaves out what lies wholly beyond an image, in whose pixels the corners are."""
        corners = np.clip(self.corners, 0, [width, height] * 2)
        kept = (corners[:, 2:] > corners[:, :2]).all(axis=1)
        arrays = ("corners", "classes", "crowd", "areas")
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in arrays})

    def of_image(self, height: int, width: int) -> "Boxes":
        """The same in pixels of an image and cut off at its edge, with an area of each.

        Raises:
            UserError: the image is of another size; it is called "the image" there.
        """
        if self.size is not None and self.size != (height, width):
            raise UserError(
                f"the image has {width} x {height} pixels, and {self.size[1]} x {self.size[0]} by "
                "its annotations: mend either"
            )
        scale = np.array([width, height, width, height]) if self.is_relative else 1.0
        corners = np.clip(self.corners * scale, 0, [width, height] * 2)
        wide, tall = (corners[:, 2:] - corners[:, :2]).T
        areas = np.where(np.isnan(self.areas), wide * tall, self.areas)
        return dataclasses.replace(self, corners=corners, areas=areas, is_relative=False)

    def digest(self) -> str:
        """A digest of all that is said of the objects."""
        found = hashlib.blake2b(digest_size=8)
        for array in (self.corners, self.classes, self.crowd, self.areas):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


def in_view(
    boxes: Boxes, box: Box, size: ImageSize, *, is_mirrored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The objects that a view of an image shows: corners float64 [objects, 4], and classes.

    What lies beyond the view is cut off. Left out are crowds, and objects of which less than a
    pixel is left in height or width.

    Args:
        boxes: in pixels of the image.
        box: the part of the image that the view shows, in its pixels.
        size: of the view.
        is_mirrored: whether left and right are exchanged.
    """
    (top, left, tall, wide), (height, width) = box, sides(size)
    origin, scale = np.array([left, top] * 2), np.array([width / wide, height / tall] * 2)
    corners = (boxes.corners[~boxes.crowd] - origin) * scale
    if is_mirrored:
        corners[:, [0, 2]] = width - corners[:, [2, 0]]
    corners = np.clip(corners, 0, [width, height] * 2)
    shown = (corners[:, 2:] - corners[:, :2] >= _LEAST).all(axis=1)
    return corners[shown], boxes.classes[~boxes.crowd][shown]


def in_image(corners: np.ndarray, box: Box, size: ImageSize, height: int, width: int) -> np.ndarray:
    """Corners [objects, 4] in a view as those in its image, cut off at the edge of that.

    Args:
        corners: in pixels of the view.
        box: as in `in_view`.
        size: likewise.
        height: of the image, in pixels.
        width: likewise.
    """
    (top, left, tall, wide), view = box, sides(size)
    scale = np.array([wide / view[1], tall / view[0]] * 2)
    return np.clip(corners * scale + np.array([left, top] * 2), 0, [width, height] * 2)


def in_rows(corners: np.ndarray, classes: np.ndarray, most: int) -> np.ndarray:
    """Objects as an array of one size, float32 [most, 5]: corners and class, or `NO_OBJECT`.

    Where there are more than `most` the largest are kept, in their order.

    Args:
        corners: [objects, 4].
        classes: [objects].
        most: rows of the result.
    """
    if len(corners) > most:
        areas = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
        kept = np.sort(np.argsort(-areas, kind="stable")[:most])
        corners, classes = corners[kept], classes[kept]
    rows = np.zeros((most, 5), np.float32)
    rows[:, 4] = NO_OBJECT
    rows[: len(corners), :4] = corners
    rows[: len(classes), 4] = classes
    return rows
