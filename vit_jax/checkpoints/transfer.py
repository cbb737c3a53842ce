"""Puts pretrained parameters into a freshly initialized model (Sec. 3.2 of the paper)."""

import math
import re
from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError, shortlist

Grid = tuple[int, int]


class Row(NamedTuple):
    """What became of one parameter; the shape is the model's, or the file's if it was dropped."""

    name: str
    shape: tuple[int, ...]
    action: Literal["loaded", "resized", "dropped", "new"]


def transfer(
    init_params: dict[str, Any],
    pretrained_params: dict[str, Any],
    *,
    keep_head: bool = False,
    pretrained_grid: Grid | None = None,
    grid: Grid | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Replaces the parameters of a fresh model by pretrained ones.

    For fine-tuning the whole head of pre-training is removed: `head` stays as initialized (zero),
    `pre_logits` is dropped where the model has none. Position embeddings are interpolated to the
    model's grid, those of "2d" and of an AxialResNet's offsets each along its axis; those of
    "relative" are refused where it has another number of patches. Everything else must be the same
    in name and shape.

    The head of masked patch prediction is removed alike; its mask embedding goes on where the model
    has one, is dropped where it has none, and is new where the weights have none.

    A "gap" model has neither `cls` nor a class position. A "gap" model drops those of a "token"
    model; a "token" model keeps its initial ones where the weights have none.

    Args:
        init_params: of the fresh model, nested dicts of arrays.
        pretrained_params: nested dicts of arrays.
        keep_head: loads a finished model as it is, its head included.
        pretrained_grid: (rows, columns) of patches of the pretrained model, if they are no square.
        grid: (rows, columns) of patches of the model, if they are no square.

    Returns:
        The parameters as NumPy arrays in the tree and dtypes of `init_params`, and a row for every
        parameter of the model and every one dropped.

    Raises:
        UserError: parameters are missing, misshapen or left over; it lists them.
    """
    one_sided = {"cls", "mask_embedding"}
    removed = one_sided & (init_params.keys() ^ pretrained_params.keys())
    if not keep_head:
        removed |= {"head", "patch_head"} | ({"pre_logits"} - init_params.keys())
    init = flatten_dict(init_params, sep="/")
    old = {name: np.asarray(x) for name, x in flatten_dict(pretrained_params, sep="/").items()}
    new = {name for name in init if _part(name) in removed}
    dropped = {name for name in old if _part(name) in removed}

    found = {name: old[name] for name in old.keys() - dropped}
    actions = dict.fromkeys(init, "loaded") | dict.fromkeys(new, "new")
    has_class = "cls" in old, "cls" in init
    for name in init.keys() & found.keys():
        kind = name.split("/")[-1]
        if kind == "pos_embedding":
            grids = pretrained_grid, grid
            found[name] = _fit_positions(old[name], init[name], has_class, grids)
        elif kind in ("pos_embedding_x", "pos_embedding_y", "axial_embedding"):
            found[name] = _fit_axis(old[name], init[name])
        elif kind == "rel_embedding":
            _check_offsets(old[name], init[name])
        if found[name] is not old[name]:
            actions[name] = "resized"
    check_fit({name: init[name] for name in init.keys() - new}, found)

    found |= {name: init[name] for name in new}
    params = {name: np.asarray(found[name], init[name].dtype) for name in init}
    report = [Row(name, np.shape(params[name]), action) for name, action in actions.items()]
    report += [Row(name, np.shape(old[name]), "dropped") for name in sorted(dropped)]
    return unflatten_dict(params, sep="/"), report


def _part(name: str) -> str:
    """The part of the model that a parameter is of; a ResNet has all of them under `resnet`."""
    return name.removeprefix("resnet/").split("/")[0]


def check_fit(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Checks that parameters are those of a model.

    Args:
        wanted: arrays, or their shapes as `jax.ShapeDtypeStruct`, of the model; nested or flat.
        found: the arrays that should fill it.

    Raises:
        UserError: parameters are missing, misshapen or left over; it lists them.
    """
    wanted, found = (flatten_dict(tree, sep="/") for tree in (wanted, found))
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not in the model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {found[name].shape}, the model {np.shape(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != np.shape(wanted[name])
    ]
    if problems:
        raise UserError(
            f"the weights do not fit the model in {len(problems)} places: "
            f"{shortlist(sorted(problems))}; choose the model that they were made for"
        )


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


def print_report(report: list[Row]) -> None:
    """Prints the rows of `transfer`, a line each, parameters of equal layers in one line."""
    alike = Counter(
        row._replace(name=re.sub(r"(encoderblock_|\bblock|\bunit)\d+", r"\1*", row.name))
        for row in report
    )
    for (name, shape, action), count in alike.items():
        print(f"{action:8}{shape!s:22}{name}{f' x{count}' if count > 1 else ''}", flush=True)


def _fit_positions(
    old: np.ndarray,
    init: np.ndarray,
    has_class: tuple[bool, bool],
    grids: tuple[Grid | None, Grid | None],
) -> np.ndarray:
    """Returns `old` itself if nothing is to change or its shape has another mistake."""
    old_class, new_class = has_class
    same_tokens = old.shape == init.shape and old_class == new_class
    if old.ndim != 3 or old.shape[::2] != init.shape[::2] or (same_tokens and grids == (None,) * 2):
        return old
    old_grid = _grid(old.shape[1] - old_class, grids[0])
    new_grid = _grid(init.shape[1] - new_class, grids[1])
    if same_tokens and old_grid == new_grid:
        return old
    patches = old[0, int(old_class) :].reshape(*old_grid, -1)
    patches = resize_grid(patches, new_grid).reshape(1, math.prod(new_grid), -1)
    class_position = (old if old_class else init)[:, : int(new_class)]
    return np.concatenate([class_position, patches], axis=1)


def _fit_axis(old: np.ndarray, init: np.ndarray) -> np.ndarray:
    """Resizes embeddings [1, positions, features]; returns `old` where nothing changes."""
    if old.ndim != 3 or old.shape == init.shape or old.shape[::2] != init.shape[::2]:
        return old
    return resize_grid(old, (1, init.shape[1]))


def _check_offsets(old: np.ndarray, init: np.ndarray) -> None:
    """An offset in the sequence is a row and a column apart, and others in another grid."""
    if old.ndim == 3 and len(old) != len(init):
        before, now = ((len(x) + 1) // 2 for x in (old, init))
        raise UserError(
            f"relative position embeddings of {before} patches cannot be those of {now}: their "
            "offsets are in one dimension; use the image size of the pretrained model"
        )


def _grid(patches: int, grid: Grid | None) -> Grid:
    grid = grid or (math.isqrt(patches),) * 2
    if math.prod(grid) != patches:
        raise UserError(
            f"{patches} position embeddings are no grid of {grid[0]} x {grid[1]} patches: "
            "give the grid, rows and columns"
        )
    return grid


def _interpolation(old: int, new: int) -> np.ndarray:
    positions = np.linspace(0, old - 1, new)
    return np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(old)))
