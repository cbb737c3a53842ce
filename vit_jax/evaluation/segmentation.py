"""The scores of a model that predicts the class of every pixel: mIoU and what goes with it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import Batches, one_ahead
from vit_jax.models.segmentation import pixel_scores
from vit_jax.pixel_classes import IGNORED
from vit_jax.sharding import Mesh, gathering, to_devices

if TYPE_CHECKING:  # It imports TFDS.
    from vit_jax.data.source import Source

Counts = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class SegmentationMetrics:
    """The result of `segmentation_metrics`; pixels that are ignored count nowhere.

    Attributes:
        confusion: int64 [classes, classes], pixels by [true class, predicted class], of all images.
        loss: the mean of those of the images, in nats, see `models.segmentation.pixel_scores`.
        examples: the number of images.
    """

    confusion: np.ndarray = dataclasses.field(repr=False)
    loss: float
    examples: int

    @property
    def iou(self) -> np.ndarray:
        """The intersection over union of each class, float64 [classes] in [0, 1].

        NaN of a class that no pixel has and none is predicted to have.
        """
        both = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - both
        return np.where(union > 0, both / np.maximum(union, 1), np.nan)

    def scalars(self) -> dict[str, float]:
        """All that is a number.

        "examples", how many images there were; "mIoU", the mean of `iou` over the classes that have
        one; "pixel_accuracy", the share of all pixels that is right; "loss".
        """
        return {
            "examples": self.examples,
            "mIoU": float(np.nanmean(self.iou)),
            "pixel_accuracy": float(np.trace(self.confusion) / self.confusion.sum()),
            "loss": self.loss,
        }

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The "name" of each class, its "iou", None where there is none, and its "pixels"."""
        rows = zip(names, self.iou, self.confusion.sum(1), strict=True)
        return [
            {"name": name, "iou": None if np.isnan(iou) else float(iou), "pixels": int(pixels)}
            for name, iou, pixels in rows
        ]


def make_counting(model: nn.Module, mesh: Mesh) -> Callable[[Any, Counts], Counts]:
    """Returns a jitted function from (params, batch) to sums, whole on every process.

    They are "confusion", int32 [classes, classes], "loss", and "count", the number of images.
    """

    def count(params: Any, batch: Counts) -> Counts:
        logits = cast(jax.Array, model.apply({"params": params}, batch["image"]))
        labels, real = batch["label"], batch["mask"] > 0
        classes = logits.shape[-1]
        counted = (labels != IGNORED) & real[:, None, None]
        pairs = labels.astype(jnp.int32) * classes + jnp.argmax(logits, -1)
        pairs = jnp.where(counted, pairs, classes**2)  # What does not count comes last.
        pixels = jnp.bincount(pairs.ravel(), length=classes**2 + 1)[:-1]
        losses = pixel_scores(logits, labels)["loss"]
        return {
            "confusion": pixels.reshape(classes, classes),
            "loss": jnp.sum(jnp.where(real, losses, 0)),
            "count": jnp.sum(real, dtype=jnp.int32),
        }

    return jax.jit(gathering(count, mesh), out_shardings=NamedSharding(mesh, PartitionSpec()))


def segmentation_metrics(
    counting: Callable[[Any, Counts], Counts], params: Any, batches: Batches, mesh: Mesh
) -> SegmentationMetrics:
    """Measures a model on images and their masks, every pixel counted exactly once.

    Masks are those of the images as the model sees them, at the size of its input.

    Args:
        counting: from `make_counting`.
        params: of the model.
        batches: as for `metrics.mean_metrics`, of a source whose labels are masks.
        mesh: the devices.

    Raises:
        UserError: a logit is not finite, or no pixel counts.
    """
    confusion, loss, examples = np.zeros((), np.int64), 0.0, 0
    for sums in one_ahead(counting(params, batch) for batch in to_devices(batches, mesh)):
        found = jax.device_get(sums)
        confusion = confusion + found["confusion"].astype(np.int64)
        loss += float(found["loss"])
        examples += int(found["count"])
    if not np.isfinite(loss):
        raise UserError("the model's logits are not finite: its weights are damaged")
    if not confusion.any():
        raise UserError(
            f"no pixel of the split has a class, all are {IGNORED} in the masks: choose another one"
        )
    return SegmentationMetrics(confusion, loss / examples, examples)


_SHOWN = 12  # images of a picture, in rows of two


def examples(
    model: nn.Module,
    params: Any,
    source: "Source",
    preprocessing: Preprocessing,
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """A few images, evenly spread over a source, with what a model makes of them.

    Args:
        model: from `models.segmentation.segmenter`.
        params: of the model, on the mesh.
        source: whose labels are masks.
        preprocessing: of the model.

    Returns:
        Of each its id, its pixels as the model sees them, uint8 [height, width, 3], its mask and
        the predicted one, uint8 [height, width].
    """
    from vit_jax.data.pipeline import eval_batches

    chosen = np.unique(np.linspace(0, source.num_examples - 1, _SHOWN).astype(int))

    @jax.jit
    def apply(params: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return jnp.argmax(logits, -1)

    found = []
    for index in chosen:
        part = source.select(np.array([index]))
        (batch,) = eval_batches(part, batch_size=1, preprocessing=preprocessing)
        predicted = np.asarray(apply(params, batch["image"]))[0].astype(np.uint8)
        pixels = np.rint(preprocessing.to_picture(batch["image"][0]) * 255).astype(np.uint8)
        found.append((part.ids()[0], pixels, batch["label"][0], predicted))
    return found
