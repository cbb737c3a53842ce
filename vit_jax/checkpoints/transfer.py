"""Puts pretrained parameters into a freshly initialized model (Sec. 3.2 of the paper)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError, shortlist
from vit_jax.models import ARCHITECTURES
from vit_jax.models.base import Grid, Resize
from vit_jax.models.detection import HEAD as DETECTION_HEAD
from vit_jax.models.segmentation import HEAD
from vit_jax.models.vit import DISTILLATION_HEAD, POOLING, num_class_tokens
from vit_jax.printable import printable

Action = Literal["loaded", "resized", "matched", "dropped", "new"]


# Of masked patch prediction, segmentation and detection: their heads, and the mask embedding.
_OF_PATCHES = {"patch_head", "mask_embedding", HEAD, DETECTION_HEAD}


class Row(NamedTuple):
    """The outcome for one parameter; the shape is the model's, or the file's if it was dropped."""

    name: str
    shape: tuple[int, ...]
    action: Action


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
    `pre_logits` is dropped where the model has none. Position embeddings are fitted to the model's
    grid, see the `resizers` of `ModelConfig`. Everything else must be the same in name and shape.

    The heads of masked patch prediction, segmentation and detection are removed alike. The first's
    mask embedding goes on where the model has one, is dropped where it has none, and is new where
    the weights have none.

    A "gap" model has neither `cls` nor a class position. A "gap" model drops those of a "token"
    model; a "token" model keeps its initial ones where the weights have none. So it is with the
    attention pooling of a "map" model, with a distillation token, and with registers where one of
    the two has none.

    Args:
        init_params: of the fresh model, nested dicts of arrays.
        pretrained_params: nested dicts of arrays.
        keep_head: loads a finished model as it is, its head included.
        pretrained_grid: (rows, columns) of patches of the pretrained model; None for a square.
        grid: (rows, columns) of patches of the model; None for a square.

    Returns:
        The parameters as NumPy arrays in the tree and dtypes of `init_params`, and a row for every
        parameter of the model and every one dropped.

    Raises:
        UserError: parameters are missing, misshapen or left over; it lists them.
    """
    one_sided = {"cls", "dist", "register", "mask_embedding"}
    removed = one_sided & (init_params.keys() ^ pretrained_params.keys())
    if not keep_head:
        heads = {family.head for family in ARCHITECTURES.values()}
        heads |= {"patch_head", HEAD, DETECTION_HEAD, DISTILLATION_HEAD}
        removed |= heads | ({"pre_logits"} - init_params.keys())
        removed |= {POOLING} & (init_params.keys() ^ pretrained_params.keys())
    init = flatten_dict(init_params, sep="/")
    old = {name: np.asarray(x) for name, x in flatten_dict(pretrained_params, sep="/").items()}
    parts = tuple(f"{part}/" for part in removed)
    new = {name for name in init if f"{name}/".startswith(parts)}
    dropped = {name for name in old if f"{name}/".startswith(parts)}

    found = {name: old[name] for name in old.keys() - dropped}
    actions: dict[str, Action] = {name: "new" if name in new else "loaded" for name in init}
    class_tokens = num_class_tokens(old), num_class_tokens(init)
    resize = Resize(class_tokens, (pretrained_grid, grid))
    resizers = {k: x for family in ARCHITECTURES.values() for k, x in family.resizers.items()}
    for name in init.keys() & found.keys():
        if fit := resizers.get(name.split("/")[-1]):
            found[name] = fit(old[name], init[name], resize)
        if found[name] is not old[name]:
            actions[name] = "resized"
    check_fit({name: init[name] for name in init.keys() - new}, found)

    found |= {name: init[name] for name in new}
    params = {name: np.asarray(found[name], init[name].dtype) for name in init}
    report = [Row(name, np.shape(params[name]), action) for name, action in actions.items()]
    report += [Row(name, np.shape(old[name]), "dropped") for name in sorted(dropped)]
    return unflatten_dict(params, sep="/"), report


def removed_head(
    report: Sequence[Row], pretrained_params: dict[str, Any], num_classes: int
) -> dict[str, np.ndarray]:
    """The head that `transfer` has removed, where it would do for the model as it is.

    Args:
        report: of `transfer`.
        pretrained_params: likewise.
        num_classes: of the pretrained model.

    Returns:
        Arrays by their flat names, with classes along the last axis; empty where the head's input
        is another in the model: a hidden layer or a pooling came or went with it.
    """
    old = {name: np.asarray(x) for name, x in flatten_dict(pretrained_params, sep="/").items()}
    new = {row.name for row in report if row.action == "new"}
    dropped = {row.name for row in report if row.action == "dropped"}
    of_masked = {name for name in new ^ dropped if name.split("/")[0] in _OF_PATCHES}
    if (new ^ dropped) - of_masked:
        return {}
    return {name: old[name] for name in new & dropped if old[name].shape[-1:] == (num_classes,)}


def with_head(report: Sequence[Row], head: Mapping[str, np.ndarray]) -> list[Row]:
    """The rows of `transfer` where arrays of the head were kept after all, by their flat names."""
    rows = [row for row in report if not (row.name in head and row.action == "dropped")]
    return [
        row._replace(action="matched", shape=head[row.name].shape) if row.name in head else row
        for row in rows
    ]


def input_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The kernel on an RGB image as one on an image of another number of channels.

    timm's rule, `adapt_input_conv`: for one channel the sum of the three; for others their
    repetition, scaled by 3 / channels.

    Args:
        kernel: [height, width, 3, features].
        channels: not 3.

    Returns:
        [height, width, channels, features].
    """
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % 3] * np.float32(3 / channels)


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


def print_report(report: list[Row]) -> None:
    """Prints the rows of `transfer`, a line each, parameters of equal layers in one line."""
    alike = Counter(
        row._replace(name=re.sub(r"(encoderblock_|\bblock|\bunit)\d+", r"\1*", row.name))
        for row in report
    )
    for (name, shape, action), count in alike.items():
        times = f" x{count}" if count > 1 else ""
        print(printable(f"{action:8}{shape!s:22}{name}{times}"), flush=True)
