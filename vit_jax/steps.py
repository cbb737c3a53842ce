"""One training step and one evaluation step, as pure functions of (state, batch)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def softmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy, [batch, classes] to [batch]."""
    return optax.softmax_cross_entropy(logits, targets)


def sigmoid_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy summed over the classes, [batch, classes] to [batch]."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


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
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, logits.shape[-1])
    return LOSSES[loss](logits, optax.smooth_labels(labels, label_smoothing))


def mixup(rng: jax.Array, batch: Batch, alpha: float, num_classes: int) -> Batch:
    """Mixes every image with the one before it in the batch (Zhang et al., 2018).

    One share is drawn for the whole batch from Beta(alpha, alpha), and the larger of it and its
    rest is the image's own, as in the code of AugReg.

    Args:
        rng: a key.
        batch: see `train_step`.
        alpha: above 0; the closer to 0, the more often one of the two images is all there is.
        num_classes: of the model.

    Returns:
        The batch with mixed "image", "label" as it was, which has the larger share, and "targets"
        [batch, num_classes] float32, the shares of the classes.
    """
    share = jax.random.beta(rng, alpha, alpha)
    share = jnp.maximum(share, 1.0 - share)

    def mix(x: jax.Array) -> jax.Array:
        return share * x + (1.0 - share) * jnp.roll(x, 1, axis=0)

    targets = jax.nn.one_hot(batch["label"], num_classes)
    return {**batch, "image": mix(batch["image"]), "targets": mix(targets)}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss: str,
    label_smoothing: float = 0.0,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    mixup_alpha: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Does one update.

    Args:
        state: the state before the step.
        batch: "image" [batch, height, width, 3] float32 in [-1, 1], "label" [batch] int32.
        model: the module whose parameters are trained.
        optimizer: applied to the gradients of the whole batch.
        loss: "softmax" or "sigmoid".
        label_smoothing: see `classification_loss`.
        accumulate_steps: number of equal parts in which the batch is gone through, one after the
            other, to save memory; the update is that of the whole batch.
        ema_decay: factor of the Polyak average.
        mixup_alpha: see `mixup`; 0 mixes nothing.

    Returns:
        The next state, and scalars: "loss" and "accuracy" of the batch before the update, of mixed
        images the accuracy for the class with the larger share; "grad_norm" before clipping.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    if mixup_alpha:
        step_rng, mixup_rng = jax.random.split(step_rng)
        batch = mixup(mixup_rng, batch, mixup_alpha, model.num_classes)

    def loss_fn(params: Any, part: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        logits = model.apply({"params": params}, part["image"], train=True, rngs={"dropout": rng})
        targets = part.get("targets", part["label"])
        value = classification_loss(logits, targets, loss, label_smoothing).mean()
        accuracy = jnp.mean(jnp.argmax(logits, -1) == part["label"])
        return value, {"loss": value, "accuracy": accuracy}

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
    state = state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
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


def eval_step(params: Any, batch: Batch, *, model: nn.Module, loss: str) -> Metrics:
    """Sums over a padded batch.

    Args:
        params: of the model.
        batch: as in `train_step`, and "mask" [batch] float32: 1 for an image, 0 for padding.
        model: the module to evaluate.
        loss: "softmax" or "sigmoid".

    Returns:
        Scalars: "loss" (float32), "correct" and "count" (int32).
    """
    logits = model.apply({"params": params}, batch["image"])
    losses = classification_loss(logits, batch["label"], loss)
    real = batch["mask"] > 0
    return {
        "loss": jnp.sum(jnp.where(real, losses, 0.0)),
        "correct": jnp.sum((jnp.argmax(logits, -1) == batch["label"]) & real, dtype=jnp.int32),
        "count": jnp.sum(real, dtype=jnp.int32),
    }
