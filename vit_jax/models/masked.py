"""Masked patch prediction (Section 4.6 and Appendix B.1.2): the model, corruption and targets.

As BERT does with words, patch embeddings of an image are corrupted and the model predicts what the
patches looked like. No label is read.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize, sides
from vit_jax.models.base import Grid, Model
from vit_jax.models.vit import VisionTransformer

Array = jax.Array

# Of the corrupted patches 80% become the mask embedding, 10% another patch's, and 10% stay.
MASKED_SHARE = 0.8
MOVED_SHARE = 0.1
# A 3-bit color has 8 levels a channel.
LEVELS = 8
NUM_COLORS = LEVELS**3
DOWNSIZED_SIDE = 4


class Corruption(NamedTuple):
    """The corruption of the patches of each image, numbered by rows.

    Attributes:
        chosen: int32 [batch, corrupted], the corrupted patches, in no order.
        masked: bool [batch, patches], which of them become the mask embedding.
        source: int32 [batch, patches], the patch whose embedding stands in this place: another
            one's for those that are swapped for one, its own for all others.
    """

    chosen: Array
    masked: Array
    source: Array


def num_corrupted(patches: int, rate: float) -> int:
    """The number of corrupted patches in each image: `rate` of them, rounded.

    The number is fixed, and not drawn patch by patch with probability `rate`, so that every image
    weighs the same and what is predicted has one shape.

    Raises:
        UserError: it would be none, or there is no other patch.
    """
    count = round(rate * patches)
    if count < 1 or patches < 2:
        raise UserError(
            f"masking.rate {rate} of {patches} patches leaves nothing to predict: it must be one "
            "patch at least, of two or more"
        )
    return count


def draw_corruption(rng: Array, batch: int, patches: int, rate: float) -> Corruption:
    """Chooses `num_corrupted` patches of each image, and the fate of each on its own.

    Args:
        rng: a PRNG key; the result is a pure function of it.
        batch: images.
        patches: of each image.
        rate: share of the patches that is corrupted.
    """
    count = num_corrupted(patches, rate)
    order_rng, fate_rng, other_rng = jax.random.split(rng, 3)
    order = jnp.argsort(jax.random.uniform(order_rng, (batch, patches)), axis=1)
    corrupted = jnp.argsort(order, axis=1) < count
    fate = jax.random.uniform(fate_rng, (batch, patches))
    own = jnp.arange(patches)
    other = (own + jax.random.randint(other_rng, (batch, patches), 1, patches)) % patches
    moved = corrupted & (fate >= 1 - MOVED_SHARE)
    return Corruption(
        chosen=order[:, :count],
        masked=corrupted & (fate < MASKED_SHARE),
        source=jnp.where(moved, other, own),
    )


def draw_mask(rng: Array, batch: int, patches: int, rate: float) -> Corruption:
    """Chooses patches as `draw_corruption` does, all of which become the mask embedding.

    Args:
        rng: a PRNG key; the result is a pure function of it.
        batch: images.
        patches: of each image.
        rate: share of the patches that is masked.
    """
    drawn = draw_corruption(rng, batch, patches, rate)
    own = jnp.arange(patches)
    is_chosen = (drawn.chosen[..., None] == own).any(axis=1)
    return Corruption(drawn.chosen, is_chosen, jnp.broadcast_to(own, is_chosen.shape))


def corrupt(x: Array, mask_embedding: Array, corruption: Corruption) -> Array:
    """Corrupts patch embeddings x [batch, patches, hidden_size]; mask_embedding broadcasts to x."""
    x = jnp.take_along_axis(x, corruption.source[..., None], axis=1)
    return jnp.where(corruption.masked[..., None], mask_embedding, x)


class MaskedVisionTransformer(VisionTransformer):
    """A ViT, or with its stem a hybrid, with a head on its patches in place of the classifier.

    The parameters of the trunk keep their names; added are `mask_embedding`, which starts at zero
    as the class token does, and `patch_head`. num_classes and representation_size are not read.

    Attributes:
        outputs: width of the head.
    """

    outputs: int = NUM_COLORS

    @nn.compact
    def __call__(  # ty: ignore[incompatible-method-override]  # It has no classifier, so no heads.
        self, images: Array, corruption: Corruption | None = None, *, train: bool = False
    ) -> Array:
        """Predicts the corrupted patches.

        Args:
            images: [batch, height, width, 3], values in [-1, 1].
            corruption: of the patch embeddings; None leaves all as they are and predicts all.
            train: whether dropout is on; then the "dropout" RNG is needed.

        Returns:
            [batch, corrupted, outputs] float32, in the order of `corruption.chosen`; without a
            corruption [batch, patches, outputs].

        Raises:
            UserError: as `VisionTransformer` does.
        """
        config = self.config
        grid = config.grid(*images.shape[1:3])
        x = self._embed(images)
        shape = (1, 1, config.hidden_size)
        mask_embedding = self.param("mask_embedding", nn.initializers.zeros, shape)
        if corruption is not None:
            x = corrupt(x, mask_embedding.astype(config.compute_dtype), corruption)
        x = self._encode(x, grid, train)
        x = x[:, config.num_prefix_tokens :]
        if corruption is not None:  # Only what the loss will read.
            x = jnp.take_along_axis(x, corruption.chosen[..., None], axis=1)
        head = nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="patch_head")
        return head(x.astype(jnp.float32))


# The parameters that no other model has.
PARAMETERS = ("mask_embedding", "patch_head")


def predictor(trunk: Model, target: str) -> MaskedVisionTransformer:
    """The model that predicts a target, one of TARGETS, with the trunk of another model.

    Raises:
        UserError: the model has no patch embeddings to be corrupted.
    """
    if not (trunk.config.has_patch_embeddings and isinstance(trunk, VisionTransformer)):
        raise UserError(
            f"objective masked_patches is for ViTs and hybrids: a {type(trunk).__name__} has no "
            "patch embeddings to corrupt"
        )
    outputs = num_outputs(target, trunk.downsampling)
    return _with_patch_head(type(trunk))(trunk.config, outputs=outputs)


@functools.cache
def _with_patch_head(trunk: type[VisionTransformer]) -> type[MaskedVisionTransformer]:
    """The class that embeds and encodes as that of the trunk does."""
    return type(f"Masked{trunk.__name__}", (MaskedVisionTransformer, trunk), {})


def multiply_adds(model: MaskedVisionTransformer, image_size: ImageSize, rate: float) -> int:
    """Multiply-adds of one image's forward pass, the head's of the corrupted patches alone.

    Args:
        model: the predictor.
        image_size: of the image.
        rate: share of the patches that is corrupted.
    """
    config = dataclasses.replace(model.config, num_classes=0)
    count = num_corrupted(math.prod(config.grid(*sides(image_size))), rate)
    return config.multiply_adds(image_size) + count * model.outputs * config.hidden_size


def cut_patches(images: Array, size: int) -> Array:
    """Cuts images [batch, height, width, 3] to [batch, patches, size, size, 3], by rows."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, size, size, channels)


def join_patches(patches: Array, grid: Grid) -> Array:
    """Joins what `cut_patches` cut of images of so many rows and columns of patches."""
    batch, _, size, _, channels = patches.shape
    rows, columns = grid
    x = patches.reshape(batch, rows, columns, size, size, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * size, columns * size, channels)


def colors(x: Array) -> Array:
    """The 3-bit color of every pixel: 8 levels of equal width a channel, red counting most.

    Args:
        x: [..., 3], values in [-1, 1].

    Returns:
        int32 [...] from 0 to 511.
    """
    levels = jnp.clip(jnp.floor((x + 1) / 2 * LEVELS), 0, LEVELS - 1).astype(jnp.int32)
    red, green, blue = levels[..., 0], levels[..., 1], levels[..., 2]
    return (red * LEVELS + green) * LEVELS + blue


def middles(colors: Array) -> Array:
    """The middle of each 3-bit color, float32 [..., 3] in [-1, 1]; the inverse of `colors`."""
    levels = jnp.stack([colors // LEVELS**2, colors // LEVELS % LEVELS, colors % LEVELS], axis=-1)
    return (2 * levels + 1) / jnp.float32(LEVELS) - 1


def mean_color(images: Array, size: int) -> Array:
    """The color of each patch's mean, int32 [batch, patches, 1]; see `colors` for the images."""
    return colors(cut_patches(images, size).mean(axis=(2, 3)))[..., None]


def downsized(images: Array, size: int) -> Array:
    """The colors of each patch at 4 x 4 pixels, int32 [batch, patches, 16], by rows.

    Each of the 4 x 4 is the mean over the part of the patch that it covers, pixels that it covers
    in part counting as much as they are covered; so patches of 14 can be downsized too.
    """
    weights = _overlap(DOWNSIZED_SIDE, size) * np.float32(DOWNSIZED_SIDE / size)
    patches = cut_patches(images, size)
    precise = jax.lax.Precision.HIGHEST  # Else a GPU rounds pixels to ten bits.
    small = jnp.einsum("ip,jq,bnpqc->bnijc", weights, weights, patches, precision=precise)
    return colors(small).reshape(*patches.shape[:2], DOWNSIZED_SIDE**2)


def _overlap(cells: int, size: int) -> np.ndarray:
    """The share of each pixel of a side that each of so many cells covers, [cells, size]."""
    # Cell i covers [i, i + 1] * size / cells of the side, pixel p [p, p + 1].
    begin = np.arange(cells)[:, None] * size / cells
    pixel = np.arange(size)
    overlap = np.minimum(begin + size / cells, pixel + 1) - np.maximum(begin, pixel)
    return np.maximum(overlap, 0).astype(np.float32)


def pixels(images: Array, size: int) -> Array:
    """The pixels of each patch, float32 [batch, patches, size * size * 3] in [-1, 1]."""
    patches = cut_patches(images, size)
    return patches.reshape(*patches.shape[:2], -1)


# Each maps images [batch, height, width, 3] in [-1, 1] and a patch's side to [batch, patches, n].
TARGETS = {"mean_color": mean_color, "downsized": downsized, "pixels": pixels}


def num_outputs(target: str, size: int) -> int:
    """Counts the outputs for a patch of side `size`: 512 logits a color, or the values."""
    patch = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    wanted = jax.eval_shape(lambda patch: TARGETS[target](patch, size), patch)
    each = NUM_COLORS if jnp.issubdtype(wanted.dtype, jnp.integer) else 1
    return wanted.shape[-1] * each


def target_of(outputs: int, size: int) -> str | None:
    """The target that has so many outputs for a patch of side `size`; None if none has."""
    return next((name for name in TARGETS if num_outputs(name, size) == outputs), None)


def to_patches(predictions: Array, target: str, size: int) -> Array:
    """The patches that are predicted: the inverse of a target, as far as it has one.

    Args:
        predictions: [batch, patches, outputs].
        target: one of TARGETS. Of colors the most probable is taken, and its middle; a pixel that
            several of the 4 x 4 cover is their mean, by how much of it they cover.
        size: side of a patch.

    Returns:
        [batch, patches, size, size, 3]; nothing holds predicted pixels within [-1, 1].
    """
    count = predictions.shape[:2]
    if target == "pixels":
        return predictions.reshape(*count, size, size, 3)
    cells = DOWNSIZED_SIDE if target == "downsized" else 1
    logits = predictions.reshape(*count, cells, cells, NUM_COLORS)
    small = middles(jnp.argmax(logits, axis=-1))
    weights, precise = _overlap(cells, size), jax.lax.Precision.HIGHEST
    return jnp.einsum("ip,jq,bnijc->bnpqc", weights, weights, small, precision=precise)


def restore(images: Array, predictions: Array, chosen: Array, target: str, size: int) -> Array:
    """Replaces patches of images by what is predicted of them, and leaves the others.

    Args:
        images: [batch, height, width, 3], values in [-1, 1].
        predictions: [batch, corrupted, outputs].
        chosen: int32 [batch, corrupted], the patches that these are of.
        target: one of TARGETS.
        size: side of a patch.
    """
    patches, rows = cut_patches(images, size), jnp.arange(len(images))[:, None]
    patches = patches.at[rows, chosen].set(to_patches(predictions, target, size))
    return join_patches(patches, (images.shape[1] // size, images.shape[2] // size))


def scores(predictions: Array, targets: Array) -> dict[str, Array]:
    """Scores predictions of patches.

    Args:
        predictions: [batch, corrupted, outputs].
        targets: of the same patches: int32 [batch, corrupted, colors], whose outputs are logits,
            color by color; or float32 [batch, corrupted, outputs].

    Returns:
        "loss" [batch], the mean over all that is predicted of an image: of the cross-entropy in
        nats, or of the squared error; and of colors "correct" [batch], the share that was right.
    """
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        return {"loss": jnp.mean((predictions - targets) ** 2, axis=(1, 2))}
    logits = predictions.reshape(*targets.shape, NUM_COLORS)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = jnp.mean(jnp.argmax(logits, -1) == targets, axis=(1, 2))
    return {"loss": losses.mean(axis=(1, 2)), "correct": correct}
