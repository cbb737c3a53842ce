"""Few-shot linear evaluation: closed-form least squares on frozen features.

Section 4.1 of the paper ("few-shot accuracies are obtained by solving a regularized least-squares
regression problem that maps the (frozen) representation of a subset of training images to
{-1, 1}^K target vectors"). It gives no regularization and no seeds; those, and the procedure in
detail, are of the later reference: features standardized with the mean and standard deviation of
the support set, a constant feature 100 as the bias, lambda = 2^10, three seeds, images resized to
256 x 256 whatever their aspect and cropped to the central 224 x 224.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.data.protocols import Preprocessing, fewshot_view
from vit_jax.errors import UserError
from vit_jax.evaluation.features import collect, moments
from vit_jax.evaluation.metrics import ApplyFn, Batches, make_apply_fn, one_ahead
from vit_jax.evaluation.watched import Watched
from vit_jax.sharding import Mesh, to_devices

if TYPE_CHECKING:  # They import TFDS.
    from vit_jax.data.pipeline import EvalBatches
    from vit_jax.data.source import Source

L2 = 2.0**10
BIAS = 100.0
SEEDS = (0, 1, 2)

_ROWS = 4096  # of the support set that are in float64 at a time


class LeastSquaresHead(NamedTuple):
    """scores = (features - mean) / std @ kernel + bias, of shapes [D], [D], [D, K] and [K]."""

    mean: np.ndarray
    std: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray


def fit(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float = L2
) -> LeastSquaresHead:
    """Solves the regularized least squares in float64.

    The bias is the weight of a constant feature and so is regularized too, as in the reference.

    Args:
        features: [examples, D], of the support set.
        labels: int [examples].
        num_classes: K.
        l2: lambda.
    """
    examples, width = features.shape
    mean, std = moments(features)

    def rows(start: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(start, start + _ROWS)
        x = np.empty((len(features[part]), width + 1))
        x[:, :-1] = (features[part] - mean) / std
        x[:, -1] = BIAS
        y = np.full((len(x), num_classes), -1.0)
        y[np.arange(len(x)), labels[part]] = 1.0
        return x, y

    if examples > width:  # at least as many as features, the constant one among them
        gram = np.zeros((width + 1, width + 1))
        target = np.zeros((width + 1, num_classes))
        for start in range(0, examples, _ROWS):
            x, y = rows(start)
            gram += x.T @ x
            target += x.T @ y
        solution = _solve(gram, target, l2)
    else:
        parts = [rows(start) for start in range(0, examples, _ROWS)]
        x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        # X^T (X X^T + lambda)^-1 Y is the same solution, from the smaller of the two matrices.
        solution = x.T @ _solve(x @ x.T, y, l2)
    return LeastSquaresHead(mean, std, kernel=solution[:-1], bias=BIAS * solution[-1])


def _solve(gram: np.ndarray, target: np.ndarray, l2: float) -> np.ndarray:
    """(gram + lambda)^-1 target."""
    return np.linalg.solve(gram + l2 * np.eye(len(gram)), target)


def parse_shots(text: str) -> tuple[int, ...]:
    """The numbers of images per class in "1,5,10,25", ascending.

    Raises:
        UserError: it is not a list of positive numbers, each given once.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in words) or len({*words}) < len(words):
        raise UserError(
            f"shots {text!r} are not positive numbers, each once: for example 1,5,10,25"
        )
    return tuple(sorted(map(int, words)))


def short_name(dataset: str) -> str:
    """Returns the name of a data set in metrics: "flowers" of "folder:/data/flowers"."""
    if dataset.startswith("folder:"):
        return pathlib.Path(dataset.removeprefix("folder:")).name
    if dataset.startswith("list:"):
        return pathlib.Path(dataset.removeprefix("list:")).stem
    return dataset.partition(":")[0]


def create_fewshot(
    model: nn.Module,
    train: "Source",
    test: "Source",
    *,
    shots: Sequence[int],
    preprocessing: Preprocessing,
    batch_size: int,
    mesh: Mesh,
    report: Callable[[str], None] = print,
) -> Callable[[Any], dict[int, list[float]]]:
    """Returns few-shot accuracy as a function of the model's parameters.

    The representation is what the head is applied to: the class token after the last LayerNorm
    and, where the pre-training head has a hidden layer, the output of that (`pre_logits`). Only
    the features of one support set are held in memory, never those of the test images.

    Args:
        model: whose head, if it has one, is left out.
        train: where the support sets are taken from, see `data.support.take_support`.
        test: the images to recognize.
        shots: numbers of images per class.
        preprocessing: of the model; what is looked at is `protocols.fewshot_view`, whatever its own
            crop.
        batch_size: of all devices together.
        mesh: the devices.
        report: receives a line if a class has fewer images than shots.

    Returns:
        A function from params to the accuracies in [0, 1] of `SEEDS`, by number of shots.

    Raises:
        UserError: images have several labels.
    """
    from vit_jax.data.pipeline import eval_batches
    from vit_jax.data.support import take_support

    if train.multi_label or test.multi_label:
        raise UserError(
            f"{train.name} has several labels an image, and few-shot evaluation learns from "
            "images of one class each: leave it out"
        )
    apply_fn = make_apply_fn(model.without_head(), mesh)
    num_classes = len(train.class_names)

    def batches(source: "Source") -> "EvalBatches":
        return eval_batches(
            source,
            batch_size=batch_size,
            preprocessing=fewshot_view(preprocessing),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def accuracies_by_shots(params: Any) -> dict[int, list[float]]:
        heads = []
        for seed in SEEDS:
            support = take_support(train, max(shots), seed)
            features, labels = collect(
                apply_fn, params, batches(support), mesh, support.num_examples
            )
            if seed == SEEDS[0]:
                _report_small_classes(np.bincount(labels, minlength=num_classes), shots, report)
            order = _place_in_class(labels)
            heads += [fit(features[order < k], labels[order < k], num_classes) for k in shots]
        accuracies = _accuracies(apply_fn, params, batches(test), mesh, heads)
        return {k: accuracies[i :: len(shots)] for i, k in enumerate(shots)}

    return accuracies_by_shots


def _report_small_classes(
    images: np.ndarray, shots: Sequence[int], report: Callable[[str], None]
) -> None:
    if images.min() < max(shots):
        small = int((images < max(shots)).sum())
        report(
            f"few-shot: {small} of {len(images)} classes have fewer than {max(shots)} images to "
            f"learn from (the least has {images.min()}): they give all that they have"
        )


def _place_in_class(labels: np.ndarray) -> np.ndarray:
    """Counts, for each example, those of its class that come before it."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    places = np.empty(len(labels), int)
    places[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return places


@jax.jit
def _count_correct(
    features: jax.Array, labels: jax.Array, mask: jax.Array, heads: LeastSquaresHead
) -> tuple[jax.Array, jax.Array]:
    def correct(head: LeastSquaresHead) -> jax.Array:
        x = (features - head.mean) / head.std
        scores = jnp.matmul(x, head.kernel, precision=jax.lax.Precision.HIGHEST) + head.bias
        return jnp.sum((jnp.argmax(scores, -1) == labels) & (mask > 0), dtype=jnp.int32)

    return jax.lax.map(correct, heads), jnp.sum(mask > 0, dtype=jnp.int32)


def _accuracies(
    apply_fn: ApplyFn, params: Any, batches: Batches, mesh: Mesh, heads: Sequence[LeastSquaresHead]
) -> list[float]:
    stacked = LeastSquaresHead(
        *(np.stack(arrays).astype(np.float32) for arrays in zip(*heads, strict=True))
    )
    stacked = jax.device_put(stacked, NamedSharding(mesh, PartitionSpec()))
    correct, count = np.zeros(len(heads), np.int64), 0
    started = (_count_correct(*apply_fn(params, x), stacked) for x in to_devices(batches, mesh))
    for hits, images in one_ahead(started):
        correct += np.asarray(hits)
        count += int(images)
    return (correct / count).tolist()


def describe(title: str, scalars: Mapping[str, float]) -> str:
    """Returns the line to print: "few-shot accuracy on flowers: 1-shot 0.5621  5-shot 0.8033"."""
    listed = "  ".join(f"{k.removesuffix('shot')}-shot {mean:.4f}" for k, mean in scalars.items())
    return f"few-shot accuracy on {title}: {listed}"


def create(settings: Mapping[str, Any], watched: Watched) -> Callable[[Any], dict[str, float]]:
    """Makes the evaluator of `config.evals`: the mean accuracy over the seeds, "1shot" and so on.

    Args:
        settings: "dataset", "data_dir", "split", of the images to recognize, and "shots".
        watched: the run.
    """
    from vit_jax.data import datasets, pipeline

    train, test = datasets.open_dataset(
        settings["dataset"],
        data_dir=settings["data_dir"],
        eval_split=settings["split"],
        files=watched.files_of(settings["dataset"]),
    )
    for source in (train, test):
        pipeline.check_channels(source, watched.preprocessing.channels)
    watched.tell(train)
    accuracies = create_fewshot(
        watched.trunk,
        train,
        test,
        shots=parse_shots(settings["shots"]),
        preprocessing=watched.preprocessing,
        batch_size=watched.batch_size,
        mesh=watched.mesh,
        report=watched.report,
    )

    def fewshot(params: Any) -> dict[str, float]:
        return {f"{k}shot": float(np.mean(values)) for k, values in accuracies(params).items()}

    return fewshot
