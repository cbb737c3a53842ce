"""The bicubic interpolation by which PyTorch's models are used at another image size.

Where a published folder shows its model images of another size than its position embeddings are
for, as those of DINOv2 do (518 and 224 pixels), Transformers interpolates them so each time.
"""

import math

import numpy as np

from vit_jax.models.base import Grid


def interpolate(positions: np.ndarray, first: int, grid: Grid, *, antialias: bool) -> np.ndarray:
    """Interpolates position embeddings as `torch.nn.functional.interpolate(mode="bicubic")`.

    Args:
        positions: [1, tokens, features] float32, those of a square of patches last.
        first: how many come before, which stay.
        grid: the new rows and columns of patches.
        antialias: whether the kernel widens where the grid shrinks. The kernels differ otherwise,
            too: with it Keys' parameter is -0.5, as in PIL, without it -0.75.

    Returns:
        [1, first + rows * columns, features] float32.
    """
    old_side = math.isqrt(positions.shape[1] - first)
    rows, columns = ((_antialiased if antialias else _plain)(old_side, new) for new in grid)
    square = positions[0, first:].reshape(old_side, old_side, -1).astype(np.float64)
    resized = np.einsum("ri,cj,ijd->rcd", rows, columns, square, optimize=True)
    patches = resized.reshape(1, math.prod(grid), -1).astype(np.float32)
    return np.concatenate([positions[:, :first], patches], axis=1)


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _plain(old: int, new: int) -> np.ndarray:
    """The weights [new, old] without antialiasing: beyond the edge stands the value at the edge."""
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        source = np.floor(centers) + tap
        within = np.clip(source, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), within), _keys(centers - source, -0.75))
    return weights


def _antialiased(old: int, new: int) -> np.ndarray:
    """The weights [new, old] with antialiasing: what lies beyond the edge is left out."""
    scale = max(old / new, 1.0)
    centers = (np.arange(new) + 0.5) * old / new
    distances = (np.arange(old) + 0.5 - centers[:, None]) / scale
    weights = _keys(distances, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)
