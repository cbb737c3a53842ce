"""Maps, rollout (Appendix D.8) and distances (D.7) from attention weights.

Attention weights are those of `intermediates.attention_weights`, [..., tokens, tokens]. A class
token comes before the patches, which come row by row; their number says whether there is one.
"""

from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@overload
def on_patches(weights: jax.Array, grid: tuple[int, int]) -> jax.Array: ...
@overload
def on_patches(weights: np.ndarray, grid: tuple[int, int]) -> np.ndarray: ...
def on_patches(weights: Array, grid: tuple[int, int]) -> Array:
    """Returns the attention of the image's representation to the patches, [..., rows, columns].

    That is the class token's; of a model without one, which averages over
    the patches (D.3), the mean of theirs.

    Args:
        weights: [..., tokens, tokens].
        grid: rows and columns of patches.
    """
    rows, columns = grid
    patches = rows * columns
    has_class_token = weights.shape[-1] > patches
    looked_at = weights[..., 0, :] if has_class_token else weights.mean(axis=-2)
    return looked_at[..., -patches:].reshape(*weights.shape[:-2], rows, columns)


def rollout(weights: Array) -> jax.Array:
    """Attention rollout (Appendix D.8; Abnar & Zuidema, 2020), [batch, tokens, tokens].

    Averages over the heads, adds the identity for the residual connection, makes every row sum to 1
    again and multiplies the layers, the first one rightmost. A row is the share that each token of
    the input has in one token of the output.

    Args:
        weights: [batch, layers, heads, tokens, tokens].
    """
    mixed = weights.mean(axis=2) + jnp.eye(weights.shape[-1])  # [batch, layers, tokens, tokens]
    mixed = mixed / mixed.sum(axis=-1, keepdims=True)
    result = mixed[:, 0]
    for layer in range(1, mixed.shape[1]):
        result = jnp.matmul(mixed[:, layer], result, precision="highest")
    return result


def to_mask(maps: Array, image_size: tuple[int, int]) -> jax.Array:
    """Enlarges maps of the patches to masks of the image, in [0, 1], [..., height, width].

    Bilinear; each map is divided by its maximum.

    Args:
        maps: [..., rows, columns], not negative.
        image_size: height and width in pixels.
    """
    maps = maps / maps.max(axis=(-2, -1), keepdims=True)
    return jax.image.resize(maps, (*maps.shape[:-2], *image_size), "bilinear")


def to_blocks(maps: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Enlarges maps of the patches to the image, [..., height, width]: a block for each patch.

    Every pixel has the value of the patch that it lies in, as the model knows no finer place.

    Args:
        maps: [..., rows, columns].
        image_size: height and width in pixels, multiples of rows and columns.
    """
    height, width = (size // count for size, count in zip(image_size, maps.shape[-2:], strict=True))
    return maps.repeat(height, axis=-2).repeat(width, axis=-1)


def patch_distances(grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """Euclidean distance between the centers of any two patches in pixels, [patches, patches].

    Args:
        grid: rows and columns of patches.
        patch_size: side in pixels of what becomes one token: `model.downsampling`.
    """
    centers = np.moveaxis(np.indices(grid), 0, -1).reshape(-1, 2) * patch_size
    return np.linalg.norm(centers[:, None] - centers, axis=-1)


def attention_distance(weights: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Mean attention distance in pixels (Appendix D.7), [...]; average it over images.

    The class token is dropped, as a query and as a key, and what is left of a row is not rescaled:
    attention to the class token counts as a distance of 0. Distances are weighted by attention,
    summed over the keys and averaged over the queries.

    Args:
        weights: [..., tokens, tokens].
        grid: rows and columns of patches.
        patch_size: side in pixels of what becomes one token: `model.downsampling`.
    """
    distances = patch_distances(grid, patch_size).astype(np.float32)
    patches = len(distances)
    between_patches = weights[..., -patches:, -patches:]
    return (between_patches * distances).sum(axis=-1).mean(axis=-1)


def uniform_distance(grid: tuple[int, int], patch_size: int, num_tokens: int) -> float:
    """The attention distance of a head that looks at all of `num_tokens` tokens alike, in pixels.

    Args:
        grid: rows and columns of patches.
        patch_size: side in pixels of what becomes one token.
        num_tokens: patches, and the class token if there is one.
    """
    return float(patch_distances(grid, patch_size).sum(axis=-1).mean() / num_tokens)
