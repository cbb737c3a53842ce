"""A training step and an evaluation step, as pure functions of (state, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.distillation import Distillation
from vit_jax.errors import UserError
from vit_jax.models import detection_loss, masked
from vit_jax.models.base import Grid
from vit_jax.models.detection import Cells, DetectionTransformer
from vit_jax.models.segmentation import SegmentationTransformer, pixel_scores
from vit_jax.multipliers import freeze
from vit_jax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """The training objective of a model, for each image."""

    def __call__(
        self, params: Any, batch: Batch, *, train: bool, rng: jax.Array | None = None
    ) -> Metrics:
        """Scores the images of a batch.

        Args:
            params: of the model.
            batch: as in `train_step`.
            train: whether dropout and the like are on.
            rng: a key to draw from in training; evaluation is not random and needs none.

        Returns:
            "loss" and, where there is something to get right, "correct": whether it was, or the
            share that was; both [batch]. Of several labels an image there is none: what a model
            makes of these is told by a data set as a whole, see `evaluation.multilabel`.

        Raises:
            ValueError: training has no rng.
        """
        ...


def softmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy, [batch, classes] to [batch]."""
    return optax.softmax_cross_entropy(logits, targets)


def sigmoid_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy summed over the classes, [batch, classes] to [batch]."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def weighted_sigmoid_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy in which what a target has of a class counts that class' weight times.

    PyTorch's `binary_cross_entropy_with_logits` with `pos_weight`, summed over the classes: to the
    loss of each class comes (weight - 1) times that of its target's positive part.

    Args:
        logits: [batch, classes].
        targets: likewise.
        weights: [classes].

    Returns:
        [batch].
    """
    positive = targets * -jax.nn.log_sigmoid(logits)
    return sigmoid_loss(logits, targets) + (positive * (weights - 1)).sum(axis=-1)


def class_shares(labels: jax.Array, num_classes: int) -> jax.Array:
    """The share of each class, [batch, num_classes] float32, of labels in either form.

    Args:
        labels: [batch] int32, or [batch, classes], of at most `num_classes` classes: others are 0.
        num_classes: of the model.
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    missing = num_classes - labels.shape[-1]
    return jnp.pad(labels, ((0, 0), (0, missing))) if missing else labels


def classification_loss(
    logits: jax.Array, labels: jax.Array, loss: str, label_smoothing: float = 0.0
) -> jax.Array:
    """The loss of each image.

    Args:
        logits: [batch, classes].
        labels: [batch] int32, or the share of each class, [batch, classes] float32.
        loss: "softmax" or "sigmoid".
        label_smoothing: share of each target that is spread evenly over all classes.

    Returns:
        [batch] float32.
    """
    if loss not in LOSSES:
        raise UserError(f"loss {loss!r} is unknown: use {' or '.join(LOSSES)}")
    shares = class_shares(labels, logits.shape[-1])
    return LOSSES[loss](logits, optax.smooth_labels(shares, label_smoothing))


def weighted_loss(
    logits: jax.Array,
    batch: Batch,
    loss: str,
    label_smoothing: float,
    weights: jax.Array,
) -> jax.Array:
    """The loss of each image, by the weights of its classes.

    Where an image has one label, its loss is multiplied by the weight of its class, as by Keras's
    `class_weight`; a mixed image's by the mean of its classes' weights. Where it has several, see
    `weighted_sigmoid_loss`.

    Args:
        logits: [batch, classes].
        batch: as in `train_step`, perhaps mixed.
        loss: "softmax" or, where an image has several labels, "sigmoid".
        label_smoothing: as in `classification_loss`.
        weights: [classes], see `data.class_weights`.

    Returns:
        [batch] float32.
    """
    shares = class_shares(batch.get("targets", batch["label"]), logits.shape[-1])
    if batch["label"].ndim > 1:
        return weighted_sigmoid_loss(logits, optax.smooth_labels(shares, label_smoothing), weights)
    return classification_loss(logits, shares, loss, label_smoothing) * (shares * weights).sum(-1)


def pixels_to_inputs(images: jax.Array) -> jax.Array:
    """Maps uint8 pixels to [-1, 1] in float32; floats are what models take and stay as they are.

    On the device, so that a quarter of the bytes is sent there.
    """
    if images.dtype != jnp.uint8:
        return images
    return images.astype(jnp.float32) / 127.5 - 1.0


def classification(
    model: nn.Module,
    loss: str,
    label_smoothing: float = 0.0,
    *,
    distillation: Distillation | None = None,
    class_weights: np.ndarray | None = None,
) -> Objective:
    """The objective of predicting labels; in evaluation they are neither smoothed nor weighted.

    Args:
        model: maps images to logits.
        loss: "softmax" or "sigmoid".
        label_smoothing: see `classification_loss`.
        distillation: of a teacher, whose logits are "teacher" [batch, classes] of a batch that is
            trained on. None, and evaluation, knows none.
        class_weights: float32 [classes], see `weighted_loss`; None where all count alike.
    """

    def objective(
        params: Any, batch: Batch, *, train: bool, rng: jax.Array | None = None
    ) -> Metrics:
        rngs = {"dropout": _training_rng(rng)} if train else {}
        images = pixels_to_inputs(batch["image"])
        teaching = distillation if train else None
        heads = _one_head if teaching is None else _heads
        logits, taught = heads(model, params, images, train=train, rngs=rngs)
        smoothing = label_smoothing if train else 0.0
        targets = batch.get("targets", batch["label"])  # Those of mixed images.
        if train and class_weights is not None:
            weights = jnp.asarray(class_weights)
            losses = weighted_loss(logits, batch, loss, smoothing, weights)
        else:
            losses = classification_loss(logits, targets, loss, smoothing)
        if teaching is not None:
            losses = teaching.loss(losses, taught, batch["teacher"])
        if batch["label"].ndim > 1:
            return {"loss": losses}
        return {"loss": losses, "correct": jnp.argmax(logits, -1) == batch["label"]}

    return objective


def _one_head(model: nn.Module, *inputs: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    logits = _apply(model, *inputs, **options)
    return logits, logits


def _heads(model: nn.Module, *inputs: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The logits that learn from labels and those that learn from a teacher."""
    if not getattr(model.config, "distillation_token", False):  # As only a ViT may have it.
        return _one_head(model, *inputs, **options)
    return cast(tuple[jax.Array, jax.Array], _apply(model, *inputs, method="heads", **options))


def masked_patches(model: masked.MaskedVisionTransformer, rate: float, target: str) -> Objective:
    """The objective of predicting corrupted patches (Appendix B.1.2); labels are not read.

    In evaluation the corruption is a pure function of an image's row in the batch, so that one
    evaluation compares with another.

    Args:
        model: from `masked.predictor`.
        rate: share of the patches that is corrupted.
        target: one of `masked.TARGETS`.
    """

    def objective(
        params: Any, batch: Batch, *, train: bool, rng: jax.Array | None = None
    ) -> Metrics:
        key = _training_rng(rng) if train else jax.random.key(0)
        corruption_rng, dropout_rng = jax.random.split(key)
        images = pixels_to_inputs(batch["image"])
        targets = masked.TARGETS[target](images, model.downsampling)
        corruption = masked.draw_corruption(corruption_rng, *targets.shape[:2], rate)
        predictions = _apply(
            model,
            params,
            images,
            corruption,
            train=train,
            rngs={"dropout": dropout_rng} if train else {},
        )
        chosen = corruption.chosen[..., None]
        return masked.scores(predictions, jnp.take_along_axis(targets, chosen, axis=1))

    return objective


def segmentation(model: SegmentationTransformer) -> Objective:
    """The objective of predicting the class of every pixel, "label" [batch, height, width] uint8.

    Args:
        model: from `models.segmentation.segmenter`.
    """

    def objective(
        params: Any, batch: Batch, *, train: bool, rng: jax.Array | None = None
    ) -> Metrics:
        rngs = {"dropout": _training_rng(rng)} if train else {}
        images = pixels_to_inputs(batch["image"])
        logits = _apply(model, params, images, train=train, rngs=rngs)
        return pixel_scores(logits, batch["label"])

    return objective


def detection(model: DetectionTransformer) -> Objective:
    """The objective of finding objects, "label" [batch, objects, 5], see `detection_loss.assign`.

    The losses are divided by the number of cells with an object in the whole batch: that is
    "weight" of a batch from `weigh_objects`, without which the batch counts as whole.

    Args:
        model: from `models.detection.detector`.
    """

    def objective(
        params: Any, batch: Batch, *, train: bool, rng: jax.Array | None = None
    ) -> Metrics:
        rngs = {"dropout": _training_rng(rng)} if train else {}
        images = pixels_to_inputs(batch["image"])
        cells = cast(Cells, _apply(model, params, images, train=train, rngs=rngs))
        _, rows, columns = cells.centerness.shape
        targets = _assign(batch, (rows, columns))
        losses = detection_loss.cell_losses(cells, targets)
        weight = batch.get("weight", detection_loss.image_weight(targets))
        return {"loss": sum(losses.values()) * weight}

    return objective


def weigh_objects(batch: Batch, grid: Grid) -> Batch:
    """A batch of `detection` with the "weight" of each image, before it is split.

    Args:
        batch: with "image" and "label".
        grid: the rows and columns of the model's cells.
    """
    weight = detection_loss.image_weight(_assign(batch, grid))
    return {**batch, "weight": jnp.full(len(batch["label"]), weight)}


def _assign(batch: Batch, grid: Grid) -> detection_loss.Targets:
    _, height, width, _ = batch["image"].shape
    return detection_loss.assign(batch["label"], grid, (height, width))


def _training_rng(rng: jax.Array | None) -> jax.Array:
    if rng is None:
        raise ValueError("train is True but rng is None: training draws from a key")
    return rng


def _apply(model: nn.Module, params: Any, *inputs: Any, **options: Any) -> jax.Array:
    # Flax may return variables as well, but not where none is mutable.
    return cast(jax.Array, model.apply({"params": params}, *inputs, **options))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    mix: Callable[[jax.Array, Batch], Batch] | None = None,
    lr_multipliers: str = "",
    teacher: Callable[[jax.Array], jax.Array] | None = None,
    weigh: Callable[[Batch], Batch] | None = None,
) -> tuple[TrainState, Metrics]:
    """Does one update.

    Args:
        state: the state before the step.
        batch: "image" [batch, height, width, 3], uint8 pixels or float32 in [-1, 1]; "label"
            [batch] int32, [batch, classes] float32 of 0 and 1 where an image has several, uint8
            [batch, height, width] of every pixel, or float32 [batch, objects, 5].
        objective: whose mean loss over the batch is brought down.
        optimizer: applied to the gradients of the whole batch.
        accumulate_steps: number of equal parts in which the batch is gone through, one after the
            other, to save memory; the update is that of the whole batch.
        ema_decay: factor of the Polyak average.
        mix: what is done to the batch before it is split, see `mixing.create_mix`.
        lr_multipliers: of the optimizer: parameters that it freezes have no gradient, see
            `multipliers.freeze`.
        teacher: from images as the model gets them to what is "teacher" of the batch.
        weigh: adds what the objective must know of the whole batch, after `mix`.

    Returns:
        The next state, and scalars: "loss" and, where the objective tells what is correct,
        "accuracy" of the batch before the update, of mixed images for the class with the larger
        share; "grad_norm" before clipping.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    if mix is not None:
        step_rng, mix_rng = jax.random.split(step_rng)
        batch = mix(mix_rng, batch)
    if weigh is not None:
        batch = weigh(batch)

    def loss_fn(params: Any, part: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        if lr_multipliers:
            params = freeze(params, lr_multipliers)
        if teacher is not None:
            part = {**part, "teacher": teacher(part["image"])}
        means = jax.tree.map(jnp.mean, objective(params, part, train=True, rng=rng))
        metrics = {"loss": means["loss"]}
        if "correct" in means:
            metrics["accuracy"] = means["correct"]
        return means["loss"], metrics

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulate_steps == 1:
        grads, metrics = grad_fn(state.params, batch, step_rng)
    else:
        grads, metrics = _accumulate(grad_fn, state.params, batch, step_rng, accumulate_steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
    state = dataclasses.replace(
        state, step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
    )
    return state, {**metrics, "grad_norm": optax.global_norm(grads)}


def _accumulate(grad_fn: Any, params: Any, batch: Batch, rng: jax.Array, parts: int) -> Any:
    """Means of the gradients and metrics of grad_fn over interleaved parts of the batch."""
    # Part i takes every parts-th row from i on: each device keeps the rows that it has.
    split = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total: Any, part: Any) -> tuple[Any, None]:
        index, rows = part
        result = grad_fn(params, rows, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, result), None

    first = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], split), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    return jax.tree.map(lambda x: x / parts, total)


def eval_step(params: Any, batch: Batch, *, objective: Objective) -> Metrics:
    """Sums over a padded batch.

    Args:
        params: of the model.
        batch: as in `train_step`, and "mask" [batch] float32: 1 for an image, 0 for padding.
        objective: to evaluate.

    Returns:
        Scalars: what the objective tells of each image, summed, and "count" (int32).
    """
    real = batch["mask"] > 0
    found = objective(params, batch, train=False)
    sums = {name: jnp.sum(jnp.where(real, x, 0)) for name, x in found.items()}
    return {**sums, "count": jnp.sum(real, dtype=jnp.int32)}
