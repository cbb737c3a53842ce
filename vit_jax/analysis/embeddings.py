"""Learned embeddings: filters and positions (Figure 7, left and middle)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import ARCHITECTURES
from vit_jax.models.resnet import standardize, standardize_bit


def rgb_filters(params: Mapping[str, Any]) -> np.ndarray:
    """The filters that see the image, [height, width, 3, filters].

    Those of the patch embedding; of a hybrid, which embeds the patches of a feature map, or a
    ResNet those of the first convolution, standardized as it uses them. Of images of other channels
    they are of the first three, or of the first alone as gray.

    Args:
        params: of a model.

    Raises:
        UserError: there are none.
    """
    flat = flatten_dict(params, sep="/")
    # A hybrid, which has the embedding beside its first convolution, comes before it in the order.
    stems = sorted({family.stem for family in ARCHITECTURES.values()} & flat.keys())
    if not stems:
        raise UserError("this model has no filters that see the image")
    kernel = flat[stems[0]]
    if stems[0] != "embedding/kernel":
        # Only a hybrid has an embedding beside it; the other ResNets are standardized as BiT.
        kernel = (standardize if "embedding" in params else standardize_bit)(kernel)
    shown = [0, 1, 2] if kernel.shape[2] >= 3 else [0, 0, 0]
    return np.asarray(kernel)[:, :, shown]


def principal_filters(kernel: np.ndarray, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """The principal components of filters (Figure 7 left shows the first 28 of L/32).

    A filter is an example and its values are the features; the mean filter is taken off.

    Args:
        kernel: [height, width, channels, filters].
        count: how many; fewer if there are not so many.

    Returns:
        The components, [count, height, width, channels], each of length 1 and of the sign that
        makes its largest value positive; and each one's share of the variance, [count].
    """
    examples = kernel.reshape(-1, kernel.shape[-1]).T.astype(np.float64)
    examples = examples - examples.mean(axis=0)
    _, scales, components = np.linalg.svd(examples, full_matrices=False)
    components = components[:count]
    largest = np.abs(components).argmax(axis=1)
    components *= np.sign(components[np.arange(len(components)), largest])[:, None]
    shares = scales**2 / (scales**2).sum()
    return components.reshape(-1, *kernel.shape[:3]), shares[:count]


def to_rgb(filters: np.ndarray) -> np.ndarray:
    """Filters as pixels in [0, 1]: 0 is mid-gray, and each one's largest value black or white.

    Args:
        filters: [..., height, width, 3].
    """
    largest = np.abs(filters).max(axis=(-3, -2, -1), keepdims=True)
    return 0.5 + 0.5 * filters / np.where(largest, largest, 1)


def position_similarity(embedding: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Cosine similarities of the patches' position embeddings (Figure 7 middle).

    Args:
        embedding: [tokens, hidden_size], see `intermediates.position_embedding`.
        grid: rows and columns of patches; what comes before them, the class token, is left out.

    Returns:
        [rows, columns, rows, columns]: of the patch at the first two with that at the last two.
    """
    rows, columns = grid
    patches = np.asarray(embedding)[-rows * columns :].astype(np.float64)
    lengths = np.linalg.norm(patches, axis=-1, keepdims=True)
    patches = patches / np.where(lengths, lengths, 1)
    return (patches @ patches.T).reshape(rows, columns, rows, columns)


def similarity_by_place(similarity: np.ndarray) -> dict[str, float]:
    """Mean similarities: of neighbors, within a row or column, and of all others; those there are.

    Args:
        similarity: [rows, columns, rows, columns].
    """
    row, column, other_row, other_column = np.indices(similarity.shape)
    down, across = abs(row - other_row), abs(column - other_column)
    places = {
        "neighbors": down + across == 1,
        "line": (down == 0) != (across == 0),
        "others": (down > 0) & (across > 0),
    }
    return {name: float(similarity[x].mean()) for name, x in places.items() if x.any()}
