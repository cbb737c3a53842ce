"""The objects that a detector finds in images: the best candidates, each object once."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.data.box_views import onto_image
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import Batches, one_ahead
from vit_jax.models.detection import Cells, Found, candidates
from vit_jax.sharding import Mesh, gathering, to_devices

# So many candidates an image, of so high a score, of which those that overlap more than that with a
# better one of their class go; and so many are kept, which are all that COCO's AP looks at. As in
# torchvision's FCOS but for the score, 0.2 there: AP rises with what is less probable, too.
MOST_CANDIDATES = 1000
LEAST_SCORE = 0.05
MOST_OVERLAP = 0.6
MOST_OBJECTS = 100

Detecting = Callable[[Any, dict[str, jax.Array]], tuple[Found, jax.Array, jax.Array]]


class Detections(NamedTuple):
    """The objects found in an image, the most probable first.

    Attributes:
        height: of the image, in pixels.
        width: likewise.
        scores: float32 [objects] in [0, 1].
        classes: int32 [objects].
        corners: float64 [objects, 4]: left, top, right and bottom in pixels of the image.
    """

    height: int
    width: int
    scores: np.ndarray
    classes: np.ndarray
    corners: np.ndarray

    def above(self, score: float) -> "Detections":
        """Leaves out those of less than a score."""
        kept = self.scores >= score
        return self._replace(
            scores=self.scores[kept], classes=self.classes[kept], corners=self.corners[kept]
        )


def make_detecting(model: nn.Module, mesh: Mesh) -> Detecting:
    """Returns a jitted function from (params, batch) to candidates, labels and mask.

    They are whole on every process.
    """

    def find(params: Any, batch: dict[str, jax.Array]) -> tuple[Found, jax.Array, jax.Array]:
        images = batch["image"]
        cells = cast(Cells, model.apply({"params": params}, images))
        height, width = images.shape[1:3]
        found = candidates(cells, (height, width), MOST_CANDIDATES)
        return found, batch["label"], batch["mask"]

    return jax.jit(gathering(find, mesh), out_shardings=NamedSharding(mesh, PartitionSpec()))


def detect(
    detecting: Detecting, params: Any, batches: Batches, mesh: Mesh, preprocessing: Preprocessing
) -> Iterator[Detections]:
    """Yields what is found in each image, in the order of the data.

    Args:
        detecting: from `make_detecting`.
        params: of the model.
        batches: as for `metrics.mean_metrics`; labels are heights and widths of the images.
        mesh: the devices.
        preprocessing: of the model.

    Raises:
        UserError: an output is not finite.
    """
    for each in one_ahead(detecting(params, batch) for batch in to_devices(batches, mesh)):
        found, sizes, mask = jax.device_get(each)
        for index in np.flatnonzero(mask > 0):
            height, width = (int(side) for side in sizes[index])
            image = Found(*(array[index] for array in found))
            yield in_original(image, preprocessing, height, width)


def in_original(found: Found, preprocessing: Preprocessing, height: int, width: int) -> Detections:
    """The objects among the candidates of one image, in pixels of that image.

    Args:
        found: of one image, without the axis of the batch, on the host.
        preprocessing: by which the image was prepared.
        height: of the image, in pixels.
        width: likewise.

    Raises:
        UserError: an output is not finite.
    """
    scores, classes, corners = (np.asarray(x) for x in found)
    if not (np.isfinite(scores).all() and np.isfinite(corners).all()):
        raise UserError("the model's outputs are not finite: its weights are damaged")
    kept = select(scores, classes, corners)
    placed = onto_image(corners[kept].astype(np.float64), preprocessing, height, width)
    shown = (placed[:, 2:] > placed[:, :2]).all(axis=1)  # Others lie beyond a letterbox.
    return Detections(height, width, scores[kept][shown], classes[kept][shown], placed[shown])


def select(scores: np.ndarray, classes: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The indices of the candidates that are kept, the most probable first.

    That is non-maximum suppression within each class: a candidate goes if it overlaps with one that
    is kept.

    Args:
        scores: [candidates].
        classes: likewise.
        corners: [candidates, 4].
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= LEAST_SCORE]
    # Apart from each other, boxes of different classes do not overlap.
    apart = classes[:, None] * (corners.max(initial=0) + 1.0)
    moved = corners.astype(np.float64) + apart
    kept = []
    while len(order) and len(kept) < MOST_OBJECTS:
        best, order = order[0], order[1:]
        kept.append(best)
        order = order[overlap(moved[best], moved[order]) <= MOST_OVERLAP]
    return np.array(kept, np.int64)


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The intersection over union of a box [4] with others [n, 4]; of two without area 0."""
    begin = np.maximum(box[:2], others[:, :2])
    both = np.prod(np.maximum(np.minimum(box[2:], others[:, 2:]) - begin, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return both / np.maximum(areas - both, np.finfo(np.float64).tiny)
