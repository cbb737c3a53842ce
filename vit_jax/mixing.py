"""Augmentation on the device, of whole batches: mixup, CutMix and random erasing.

What is drawn depends on the key of the step alone: not on the number of devices, processes or
parts.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_jax.steps import Batch, class_shares, pixels_to_inputs

Mix = Callable[[jax.Array, Batch], Batch]


def create_mix(
    *, mixup_alpha: float, cutmix_alpha: float, erase_probability: float, num_classes: int
) -> Mix | None:
    """The change that a step makes to its batch, from a key and the batch; None for none.

    Images are erased first, then mixed. Where there are both mixup and CutMix, each batch has one
    of the two with equal chance, as in timm.

    Args:
        mixup_alpha: see `mixup`; 0 is off.
        cutmix_alpha: see `cutmix`; 0 is off.
        erase_probability: see `erase`; 0 is off.
        num_classes: of the model.
    """
    mixes: list[Mix] = [
        functools.partial(mix, alpha=alpha, num_classes=num_classes)
        for mix, alpha in ((mixup, mixup_alpha), (cutmix, cutmix_alpha))
        if alpha
    ]
    if len(mixes) == 2:
        mixes = [functools.partial(_one_of_two, *mixes)]
    if erase_probability:
        mixes.insert(0, functools.partial(erase, probability=erase_probability))
    if len(mixes) == 2:
        return functools.partial(_one_after_the_other, *mixes)
    return mixes[0] if mixes else None


def _one_of_two(first: Mix, second: Mix, rng: jax.Array, batch: Batch) -> Batch:
    coin, rng = jax.random.split(rng)
    return jax.lax.cond(jax.random.bernoulli(coin), first, second, rng, batch)


def _one_after_the_other(first: Mix, second: Mix, rng: jax.Array, batch: Batch) -> Batch:
    first_rng, second_rng = jax.random.split(rng)
    return second(second_rng, first(first_rng, batch))


def mixup(rng: jax.Array, batch: Batch, alpha: float, num_classes: int) -> Batch:
    """Mixes every image with the one before it in the batch (Zhang et al., 2018).

    One share is drawn for the whole batch from Beta(alpha, alpha), and the larger of it and its
    rest is the image's own, as in the code of AugReg.

    Args:
        rng: a key.
        batch: see `steps.train_step`; an image may also have several labels, [batch,
            classes].
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

    targets = class_shares(batch["label"], num_classes)
    images = pixels_to_inputs(batch["image"])
    return {**batch, "image": mix(images), "targets": mix(targets)}


def cutmix(rng: jax.Array, batch: Batch, alpha: float, num_classes: int) -> Batch:
    """Pastes a box of the image before it in the batch into every image (Yun et al., 2019).

    One share and one box are drawn for the whole batch, as in the authors' code (arXiv 1905.04899).

    Args:
        rng: a key.
        batch: as in `mixup`.
        alpha: above 0, the box is 1 - Beta(alpha, alpha) of the image before it is clipped to it.
        num_classes: of the model.

    Returns:
        The batch with such an "image", the "label" that has the larger share, and "targets" [batch,
        num_classes] float32, shares of what is left of the two images.
    """
    share_rng, row_rng, column_rng = jax.random.split(rng, 3)
    share = jax.random.beta(share_rng, alpha, alpha)
    images = pixels_to_inputs(batch["image"])
    height, width = images.shape[1:3]
    top, bottom = cut(share, jax.random.randint(row_rng, (), 0, height), height)
    left, right = cut(share, jax.random.randint(column_rng, (), 0, width), width)
    pasted, pixels = (bottom - top) * (right - left), height * width
    own = 1.0 - pasted / pixels
    box = _boxes(images.shape, top, bottom, left, right)
    labels, targets = batch["label"], class_shares(batch["label"], num_classes)

    def before(x: jax.Array) -> jax.Array:
        return jnp.roll(x, 1, axis=0)

    return {
        **batch,
        "image": jnp.where(box, before(images), images),
        "label": jnp.where(2 * pasted <= pixels, labels, before(labels)),
        "targets": own * targets + (1.0 - own) * before(targets),
    }


def cut(share: jax.Array, center: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """The ends of the box of CutMix along an axis, clipped to the image.

    Args:
        share: of the image that its own pixels should have.
        center: of the box, in pixels.
        side: of the image, in pixels.
    """
    half = jnp.floor(side * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
    return jnp.clip(center - half, 0, side), jnp.clip(center + half, 0, side)


# Zhong et al.: the share of the image that is erased, and how many times as high as wide. Not in
# the paper: the number of tries, after which an image is left; fewer than one of 30 fails.
_ERASED_SHARES = (0.02, 0.4)
_ERASED_RATIOS = (0.3, 1 / 0.3)
_TRIES = 10


def erase(rng: jax.Array, batch: Batch, probability: float) -> Batch:
    """Replaces a box of some images by noise (Zhong et al., 2020, arXiv 1708.04896).

    Area and ratio of the sides are those of the paper, each pixel is drawn from [-1, 1] (its
    "RE-R", which did best). The place is drawn from all where the box fits, as in the authors'
    code.

    Args:
        rng: a key.
        batch: see `steps.train_step`.
        probability: that an image is erased, each for itself.

    Returns:
        The batch with such an "image", in float32.
    """
    images = pixels_to_inputs(batch["image"])
    count, height, width, _ = images.shape
    keys = jax.random.split(rng, 4)
    shares = jax.random.uniform(keys[0], (2, count, _TRIES))
    area = height * width * _between(shares[0], _ERASED_SHARES)
    ratio = _between(shares[1], _ERASED_RATIOS)
    rows, columns = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (rows <= height) & (columns <= width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    rows, columns = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (rows, columns))
    places = jax.random.uniform(keys[1], (2, count))
    top = jnp.floor(places[0] * (height - rows + 1))
    left = jnp.floor(places[1] * (width - columns + 1))
    chosen = jax.random.bernoulli(keys[2], probability, (count,)) & fits.any(axis=1)
    top, bottom, left, right = (
        x.reshape(-1, 1, 1, 1) for x in (top, top + rows * chosen, left, left + columns)
    )
    noise = jax.random.uniform(keys[3], images.shape, minval=-1.0)
    erased = jnp.where(_boxes(images.shape, top, bottom, left, right), noise, images)
    return {**batch, "image": erased}


def _between(share: jax.Array, ends: tuple[float, float]) -> jax.Array:
    return ends[0] + (ends[1] - ends[0]) * share


def _boxes(
    shape: tuple[int, ...], top: jax.Array, bottom: jax.Array, left: jax.Array, right: jax.Array
) -> jax.Array:
    """The pixels in boxes, [1 or batch, height, width, 1]."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1], 1, 1), 1)
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, 1, shape[2], 1), 2)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
