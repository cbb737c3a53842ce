"""A linear probe: multinomial logistic regression on frozen features.

The protocol is that of CLIP (Radford et al., 2021, arXiv 2103.00020, Appendix A.3): L-BFGS with at
most 1,000 iterations, its L2 regularization chosen on held-out images between 1e-6 and 1e6, by a
search that starts with every other decade and halves the interval around the peak down to 8 steps
per decade; then all images are learned from. C is that of scikit-learn's LogisticRegression: the
minimum is sought of

    sum of the cross-entropies of the images + |kernel|^2 / (2 C)

where the bias is free. Not in the paper: features are standardized first, so that one C suits
every model and few iterations do, and of equal accuracies that of the lower loss is taken. Of
images of several labels, every class is a logistic regression of its own, all with one C, and the
mean average precision takes the place of accuracy.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.data import holdout
from vit_jax.evaluation.features import moments
from vit_jax.evaluation.multilabel import average_precision
from vit_jax.sharding import Mesh

MAX_STEPS = 1000
HELD_OUT = 0.2

_DECADES, _PER_DECADE = 6, 8
_FIRST_INTERVAL = 2 * _PER_DECADE

_ROWS = 1 << 14  # whose logits are in memory at a time
# Of the mean loss. scikit-learn ends at 1e-4, where weak regularization is far from the minimum.
_SMALL_GRADIENT = 1e-6
# A loss in float32 that has not fallen so often in a row has no digits left to fall by.
_MOST_STALLS = 5


class Head(NamedTuple):
    """logits = features @ kernel + bias, float32 of shapes [D, K] and [K]."""

    kernel: np.ndarray
    bias: np.ndarray


class Score(NamedTuple):
    """The accuracy in [0, 1] and the mean cross-entropy in nats of some images."""

    accuracy: float
    loss: float


class MultiLabelScore(NamedTuple):
    """The scores of some images of several labels.

    Attributes:
        mAP: the mean average precision of the classes that have an image, in [0, 1].
        accuracy: the share of images of which every label is right at a probability of 0.5.
        loss: the mean over images of the sigmoid cross-entropy summed over the classes, in nats.
    """

    mAP: float  # noqa: N815
    accuracy: float
    loss: float


AnyScore = Score | MultiLabelScore


class Probe(NamedTuple):
    """The result of `train_probe`.

    Attributes:
        head: for features as they are: their standardization is folded into it.
        c: C, as scikit-learn has it.
        tried: the score of the held-out images by each C that was tried, ascending.
        train: the score of the images that were learned from.
    """

    head: Head
    c: float
    tried: dict[float, AnyScore]
    train: AnyScore


class _Images(NamedTuple):
    """Standardized features, labels and weights on the devices, in blocks of equal rows."""

    features: jax.Array  # [blocks, rows, D]
    labels: jax.Array  # [blocks, rows], or of several labels 0 and 1, [blocks, rows, K]
    weights: jax.Array  # [blocks, rows], 0 of an image that does not count and of padding


def train_probe(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    held_out: np.ndarray,
    mesh: Mesh,
    c: float | None = None,
) -> Probe:
    """Fits a linear head, whose C is chosen on held-out images.

    Args:
        features: float32 [images, D].
        labels: int [images], or of images of several labels 0 and 1, [images, K].
        num_classes: K.
        held_out: bool [images], those that C is chosen on; without any `c` must be given.
        mesh: the devices; the images are divided among them.
        c: to be taken instead of a search.
    """
    mean, std = moments(features)
    images = _place(features, labels, mean, std, mesh)
    kept, chosen_on = (_weighted(images, x) for x in (~held_out, held_out))
    start = Head(
        np.zeros((features.shape[1], num_classes), np.float32), np.zeros(num_classes, np.float32)
    )
    fitted: dict[float, Head] = {}

    def score(c: float) -> AnyScore:
        nearest = min(fitted, key=lambda other: abs(np.log(other / c)), default=None)
        fitted[c] = _fit(kept, c, start if nearest is None else fitted[nearest])
        return _score(chosen_on, fitted[c])

    if c is None:
        tried = search(score)
        c = max(tried, key=lambda c: _rank(tried[c]))
    else:
        tried = {c: score(c)} if held_out.any() else {}
    head = _fit(images, c, fitted.get(c, start))
    return Probe(_fold(head, mean, std), c, tried, _score(images, head))


def score_head(head: Head, features: np.ndarray, labels: np.ndarray, mesh: Mesh) -> AnyScore:
    """Scores a head on images.

    Args:
        head: of `train_probe`.
        features: float32 [images, D].
        labels: as for `train_probe`.
        mesh: the devices.
    """
    width = features.shape[1]
    return _score(_place(features, labels, np.zeros(width), np.ones(width), mesh), head)


def search(score: Callable[[float], AnyScore]) -> dict[float, AnyScore]:
    """Scores every C of CLIP's search, at most 15 of the 97 that there are.

    Args:
        score: of a C.

    Returns:
        The score of each C that was tried, ascending.
    """
    last = _DECADES * _PER_DECADE
    tried: dict[int, AnyScore] = {}

    def try_all(places: list[int]) -> None:
        for place in places:
            if abs(place) <= last and place not in tried:
                tried[place] = score(_value(place))

    interval = _FIRST_INTERVAL
    try_all(list(range(-last, last + 1, interval)))
    while interval > 1:
        interval //= 2
        peak = max(tried, key=lambda place: _rank(tried[place]))
        try_all([peak - interval, peak + interval])
    return {_value(place): tried[place] for place in sorted(tried)}


def _rank(score: AnyScore) -> tuple[float, float]:
    return score[0], -score.loss


def _value(place: int) -> float:
    return 10.0 ** (place / _PER_DECADE)


def hold_out(labels: np.ndarray, share: float = HELD_OUT, seed: int = 0) -> np.ndarray:
    """Chooses images of every class at random, bool [images].

    Of a class of two images or more at least one is held out and one is not; a single one is not.

    Of several labels, the classes are two here: with a label and without. None is held out unless
    one has a label.

    Args:
        labels: as for `train_probe`.
        share: of each class, between 0 and 1.
        seed: of the choice.
    """
    if labels.ndim == 2:
        chosen = hold_out(labels.any(axis=1), share, seed)
        return chosen & labels[chosen].any()
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out[members[: holdout.number(len(members), share)]] = True
    return held_out


def _place(
    features: np.ndarray, labels: np.ndarray, mean: np.ndarray, std: np.ndarray, mesh: Mesh
) -> _Images:
    images, width = features.shape
    blocks = -(-images // _ROWS)
    rows = -(-images // (blocks * mesh.size)) * mesh.size
    x = np.zeros((blocks * rows, width), np.float32)
    for begin in range(0, images, _ROWS):
        part = slice(begin, min(begin + _ROWS, images))
        x[part] = (features[part] - mean) / std
    padded = np.zeros((blocks * rows, *labels.shape[1:]), np.int32)
    padded[:images] = labels
    weights = np.zeros(blocks * rows, np.float32)
    weights[:images] = 1
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    x, padded, weights = (
        jax.device_put(array.reshape(blocks, rows, *array.shape[1:]), sharding)
        for array in (x, padded, weights)
    )
    return _Images(x, padded, weights)


def _weighted(images: _Images, counts: np.ndarray) -> _Images:
    """The same images, of which only some count."""
    weights = np.zeros(images.weights.size, np.float32)
    weights[: len(counts)] = counts
    placed = jax.device_put(weights.reshape(images.weights.shape), images.weights.sharding)
    return images._replace(weights=placed)


def _fold(head: Head, mean: np.ndarray, std: np.ndarray) -> Head:
    """The head for features that are not standardized: (x - mean) / std @ W + b = x @ W' + b'."""
    kernel = np.asarray(head.kernel, np.float64) / std[:, None]
    bias = np.asarray(head.bias, np.float64) - mean @ kernel
    return Head(kernel.astype(np.float32), bias.astype(np.float32))


def _sums(images: _Images, head: Head) -> tuple[jax.Array, jax.Array]:
    """The cross-entropies and the images told right, summed over the images that count."""

    def add(total: tuple[jax.Array, jax.Array], block: _Images) -> tuple[tuple, None]:
        # TensorFloat-32 would leave three digits.
        logits = jnp.matmul(block.features, head.kernel, precision=jax.lax.Precision.HIGHEST)
        logits += head.bias
        if block.labels.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, block.labels)
            right = jnp.argmax(logits, -1) == block.labels
        else:
            losses = optax.sigmoid_binary_cross_entropy(logits, block.labels).sum(-1)
            right = jnp.all((logits > 0) == block.labels, axis=-1)
        hits = right & (block.weights > 0)
        loss, correct = total
        return (
            loss + jnp.sum(block.weights * losses),
            correct + jnp.sum(hits, dtype=jnp.int32),
        ), None

    # Checkpointed: a gradient does not keep the logits of all images.
    zero = (jnp.zeros(()), jnp.zeros((), jnp.int32))
    return jax.lax.scan(jax.checkpoint(add), zero, images)[0]


_jit_sums = jax.jit(_sums)


def _score(images: _Images, head: Head) -> AnyScore:
    loss, correct = _jit_sums(images, head)
    counts = np.asarray(images.weights).ravel() > 0
    score = Score(float(correct) / int(counts.sum()), float(loss) / int(counts.sum()))
    if images.labels.ndim == 2:
        return score
    width, classes = images.features.shape[-1], images.labels.shape[-1]
    logits = np.asarray(images.features).reshape(-1, width)[counts] @ head.kernel + head.bias
    labels = np.asarray(images.labels).reshape(-1, classes)[counts] > 0
    return MultiLabelScore(float(np.nanmean(average_precision(logits, labels))), *score)


def _fit(images: _Images, c: float, start: Head) -> Head:
    # Heads are on the host in between, or where they lie would have it compiled once more.
    return Head(*jax.device_get(_minimize(images, c, start)))


class _Progress(NamedTuple):
    head: Head
    state: optax.OptState
    value: jax.Array
    stalls: jax.Array
    step: jax.Array


@jax.jit
def _minimize(images: _Images, c: float, start: Head) -> Head:
    count = jnp.sum(images.weights)

    def objective(head: Head) -> jax.Array:
        loss, _ = _sums(images, head)
        return loss / count + jnp.sum(head.kernel**2) / (2 * c * count)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(now: _Progress) -> _Progress:
        value, grad = value_and_grad(now.head, state=now.state)
        updates, state = solver.update(
            grad, now.state, now.head, value=value, grad=grad, value_fn=objective
        )
        reached = optax.tree_utils.tree_get(state, "value")
        stalls = jnp.where(reached < now.value, 0, now.stalls + 1)
        head = optax.apply_updates(now.head, updates)
        return _Progress(
            cast(Head, head), state, jnp.minimum(reached, now.value), stalls, now.step + 1
        )

    def goes_on(now: _Progress) -> jax.Array:
        grad = optax.tree_utils.tree_get(now.state, "grad")
        largest = jnp.max(jnp.array([jnp.max(jnp.abs(x)) for x in grad]))
        unfinished = (largest > _SMALL_GRADIENT) & (now.stalls < _MOST_STALLS)
        return (now.step == 0) | (unfinished & (now.step < MAX_STEPS))

    infinite, zero = jnp.array(jnp.inf), jnp.array(0)
    begin = _Progress(start, solver.init(start), infinite, zero, zero)
    return jax.lax.while_loop(goes_on, step, begin).head
