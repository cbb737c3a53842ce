"""The scores of a model: functions over parameters and batches of one data set."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.evaluation.per_class import ClassScores, class_scores
from vit_jax.sharding import Mesh, gathering, to_devices
from vit_jax.xla_flags import compiler_options

T = TypeVar("T")

TOP_K = 5
CALIBRATION_BINS = 15

ApplyFn = Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]]
Batches = Iterable[dict[str, np.ndarray]]


def one_ahead(started: Iterable[T]) -> Iterator[T]:
    """Yields what devices compute when the next has been started: they need not wait for the host.

    Args:
        started: each begins a computation as it is taken, which returns before it is done.
    """
    present = None
    for following in started:
        if present is not None:
            yield present
        present = following
    if present is not None:
        yield present


def mean_metrics(
    eval_step: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Batches,
    mesh: Mesh,
) -> dict[str, float]:
    """Accuracy and mean loss over a data set, every image counted exactly once.

    Args:
        eval_step: jitted `vit_jax.steps.eval_step` with its objective.
        params: of the model.
        batches: padded batches with their mask, from `vit_jax.data.pipeline.eval_batches`.
        mesh: the devices.

    Returns:
        "accuracy" in [0, 1], unless the objective has none, "loss", and "examples", the number of
        images.
    """
    totals = collections.Counter()
    for sums in one_ahead(eval_step(params, batch) for batch in to_devices(batches, mesh)):
        totals.update({name: x.item() for name, x in jax.device_get(sums).items()})
    count = totals["count"]
    accuracy = {"accuracy": totals["correct"] / count} if "correct" in totals else {}
    return {**accuracy, "loss": totals["loss"] / count, "examples": count}


def make_apply_fn(model: nn.Module, mesh: Mesh) -> ApplyFn:
    """Returns a jitted (params, batch) -> (outputs, labels, mask), whole on every process."""

    def apply(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        values = cast(jax.Array, model.apply({"params": params}, batch["image"]))
        return values, batch["label"], batch["mask"]

    return jax.jit(
        gathering(apply, mesh),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def outputs(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what the model makes of the images of each batch, without the padding.

    Args:
        apply_fn: from `make_apply_fn`.
        params: of the model.
        batches: as for `mean_metrics`.
        mesh: the devices.

    Yields:
        Outputs (float32 [images, features]) and labels, on the host, in the order of the data.

    Raises:
        UserError: an image has no label.
    """
    for found in one_ahead(apply_fn(params, batch) for batch in to_devices(batches, mesh)):
        values, labels, mask = jax.device_get(found)
        real = mask > 0
        if (labels[real] < 0).any():
            raise UserError("the split has images without a label (-1): choose another one")
        yield values[real], labels[real]


@dataclasses.dataclass(frozen=True)
class ClassificationMetrics:
    """The result of `classification_metrics`.

    Attributes:
        accuracy: top-1, in [0, 1]. Of equal logits the first counts.
        top5_accuracy: likewise; 1 where there are at most five classes.
        loss: mean cross-entropy, in nats; with a sigmoid summed over the classes.
        calibration_error: expected calibration error in [0, 1] (Guo et al., 2017, Eq. 3): over 15
            bins of equal width ((m - 1) / 15, m / 15] of the highest probability, the mean,
            weighted by images, of |accuracy - mean probability|.
        num_classes: of the model.
        labels: int32 [images], in the order of the data.
        predicted: likewise.
        losses: float64 [images], of each.
        confidences: likewise, the probability of what an image is taken for.
    """

    accuracy: float
    top5_accuracy: float
    loss: float
    calibration_error: float
    num_classes: int
    labels: np.ndarray = dataclasses.field(repr=False)
    predicted: np.ndarray = dataclasses.field(repr=False)
    losses: np.ndarray = dataclasses.field(repr=False)
    confidences: np.ndarray = dataclasses.field(repr=False)

    def confusion(self) -> np.ndarray:
        """Images by [true class, predicted class], int64 [classes, classes]."""
        matrix = np.zeros((self.num_classes,) * 2, np.int64)
        np.add.at(matrix, (self.labels, self.predicted), 1)
        return matrix

    def scalars(self) -> dict[str, float]:
        """All that is a number, with "examples", how many images there were."""
        return {
            "examples": len(self.labels),
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
        }

    def per_class(self) -> ClassScores:
        """Precision, recall (the accuracy on its images), F1 and images of each class."""
        right = self.labels[self.labels == self.predicted]
        counted = (right, self.predicted, self.labels)
        return class_scores(*(np.bincount(x, minlength=self.num_classes) for x in counted))


def classification_metrics(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh, loss: str = "softmax"
) -> ClassificationMetrics:
    """Measures a classifier in full, every image counted exactly once; sums are in float64.

    Args:
        apply_fn: from `make_apply_fn`; its outputs are logits.
        params: of the model.
        batches: as for `mean_metrics`.
        mesh: the devices.
        loss: "softmax" or "sigmoid", for which the logits were trained.

    Raises:
        UserError: a logit is not finite, or an image has no label.
    """
    bins = np.zeros((CALIBRATION_BINS, 2))
    loss_sum, top_k = 0.0, 0
    all_labels, all_predicted, all_losses, all_confidences = [], [], [], []
    for logits, labels in finite_outputs(apply_fn, params, batches, mesh):
        predicted = logits.argmax(1)
        losses, confidence = _LOSSES[loss](logits.astype(np.float64), labels)
        loss_sum += losses.sum()
        top_k += (_rank(logits, labels) < TOP_K).sum()
        members = np.maximum(np.ceil(confidence * CALIBRATION_BINS), 1).astype(int) - 1
        np.add.at(bins, members, np.stack([predicted == labels, confidence], 1))
        all_labels.append(labels)
        all_predicted.append(predicted.astype(np.int32))
        all_losses.append(losses)
        all_confidences.append(confidence)
    labels, predicted = np.concatenate(all_labels), np.concatenate(all_predicted)
    return ClassificationMetrics(
        accuracy=float(np.mean(labels == predicted)),
        top5_accuracy=float(top_k / len(labels)),
        loss=float(loss_sum / len(labels)),
        # Weighted by the images of a bin, the difference of means is that of sums.
        calibration_error=float(np.abs(bins[:, 0] - bins[:, 1]).sum() / len(labels)),
        num_classes=logits.shape[1],
        labels=labels,
        predicted=predicted,
        losses=np.concatenate(all_losses),
        confidences=np.concatenate(all_confidences),
    )


def finite_outputs(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields as `outputs`.

    Raises:
        UserError: as `outputs`, and if a logit is not finite.
    """
    for logits, labels in outputs(apply_fn, params, batches, mesh):
        if not np.isfinite(logits).all():
            raise UserError("the model's logits are not finite: its weights are damaged")
        yield logits, labels


def _softmax(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each image, and the probability of what it is taken for."""
    shifted = logits - logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(1))
    return log_sum - shifted[np.arange(len(labels)), labels], np.exp(-log_sum)


def _sigmoid(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    losses = np.logaddexp(0, logits).sum(1) - logits[np.arange(len(labels)), labels]
    return losses, np.exp(-np.logaddexp(0, -logits.max(1)))


_LOSSES = {"softmax": _softmax, "sigmoid": _sigmoid}


def _rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts the classes that come before the labeled one; of equal logits the first does."""
    own = np.take_along_axis(logits, labels[:, None], 1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1)


def multilabel_accuracy(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh
) -> dict[str, Any]:
    """Accuracy where several classes are right for an image; of equal logits the first counts.

    Args:
        apply_fn: from `make_apply_fn`; its outputs are logits.
        params: of the model.
        batches: of `vit_jax.data.objectnet.open_objectnet`, whose labels are [images, classes].
        mesh: the devices.

    Returns:
        "examples", "accuracy", the share of images whose highest logit is of a right class, and
        "top5_accuracy", one of whose five highest logits is.

    Raises:
        UserError: a logit is not finite.
    """
    hits, _ = _hits(apply_fn, params, batches, mesh)
    return {
        "examples": len(hits),
        "accuracy": float(hits[:, 0].mean()),
        "top5_accuracy": float(hits.any(1).mean()),
    }


def real_accuracy(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh
) -> tuple[float, int]:
    """ImageNet-ReaL (Beyer et al., 2020): the prediction must be among an image's labels.

    Args:
        apply_fn: from `make_apply_fn`; its outputs are logits.
        params: of the model.
        batches: of `vit_jax.data.datasets.open_real`, whose labels are [images, classes].
        mesh: the devices.

    Returns:
        The accuracy over the images with at least one label, and their number. An image without
        labels does not count.

    Raises:
        UserError: a logit is not finite, or no image has a label.
    """
    hits, labeled = _hits(apply_fn, params, batches, mesh)
    if not labeled.any():
        raise UserError("no image of the split has a label of ReaL: choose another split")
    return float(hits[labeled, 0].mean()), int(labeled.sum())


def _hits(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Tells which top logits are of a right class [images, TOP_K], and which images have labels."""
    hits, labeled = [], []
    for logits, labels in finite_outputs(apply_fn, params, batches, mesh):
        highest = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
        hits.append(np.take_along_axis(labels, highest, 1) > 0)
        labeled.append(labels.any(1))
    return np.concatenate(hits), np.concatenate(labeled)
