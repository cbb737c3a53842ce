"""The scores of a model that predicts any number of classes of an image, by a sigmoid of each."""

import dataclasses
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import ApplyFn, Batches, finite_outputs
from vit_jax.evaluation.per_class import ClassScores, class_scores
from vit_jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class MultiLabelMetrics:
    """The result of `multilabel_metrics`.

    Attributes:
        logits: float32 [images, classes], in the order of the data.
        labels: bool, likewise.
        losses: float64 [images], sigmoid cross-entropy summed over the classes, in nats.
    """

    logits: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    losses: np.ndarray = dataclasses.field(repr=False)

    @property
    def predicted(self) -> np.ndarray:
        """The classes whose probability is above 0.5, bool [images, classes]."""
        return self.logits > 0

    def average_precision(self) -> np.ndarray:
        """The average precision of each class, see the function of this name."""
        return average_precision(self.logits, self.labels)

    def per_class(self) -> ClassScores:
        """Precision, recall, F1 and images of each class, at a probability of 0.5."""
        return class_scores(*self._counts())

    def scalars(self) -> dict[str, float]:
        """All that is a number.

        "examples", how many images there were; "mAP", the mean average precision of the classes
        that have an image; "f1_macro", the mean F1 of the classes that have one or are predicted;
        "f1_micro", F1 over all labels of all images; "loss", the mean.

        Raises:
            UserError: no image has a label.
        """
        if not self.labels.any():
            raise UserError("no image of the split has a label: choose another split")
        micro = class_scores(*(count.sum(keepdims=True) for count in self._counts()))
        return {
            "examples": len(self.labels),
            "mAP": float(np.nanmean(self.average_precision())),
            "f1_macro": float(np.nanmean(self.per_class().f1)),
            "f1_micro": float(micro.f1[0]),
            "loss": float(self.losses.mean()),
        }

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        both = self.labels & self.predicted
        return both.sum(0), self.predicted.sum(0), self.labels.sum(0)


def average_precision(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The average precision of each class, NaN without an image, float64 [classes].

    The sum over thresholds of precision times the step in recall, not interpolated; images of equal
    logits are taken together.

    Args:
        logits: [images, classes].
        labels: bool, likewise.
    """
    from sklearn.metrics import average_precision_score  # It takes a second to import.

    found = np.full(labels.shape[1], np.nan)
    for index in np.flatnonzero(labels.any(0)):
        found[index] = average_precision_score(labels[:, index], logits[:, index])
    return found


def multilabel_metrics(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh
) -> MultiLabelMetrics:
    """Measures a model on images of several labels, every image counted exactly once.

    Args:
        apply_fn: from `make_apply_fn`; its outputs are logits.
        params: of the model.
        batches: as for `mean_metrics`, of a source that is `multi_label`.
        mesh: the devices.

    Raises:
        UserError: a logit is not finite.
    """
    found = list(finite_outputs(apply_fn, params, batches, mesh))
    logits = np.concatenate([x for x, _ in found])
    labels = np.zeros(logits.shape, bool)  # A head may have more classes than the data set.
    known = np.concatenate([x for _, x in found]) > 0
    labels[:, : known.shape[1]] = known
    losses = np.concatenate([_losses(x, y) for x, y in zip(*_rows(logits, labels), strict=True)])
    return MultiLabelMetrics(logits, labels, losses)


_ROWS = 4096  # of which the losses are in float64 at a time


def _rows(*arrays: np.ndarray) -> list[list[np.ndarray]]:
    return [[x[i : i + _ROWS] for i in range(0, len(x), _ROWS)] for x in arrays]


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return np.logaddexp(0, logits).sum(1) - (logits * labels).sum(1)


def check_loss(name: str, loss: str) -> None:
    """Raises a UserError if logits of a model are for one label an image, and a data set has more.

    Args:
        name: of the data set.
        loss: "softmax" or "sigmoid", for which the logits are trained.
    """
    if loss != "sigmoid":
        raise UserError(
            f"{name} has several labels an image, and the model was trained for one (loss "
            f"{loss!r}): score one that was fine-tuned with --config.loss=sigmoid"
        )
