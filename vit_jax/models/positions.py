"""The position embeddings of Section 3.1 and Appendix D.4, in Flax Linen.

Learned 1D embeddings, the paper's choice, have one for every token but registers. All others are
about patches, and the class token has none: at the stem it would only be added to a vector that is
learned itself.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.base import Grid, Resize, Resizer

Array = jax.Array

# Table 8: learned (1D: a vector per token), none, 2d (a learned vector of width D/2 per column and
# one per row, concatenated), relative (1D offsets in every attention), and, of later work, sincos2d
# (fixed sines and cosines of column and row).
POSITION_EMBEDDINGS = ("learned", "none", "2d", "relative", "sincos2d")
# Those that are added to the tokens: once before the first layer ("stem"), or before every layer,
# one of its own for each ("layers") or the same ("shared").
ADDED = ("learned", "2d", "sincos2d")
PLACEMENTS = ("stem", "layers", "shared")
_INIT = nn.initializers.normal(stddev=0.02)


def check_placement(position_embedding: str, placement: str) -> None:
    """Checks that position embeddings and their place go together.

    Raises:
        UserError: they do not.
    """
    if position_embedding not in ADDED and placement != "stem":
        raise UserError(
            f"position_placement {placement!r} is for embeddings that are added, which "
            f"{position_embedding!r} is not: use stem"
        )


class PositionEmbedding(nn.Module):
    """E_pos of Eq. 1: what is added to the tokens.

    Attributes:
        position_embedding: one of `ADDED`.
        grid: rows and columns of patches, which are ordered by rows.
        num_class_tokens: how many tokens precede them that learned embeddings are for, too.
        dtype: of the result.
        num_registers: how many tokens lie between these and the patches that have none.
    """

    position_embedding: str
    grid: Grid
    num_class_tokens: int
    dtype: Any = jnp.float32
    num_registers: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The embeddings for tokens x [batch, tokens, hidden_size], [1, tokens, hidden_size]."""
        if self.position_embedding == "learned":
            return self._learned(x.shape[1], x.shape[2])
        if self.position_embedding == "2d":
            patches = self._learned_2d(x.shape[-1])
        else:
            patches = jnp.asarray(sincos2d(self.grid, x.shape[-1]), self.dtype)
        prefix = self.num_class_tokens + self.num_registers
        return jnp.pad(patches[None], ((0, 0), (prefix, 0), (0, 0)))

    def _learned(self, tokens: int, hidden_size: int) -> Array:
        shape = (1, tokens - self.num_registers, hidden_size)
        embedding = self.param("pos_embedding", _INIT, shape).astype(self.dtype)
        if not self.num_registers:
            return embedding
        first = self.num_class_tokens
        last = first + self.num_registers
        # By padding, as the tokens are put before the patches: see `encoder.Encoder`.
        of_class = jnp.pad(embedding[:, :first], ((0, 0), (0, tokens - first), (0, 0)))
        return of_class + jnp.pad(embedding[:, first:], ((0, 0), (last, 0), (0, 0)))

    def _learned_2d(self, hidden_size: int) -> Array:
        rows, columns = self.grid
        x = self.param("pos_embedding_x", _INIT, (1, columns, hidden_size // 2))
        y = self.param("pos_embedding_y", _INIT, (1, rows, hidden_size // 2))
        x = jnp.broadcast_to(x, (rows, columns, hidden_size // 2))
        y = jnp.broadcast_to(y.swapaxes(0, 1), (rows, columns, hidden_size // 2))
        return jnp.concatenate([x, y], axis=-1).reshape(-1, hidden_size).astype(self.dtype)


def sincos2d(grid: tuple[int, int], hidden_size: int) -> np.ndarray:
    """The fixed embeddings of "Better plain ViT baselines" (Beyer et al., 2022, arXiv 2205.01580).

    Sine and cosine of the column, then of the row, each at hidden_size / 4 wavelengths from 2 pi to
    20,000 pi in geometric progression.

    Args:
        grid: rows and columns of patches.
        hidden_size: width D, a multiple of 4.

    Returns:
        [rows * columns, hidden_size] float32.
    """
    y, x = (axis.ravel() for axis in np.mgrid[: grid[0], : grid[1]])
    frequencies = 10_000.0 ** -np.linspace(0, 1, hidden_size // 4)
    x, y = np.outer(x, frequencies), np.outer(y, frequencies)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


class RelativePositionBias(nn.Module):
    """Relative embeddings of Appendix D.4: a second attention gives the first one's bias.

    Every offset p_q - p_k of two patches in the sequence has a learned embedding per head, which
    the content of the query meets as its key. Not in the paper: each layer has its own.
    """

    num_prefix_tokens: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, q: Array) -> Array:
        """Maps queries [..., heads, tokens, head_dim] to [..., heads, tokens, tokens].

        The queries are those of the first attention, scaled as there. Pairs with the class token,
        or others before the patches, get 0.
        """
        first = int(self.num_prefix_tokens)
        q = q[..., first:, :]
        *batch, heads, patches, head_dim = q.shape
        shape = (2 * patches - 1, heads, head_dim)
        # embedding[i] is that of the offset i - (patches - 1).
        embedding = self.param("rel_embedding", _INIT, shape).astype(self.dtype)
        keys = embedding[::-1].transpose(1, 2, 0)  # Column j of keys is the offset patches - 1 - j.
        bias = jnp.matmul(q, keys)  # [..., heads, patches, 2 * patches - 1]
        # Query i wants its columns from patches - 1 - i on. Rows that are one longer and read as
        # if they were not move by one each.
        others = ((0, 0),) * (q.ndim - 2)
        bias = jnp.pad(bias, (*others, (0, 0), (0, 1))).reshape(*batch, heads, -1)
        bias = bias[..., patches - 1 : patches - 1 + patches * (2 * patches - 1)]
        bias = bias.reshape(*batch, heads, patches, -1)[..., :patches]
        return jnp.pad(bias, (*others, (first, 0), (first, 0)))


def resize_grid(embeddings: np.ndarray, grid: Grid) -> np.ndarray:
    """Resizes embeddings [rows, columns, features] bilinearly to `grid`, the corners kept in place.

    This is what the official code uses `scipy.ndimage.zoom(order=1)` for, and equal to it but for
    the last row or column of some pairs of sides, 22 of those up to 40, such as 28 to 14: there
    SciPy's rounding puts the last sample beyond the edge, where it takes zeros.
    """
    rows, columns = (
        _interpolation(old, new) for old, new in zip(embeddings.shape[:2], grid, strict=True)
    )
    resized = np.einsum("ri,cj,ijd->rcd", rows, columns, embeddings, optimize=True)
    return resized.astype(embeddings.dtype)


def _interpolation(old: int, new: int) -> np.ndarray:
    positions = np.linspace(0, old - 1, new)
    return np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(old)))


def resize_axis(old: np.ndarray, fresh: np.ndarray, _: Resize) -> np.ndarray:
    """Fits embeddings [1, positions, features] of one axis."""
    if old.ndim != 3 or old.shape == fresh.shape or old.shape[::2] != fresh.shape[::2]:
        return old
    return resize_grid(old, (1, fresh.shape[1]))


def resize_tokens(old: np.ndarray, fresh: np.ndarray, resize: Resize) -> np.ndarray:
    """Fits learned embeddings [1, tokens, features]: those of the patches are interpolated.

    Those of the class and distillation token go on, are dropped, or are the fresh ones.

    Raises:
        UserError: the patches are not as many as the grid has, or no square.
    """
    old_prefix, new_prefix = resize.class_tokens
    same_tokens = old.shape == fresh.shape and old_prefix == new_prefix
    if old.ndim != 3 or old.shape[::2] != fresh.shape[::2]:
        return old
    if same_tokens and resize.grids == (None, None):
        return old
    old_grid = _grid(old.shape[1] - old_prefix, resize.grids[0])
    new_grid = _grid(fresh.shape[1] - new_prefix, resize.grids[1])
    if same_tokens and old_grid == new_grid:
        return old
    patches = old[0, old_prefix:].reshape(*old_grid, -1)
    patches = resize_grid(patches, new_grid).reshape(1, math.prod(new_grid), -1)
    kept = min(old_prefix, new_prefix)
    return np.concatenate([old[:, :kept], fresh[:, kept:new_prefix], patches], axis=1)


def _grid(patches: int, grid: Grid | None) -> Grid:
    side = math.isqrt(patches)
    grid = grid or (side, side)
    if math.prod(grid) != patches:
        raise UserError(
            f"{patches} position embeddings are no grid of {grid[0]} x {grid[1]} patches: "
            "give the grid, rows and columns"
        )
    return grid


def keep_offsets(old: np.ndarray, fresh: np.ndarray, resize: Resize) -> np.ndarray:
    """Refuses relative embeddings of another grid.

    An offset in the sequence is a row and a column apart, and others in another grid.

    Raises:
        UserError: the grids differ, or the numbers of patches of a row or column.
    """
    if old.ndim != 3:
        return old
    before, now = ((len(x) + 1) // 2 for x in (old, fresh))
    grids = resize.grids
    # Those along an axis, of axial models, are of a row or column alone.
    in_sequence = all(grid is not None and math.prod(grid) == before for grid in grids)
    if before != now or (in_sequence and grids[0] != grids[1]):
        raise UserError(
            f"relative position embeddings of {_patches(before, grids[0])} patches cannot be those "
            f"of {_patches(now, grids[1])}: their offsets are in one dimension; use the image size "
            "of the pretrained model"
        )
    return old


def _patches(count: int, grid: Grid | None) -> str:
    """A number of patches, in an oblong grid their rows and columns."""
    is_oblong = grid is not None and math.prod(grid) == count and grid[0] != grid[1]
    return f"{grid[0]} x {grid[1]}" if is_oblong else f"{count}"


RESIZERS: dict[str, Resizer] = {
    "pos_embedding": resize_tokens,
    "pos_embedding_x": resize_axis,
    "pos_embedding_y": resize_axis,
    "rel_embedding": keep_offsets,
}
