"""Views of images whose objects have boxes, in training and in evaluation."""

from typing import Any

import numpy as np

from vit_jax.data.boxes import Boxes, in_image, in_rows, in_view
from vit_jax.data.images import open_image, preprocess
from vit_jax.data.preprocess import box_of_evaluation, located_view
from vit_jax.data.protocols import Preprocessing


def train_boxes(
    encoded: bytes, boxes: Boxes, rng: np.random.Generator, *, most_boxes: int, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `preprocess.train_view` does, and the objects in it, float32 [most_boxes, 5].

    The rows are those of `boxes.in_rows`, in pixels of the view.

    Args:
        encoded: the image.
        boxes: of its objects.
        rng: as in `train_view`.
        most_boxes: so many objects are kept, the largest.
        **options: as in `train_view`, but for RandAugment, which would move pixels and not boxes.

    Raises:
        UserError: as in `train_view`, or the image has another size than its annotations say.
    """
    view, geometry = located_view(encoded, rng, **options)
    corners, classes = in_view(
        boxes.of_image(geometry.height, geometry.width),
        geometry.box,
        options["image_size"],
        is_mirrored=geometry.is_mirrored,
    )
    return view, in_rows(corners, classes, most_boxes)


def eval_boxes(
    encoded: bytes, boxes: Boxes, preprocessing: Preprocessing, *, turn: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `preprocess.eval_view` does, and the size of the image, float32 [2].

    That is its height and width. Evaluation compares what was found with the objects in the image,
    not in its view.

    Args:
        encoded: the image.
        boxes: of its objects.
        preprocessing: of the model.
        turn: see `images.read_image`.

    Raises:
        UserError: as in `train_boxes`.
    """
    channels = preprocessing.channels
    with open_image(
        "the image", encoded, preprocessing.jpeg_dct, turn=turn, channels=channels
    ) as image:
        boxes.of_image(*image.shape[:2])
        return preprocess(image, preprocessing), np.array(image.shape[:2], np.float32)


def onto_image(
    corners: np.ndarray, preprocessing: Preprocessing, height: int, width: int
) -> np.ndarray:
    """Corners [objects, 4] in what evaluation sees of an image as those in the image, in pixels.

    Args:
        corners: in pixels of the model's input.
        preprocessing: of the model.
        height: of the image, in pixels.
        width: likewise.
    """
    box = box_of_evaluation(preprocessing, height, width)
    return in_image(corners, box, preprocessing.image_size, height, width)
