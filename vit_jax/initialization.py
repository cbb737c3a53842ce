"""The parameters that a run begins with: its own, or those of `init_from`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from vit_jax.checkpoints.pretrained import Pretrained, fold_normalization, grid_of, load_pretrained
from vit_jax.checkpoints.transfer import (
    Row,
    input_kernel,
    print_report,
    removed_head,
    transfer,
    with_head,
)
from vit_jax.config import left_to_weights, take_from_weights
from vit_jax.config_migration import ADDED_MODEL_KEYS
from vit_jax.data import classes
from vit_jax.errors import UserError
from vit_jax.models import family_of, prediction_fields
from vit_jax.models.base import without_list
from vit_jax.models.detection import HEAD as DETECTION_HEAD
from vit_jax.models.segmentation import HEAD
from vit_jax.preparation import Prepared
from vit_jax.program import adapt, create_objective
from vit_jax.recipes import name_of, sizes_of
from vit_jax.state import Params, TrainState, create_state, init_params
from vit_jax.terminal import say

# Of what predictions depend on the weights decide all but what goes with the head.
_OF_THE_HEAD = {"classifier", "distillation_token", "num_classes", "representation_size"}


class Head(NamedTuple):
    """The head of weights, of which a run may keep what knows its classes.

    Attributes:
        params: by flat names, classes along the last axis.
        class_names: in the order of that axis.
        source: of the weights.
    """

    params: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    source: str


class Weights(NamedTuple):
    """Pretrained parameters, fitted to the model of a run but for its head.

    Attributes:
        params: for images in [-1, 1]; what they do not have is 0.
        report: what became of each parameter, see `transfer`.
        head: that the model may keep; None if the config says never, or there is none.
    """

    params: Params
    report: list[Row]
    head: Head | None = None


def read_weights(config: ConfigDict) -> tuple[ConfigDict, Weights]:
    """Reads the weights of init_from, before a data set is opened or anything compiled.

    Returns:
        The config with what it leaves to its weights, and these.

    Raises:
        UserError: the weights cannot be read or are of another model.
    """
    pretrained = load_pretrained(config.init_from)
    _check_model(config.model, pretrained)
    filled = take_from_weights(config, pretrained.model)
    weights = {**fold_normalization(pretrained), **pretrained.masked}
    if pretrained.segmentation is not None:
        weights[HEAD] = pretrained.segmentation.params
    if pretrained.detection is not None:
        weights[DETECTION_HEAD] = pretrained.detection.params
    weights = _for_channels(weights, pretrained, config.dataset.channels)
    # Only the data set tells how many classes the head has, and weights do not fill the head.
    module, *_ = create_objective(filled, num_classes=1)
    found = flatten_dict(weights, sep="/")

    def is_resized(name: str, shape: tuple[int, ...]) -> bool:
        return name in found and np.shape(found[name]) != shape

    params, report = transfer(
        _initialize(module, config, is_resized),
        weights,
        pretrained_grid=grid_of(module, pretrained.preprocessing.image_size),
        grid=grid_of(module, config.dataset.image_size),
    )
    fitted = Weights(params, report, _head(config, pretrained, report))
    if left := left_to_weights(config):
        told = {key: filled.model[key] for key in left}
        # Parts that most models do not have are told of those that have them.
        told = {key: x for key, x in told.items() if x != ADDED_MODEL_KEYS.get(key)}
        values = ", ".join(f"{key} {x}" for key, x in told.items())
        say(f"as {pretrained.source} has it: {values}")
    return filled, fitted


def _for_channels(params: Params, pretrained: Pretrained, channels: int) -> Params:
    """The parameters for images of so many channels; tells of it where they were of others."""
    found = pretrained.preprocessing.channels
    if channels == found:
        return params
    if found != 3:
        raise UserError(
            f"dataset.channels is {channels} but {pretrained.source} was trained with {found}: set "
            f"--config.dataset.channels={found}, only weights of RGB are for other channels too"
        )
    stem = family_of(pretrained.model["architecture"]).stem
    flat = flatten_dict(params, sep="/")
    flat[stem] = input_kernel(flat[stem], channels)
    change = (
        "summed to 1" if channels == 1 else f"repeated to {channels} and scaled by 3/{channels}"
    )
    say(f"the RGB channels of {stem} of {pretrained.source} are {change}")
    return unflatten_dict(flat, sep="/")


def _head(config: ConfigDict, pretrained: Pretrained, report: list[Row]) -> Head | None:
    if config.keep_head == "never" or config.objective != "classification":
        return None
    names, source = pretrained.class_names, pretrained.source
    if names is None or pretrained.has_untrained_head:
        say(f"the head is new: {source} has none whose classes are known by name")
        return None
    params = removed_head(report, pretrained.params, len(names))
    if not params:
        say(f"the head is new: that of {source} is behind another pooling or a hidden layer")
        return None
    return Head(params, tuple(names), source)


def _check_model(model: ConfigDict, pretrained: Pretrained) -> None:
    _check_size(model, pretrained)
    for key in sorted(prediction_fields(model.to_dict()).keys() - _OF_THE_HEAD):
        wanted, found = (without_list(x.get(key)) for x in (model, pretrained.model))
        if wanted is not None and wanted != found:
            known = f"--config.model.{key}={found}" if key != "architecture" else "its own config"
            raise UserError(
                f"model.{key} is {wanted} but {pretrained.source} was trained with {found}: "
                f"set {known}"
            )


def _check_size(model: ConfigDict, pretrained: Pretrained) -> None:
    """Refuses weights of another size by the name of their model, where it has one."""
    named = name_of(pretrained.model)
    if (
        named is None
        or sum(without_list(model.get(key)) != x for key, x in sizes_of(named).items()) < 2
    ):
        return
    of_config = name_of(model.to_dict())
    raise UserError(
        f"{pretrained.source} is a {named} but the config's model is "
        f"{f'a {of_config}' if of_config else 'of other sizes'}: use --config vit:{named},..."
    )


def initial_state(prepared: Prepared, abstract: TrainState, weights: Weights | None) -> TrainState:
    """The state before the first step; prints what became of each parameter of weights.

    Args:
        prepared: the run.
        abstract: every array of the state as a `jax.ShapeDtypeStruct` with its sharding.
        weights: to begin with; None for a model's own initialization.
    """
    config, params = prepared.config, None
    if weights is None:
        params = _initialize(prepared.model, config)
    else:
        head = _kept_head(prepared, weights.head)
        report = with_head(weights.report, head)
        new = {row.name for row in report if row.action == "new"}
        fresh = _initialize(prepared.model, config, lambda name, _: name in new)
        params = _replace(fresh, weights.params, new, head)
        shapes = {name: np.shape(x) for name, x in flatten_dict(params, sep="/").items()}
        if jax.process_index() == 0:
            print_report(
                [
                    row._replace(shape=shapes[row.name]) if row.action == "new" else row
                    for row in report
                ]
            )
    create = functools.partial(
        create_state, optimizer=prepared.optimizer, seed=config.seed, average=config.ema_decay > 0
    )
    params = jax.tree.map(np.asarray, adapt(config, params))
    sharding = jax.tree.map(lambda x: x.sharding, abstract)
    placed = jax.tree.map(_place, params, sharding.params)
    return jax.jit(create, out_shardings=sharding)(placed)


def _kept_head(prepared: Prepared, head: Head | None) -> dict[str, np.ndarray]:
    """The part of a head for the classes of a run, in their order; empty if it lacks one."""
    names = prepared.class_names
    if head is None or names is None:
        return {}
    if (num_classes := prepared.model.config.num_classes) != len(names):
        say(f"the head is new: it has {num_classes} classes, and the data {len(names)}")
        return {}
    labels = classes.match(len(head.class_names), head.class_names, names)
    if labels is None:
        say(f"the head is new: not all classes of the data are among those of {head.source}")
        return {}
    say(f"the head is kept: {len(labels)} of the {len(head.class_names)} classes of {head.source}")
    return {name: array[..., list(labels)] for name, array in head.params.items()}


def _replace(fresh: Params, weights: Params, new: set[str], head: dict[str, np.ndarray]) -> Params:
    """The fresh parameters that are new, those of the head, and all others of the weights."""
    flat, loaded = flatten_dict(fresh, sep="/"), flatten_dict(weights, sep="/") | head
    return unflatten_dict({k: x if k in new else loaded[k] for k, x in flat.items()}, sep="/")


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array that every process has whole on the devices of all."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _initialize(
    model: nn.Module,
    config: ConfigDict,
    is_wanted: Callable[[str, tuple[int, ...]], bool] = lambda name, shape: True,  # noqa: ARG005
) -> Params:
    """Parameters as `init_params` makes them, as arrays of the host; those not wanted are 0.

    Compiled as a whole, the random numbers of each layer are compiled anew, which takes a CPU ten
    times as long as all that is done here. Operation by operation, each is compiled once a shape,
    and what is not needed (the forward pass, and what weights replace) is not computed at all.

    Args:
        model: of the run.
        config: of the run.
        is_wanted: of a parameter's name and shape.
    """
    size, channels = config.dataset.image_size, config.dataset.channels
    init = functools.partial(
        init_params, model, seed=config.seed, image_size=size, channels=channels
    )
    traced, shapes = jax.make_jaxpr(init, return_shape=True)()
    flat = flatten_dict(shapes, sep="/")
    wanted = [is_wanted(name, x.shape) for name, x in flat.items()]
    jaxpr, _ = dce_jaxpr(traced.jaxpr, wanted)
    computed = iter(jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))())
    params = {
        name: np.asarray(next(computed))
        if keep
        else np.broadcast_to(np.zeros((), x.dtype), x.shape)
        for keep, (name, x) in zip(wanted, flat.items(), strict=True)
    }
    return unflatten_dict(params, sep="/")
