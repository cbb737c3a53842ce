"""Evaluation: functions over parameters and batches, and `python -m vit_jax.evaluate`."""

import argparse
import collections
import csv
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import absl.logging
import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.config import parse_shots
from vit_jax.data import classes, imagenet
from vit_jax.errors import UserError
from vit_jax.files import atomic_write, write_json
from vit_jax.sharding import Mesh, make_mesh, state_sharding, to_devices

TOP_K = 5
CALIBRATION_BINS = 15

ApplyFn = Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]]
Batches = Iterable[dict[str, np.ndarray]]


def evaluate(
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
    for batch in to_devices(batches, mesh):
        sums = jax.device_get(eval_step(params, batch))
        totals.update({name: x.item() for name, x in sums.items()})
    count = totals["count"]
    accuracy = {"accuracy": totals["correct"] / count} if "correct" in totals else {}
    return {**accuracy, "loss": totals["loss"] / count, "examples": count}


def make_apply_fn(model: nn.Module, mesh: Mesh) -> ApplyFn:
    """Returns a jitted (params, batch) -> (outputs, labels, mask), whole on every process."""

    def apply(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        return model.apply({"params": params}, batch["image"]), batch["label"], batch["mask"]

    return jax.jit(apply, out_shardings=NamedSharding(mesh, PartitionSpec()))


def outputs(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what the model makes of the images of each batch, without the padding.

    Args:
        apply_fn: from `make_apply_fn`.
        params: of the model.
        batches: as for `evaluate`.
        mesh: the devices.

    Yields:
        Outputs (float32 [images, features]) and labels, on the host, in the order of the data.

    Raises:
        UserError: an image has no label.
    """
    for batch in to_devices(batches, mesh):
        values, labels, mask = jax.device_get(apply_fn(params, batch))
        real = mask > 0
        if (labels[real] < 0).any():
            raise UserError("the split has images without a label (-1): choose another one")
        yield values[real], labels[real]


@dataclasses.dataclass(frozen=True)
class ClassificationMetrics:
    """What `measure` finds.

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
    """

    accuracy: float
    top5_accuracy: float
    loss: float
    calibration_error: float
    num_classes: int
    labels: np.ndarray = dataclasses.field(repr=False)
    predicted: np.ndarray = dataclasses.field(repr=False)

    def confusion(self) -> np.ndarray:
        """Images by [true class, predicted class], int64 [classes, classes]."""
        matrix = np.zeros((self.num_classes,) * 2, np.int64)
        np.add.at(matrix, (self.labels, self.predicted), 1)
        return matrix

    def per_class(self) -> tuple[np.ndarray, np.ndarray]:
        """The accuracy of each class, NaN without an image, and its images, both [classes]."""
        images = np.bincount(self.labels, minlength=self.num_classes)
        hits = np.bincount(self.labels[self.labels == self.predicted], minlength=self.num_classes)
        return np.where(images, hits / np.maximum(images, 1), np.nan), images


def measure(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh, loss: str = "softmax"
) -> ClassificationMetrics:
    """Measures a classifier in full, every image counted exactly once; sums are in float64.

    Args:
        apply_fn: from `make_apply_fn`; its outputs are logits.
        params: of the model.
        batches: as for `evaluate`.
        mesh: the devices.
        loss: "softmax" or "sigmoid", for which the logits were trained.

    Raises:
        UserError: a logit is not finite, or an image has no label.
    """
    bins = np.zeros((CALIBRATION_BINS, 2))
    loss_sum, top_k = 0.0, 0
    all_labels, all_predicted = [], []
    for logits, labels in _finite(outputs(apply_fn, params, batches, mesh)):
        predicted = logits.argmax(1)
        losses, confidence = _LOSSES[loss](logits.astype(np.float64), labels)
        loss_sum += losses.sum()
        top_k += (_rank(logits, labels) < TOP_K).sum()
        members = np.maximum(np.ceil(confidence * CALIBRATION_BINS), 1).astype(int) - 1
        np.add.at(bins, members, np.stack([predicted == labels, confidence], 1))
        all_labels.append(labels)
        all_predicted.append(predicted.astype(np.int32))
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
    )


def _finite(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for logits, labels in batches:
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
    """How many classes come before the labeled one; of equal logits the first does."""
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
    """Whether each of the highest logits is of a right class [images, TOP_K]; who has labels."""
    hits, labeled = [], []
    for logits, labels in _finite(outputs(apply_fn, params, batches, mesh)):
        highest = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
        hits.append(np.take_along_axis(labels, highest, 1) > 0)
        labeled.append(labels.any(1))
    return np.concatenate(hits), np.concatenate(labeled)


def match_classes(
    num_classes: int, class_names: Sequence[str] | None, data_names: Sequence[str]
) -> tuple[int, ...]:
    """The class of a model that each class of a data set is, see `classes.match`.

    Args:
        num_classes: of the model.
        class_names: of the model, or None if they are not known.
        data_names: the class names of the data set.

    Raises:
        UserError: it cannot be told, with the way out.
    """
    labels = classes.match(num_classes, class_names, data_names)
    if labels is not None:
        return labels
    difference = classes.difference(num_classes, class_names, data_names)
    if num_classes != len(data_names):
        if classes.are_numbers(data_names) and {*data_names} < {*(class_names or ())}:
            difference += ", whose names are numbers and may count others"
        raise UserError(f"{difference}: fine-tune it first; only --fewshot needs no head")
    if not classes.positions_may_agree(class_names, data_names):
        raise UserError(
            f"{difference}, and their positions do not agree: give the classes of the data set the "
            "names that they have in the checkpoint"
        )
    numbers = any(map(classes.are_numbers, (class_names, data_names)))
    condition = (
        "the numbers count the same classes in the same order" if numbers else ("all mean the same")
    )
    raise UserError(f"{difference}: if {condition}, add --ignore_class_names")


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(prog=prog, description="Evaluates a model on a data set.")
    flags.add_flags(parser)
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="D",
        help="a TFDS name, folder:PATH, digits, imagenet2012_real, or objectnet:PATH",
    )
    parser.add_argument("--split", default="", help="in TFDS syntax [validation or test]")
    parser.add_argument("--data_dir", default="", help="where TFDS looks [its default]")
    parser.add_argument(
        "--batch_size", type=command.positive, default=128, metavar="N", help="at a time [128]"
    )
    parser.add_argument("--per_class", action="store_true", help="also the accuracy of each class")
    parser.add_argument(
        "--confusion", metavar="FILE", help="images by [true, predicted] class, as .npz or .csv"
    )
    parser.add_argument(
        "--fewshot", metavar="SHOTS", help="images per class to learn from, such as 1,5,10,25"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--ignore_class_names",
        action="store_true",
        help="class i of the model is class i of the data set, whatever the two are called",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: an argument is unknown, missing or impossible.
    """
    args = build_parser("python -m vit_jax.evaluate").parse_args(argv)
    args.fewshot = parse_shots(args.fewshot) if args.fewshot is not None else ()
    if args.confusion and not args.confusion.endswith((".npz", ".csv")):
        raise UserError(f"--confusion {args.confusion} is neither .npz nor .csv")
    for path in filter(None, (args.confusion, args.json)):
        if os.path.isdir(path) or not pathlib.Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} is not a file in a directory that exists")
    return args


class _Checkpoint:
    """A pretrained model on all devices."""

    def __init__(self, args: argparse.Namespace):
        from vit_jax.models import create_model

        self.pretrained = flags.load(args)
        self.mesh = make_mesh()
        self.model = create_model(self.pretrained.model)
        self.apply_fn = make_apply_fn(self.model, self.mesh)
        params = self.pretrained.params
        self.params = jax.device_put(params, state_sharding(params, self.mesh, "replicated"))
        self.batch_size = -(-args.batch_size // self.mesh.size) * self.mesh.size

    def label(self, source: Any, args: argparse.Namespace) -> tuple[Any, tuple[int, ...]]:
        """A source with labels of the head, and the head's class of each of the source's."""
        from vit_jax.data.datasets import relabel

        num_classes, names = self.pretrained.model["num_classes"], self.pretrained.class_names
        if args.ignore_class_names:
            names = None
        labels = match_classes(num_classes, names, source.class_names)
        self.pretrained.check_head()
        if labels == tuple(range(num_classes)):
            return source, labels
        print(f"classes are matched by name: {len(labels)} of the checkpoint's {num_classes}")
        return relabel(source, labels, names), labels

    def run(self, function: Callable, source: Any, **options: Any) -> Any:
        """Calls `measure` or another function of its kind on a source."""
        from vit_jax.data.pipeline import eval_batches

        batches = eval_batches(
            source, batch_size=self.batch_size, preprocessing=self.pretrained.preprocessing
        )
        return function(self.apply_fn, self.params, batches, self.mesh, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_arguments(argv)
    _silence()
    from vit_jax.data import datasets

    result: dict[str, Any] = {"checkpoint": args.checkpoint, "dataset": args.dataset}
    if args.dataset == datasets.REAL:
        if args.fewshot or args.per_class or args.confusion:
            raise UserError(
                f"{datasets.REAL} has several labels an image: --fewshot, --per_class and "
                "--confusion need --dataset imagenet2012"
            )
        source = datasets.open_real(data_dir=args.data_dir, split=args.split or "validation")
        result |= {"split": source.split} | _evaluate_real(_Checkpoint(args), source, args)
    elif args.dataset.startswith("objectnet:"):
        result |= _evaluate_objectnet(args)
    else:
        source = datasets.open_evaluation(args.dataset, data_dir=args.data_dir, split=args.split)
        checkpoint = _Checkpoint(args)
        result |= {"split": source.split} | _evaluate_classes(checkpoint, source, args)
        if args.fewshot:
            result["fewshot"] = _evaluate_fewshot(checkpoint, source, args)
    if args.json:
        write_json(pathlib.Path(args.json), result)
    return 0


def _silence() -> None:
    """Before TensorFlow is imported: it greets, and libraries log what they raise as well."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    absl.logging.set_verbosity(absl.logging.FATAL)


def _evaluate_classes(
    checkpoint: _Checkpoint, source: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from vit_jax.data import datasets

    try:
        labeled, labels = checkpoint.label(source, args)
    except UserError as error:
        if not args.fewshot:
            raise
        print(f"the head is left out: {error}")
        return {}
    found = checkpoint.run(measure, labeled, loss=checkpoint.pretrained.loss)
    result = {
        "examples": len(found.labels),
        "accuracy": found.accuracy,
        "top5_accuracy": found.top5_accuracy,
        "loss": found.loss,
        "calibration_error": found.calibration_error,
    }
    _print_rows(result)
    if re.split("[:/]", args.dataset)[0] == "imagenet2012" and source.split == "validation":
        try:
            real = datasets.open_real(data_dir=args.data_dir)
        except UserError as error:
            print(f"ImageNet-ReaL is left out: {error}")
        else:
            result |= _evaluate_real(checkpoint, real, args)
    if args.per_class:
        per_class = (values[list(labels)] for values in found.per_class())
        rows = zip(source.class_names, *per_class, strict=True)
        result["per_class"] = [
            {"name": name, "accuracy": float(share) if images else None, "examples": int(images)}
            for name, share, images in rows
        ]
        _print_per_class(result["per_class"])
    if args.confusion:
        _write_confusion(args.confusion, found.confusion(), labeled.class_names)
    return result


def _evaluate_real(
    checkpoint: _Checkpoint, source: Any, args: argparse.Namespace
) -> dict[str, Any]:
    labeled, _ = checkpoint.label(source, args)
    accuracy, examples = checkpoint.run(real_accuracy, labeled)
    result = {"real_accuracy": accuracy, "real_examples": examples}
    _print_rows(result)
    return result


def _evaluate_objectnet(args: argparse.Namespace) -> dict[str, Any]:
    from vit_jax.data import objectnet

    if args.fewshot or args.per_class or args.confusion or args.split:
        raise UserError(
            "objectnet has several labels an image and is a test set alone: leave --fewshot, "
            "--per_class, --confusion and --split out"
        )
    source, found, passed_over = objectnet.open_objectnet(args.dataset)
    checkpoint = _Checkpoint(args)
    num_classes = checkpoint.pretrained.model["num_classes"]
    if num_classes != len(source.class_names):
        raise UserError(
            f"the checkpoint has {num_classes} classes and ObjectNet is scored by ImageNet's "
            f"{len(source.class_names)}: give a checkpoint that was fine-tuned on imagenet2012"
        )
    labeled, _ = checkpoint.label(source, args)
    expected = len(objectnet.classes())
    print(f"{found} of the {expected} classes of ObjectNet that ImageNet has, too")
    print(f"{passed_over} directories of other classes are passed over", flush=True)
    result = checkpoint.run(multilabel_accuracy, labeled)
    _print_rows(result)
    return {"split": source.split, "classes": found, "passed_over": passed_over} | result


def _evaluate_fewshot(
    checkpoint: _Checkpoint, test: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from vit_jax import fewshot
    from vit_jax.data import datasets

    train, _ = datasets.open_dataset(args.dataset, data_dir=args.data_dir, eval_split=test.split)
    evaluator = fewshot.create_fewshot(
        checkpoint.model,
        train,
        test,
        shots=args.fewshot,
        preprocessing=checkpoint.pretrained.preprocessing,
        batch_size=checkpoint.batch_size,
        mesh=checkpoint.mesh,
    )
    result = {}
    for number, accuracies in evaluator(checkpoint.params).items():
        result[str(number)] = {"accuracy": float(np.mean(accuracies)), "seeds": accuracies}
        seeds = ", ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        print(f"{f'{number}-shot accuracy':20}{np.mean(accuracies):10.4f}   of seeds {seeds}")
    return result


def _print_rows(result: dict[str, Any]) -> None:
    for name, value in result.items():
        text = f"{value:.4f}" if isinstance(value, float) else f"{value}"
        print(f"{name.replace('_', ' '):20}{text:>10}", flush=True)


def _print_per_class(rows: Sequence[dict[str, Any]]) -> None:
    names = [imagenet.readable(row["name"])[:40] for row in rows]
    width = max(map(len, names))
    for name, row in zip(names, rows, strict=True):
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        print(f"{name:{width}}  {accuracy:>6}  of {row['examples']}")


def _write_confusion(path: str, matrix: np.ndarray, class_names: Sequence[str]) -> None:
    with atomic_write(pathlib.Path(path)) as temporary:
        if path.endswith(".npz"):
            with temporary.open("wb") as file:
                np.savez_compressed(file, confusion=matrix, class_names=np.array(class_names))
            return
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *class_names])
            rows = zip(class_names, matrix.tolist(), strict=True)
            writer.writerows([name, *row] for name, row in rows)


if __name__ == "__main__":
    command.run(main)
