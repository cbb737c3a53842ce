"""The parameters that a run begins with: its own, or those of `init_from`."""

from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_jax.checkpoints.pretrained import (
    Pretrained,
    fit_params,
    fold_normalization,
    load_pretrained,
)
from vit_jax.checkpoints.transfer import print_report, transfer
from vit_jax.config import left_to_weights, take_from_weights
from vit_jax.errors import UserError
from vit_jax.models import prediction_fields
from vit_jax.program import create_objective
from vit_jax.recipes import name_of, sizes_of
from vit_jax.reporting import say
from vit_jax.state import Params, TrainState, replace_params

# Of what predictions depend on the weights decide all but what goes with the head.
_OF_THE_HEAD = {"classifier", "num_classes", "representation_size"}


def read_weights(config: ConfigDict) -> tuple[ConfigDict, Params]:
    """Reads the weights of init_from, before a data set is opened or anything compiled.

    Returns:
        The config with what it leaves to its weights, and their parameters for images in [-1, 1].

    Raises:
        UserError: the weights cannot be read or are of another model.
    """
    pretrained = load_pretrained(config.init_from)
    _check_model(config.model, pretrained)
    filled = take_from_weights(config, pretrained.model)
    weights = {**fold_normalization(pretrained), **pretrained.masked}
    # Only the data set tells how many classes the head has, and weights do not fill the head.
    module, *_ = create_objective(filled, num_classes=1)
    fit_params(module, config.dataset.image_size, weights)
    if left := left_to_weights(config):
        values = ", ".join(f"{key} {filled.model[key]}" for key in left)
        say(f"as {pretrained.source} has it: {values}")
    return filled, weights


def _check_model(model: ConfigDict, pretrained: Pretrained) -> None:
    _check_size(model, pretrained)
    for key in sorted(prediction_fields(model.to_dict()).keys() - _OF_THE_HEAD):
        wanted, found = (_plain(x.get(key)) for x in (model, pretrained.model))
        if wanted is not None and wanted != found:
            known = f"--config.model.{key}={found}" if key != "architecture" else "its own config"
            raise UserError(
                f"model.{key} is {wanted} but {pretrained.source} was trained with {found}: "
                f"set {known}"
            )


def _check_size(model: ConfigDict, pretrained: Pretrained) -> None:
    """Refuses weights of another size by the name of their model, where it has one."""
    named = name_of(pretrained.model)
    if named is None or sum(_plain(model.get(key)) != x for key, x in sizes_of(named).items()) < 2:
        return
    of_config = name_of(model.to_dict())
    raise UserError(
        f"{pretrained.source} is a {named} but the config's model is "
        f"{f'a {of_config}' if of_config else 'of other sizes'}: use --config vit:{named},..."
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def initialize_from(weights: Params, state: TrainState) -> TrainState:
    """Puts weights into a fresh state and prints what became of each parameter."""
    fresh = multihost_utils.process_allgather(state.params, tiled=True)
    params, report = transfer(fresh, weights)
    if jax.process_index() == 0:
        print_report(report)
    return replace_params(state, params)
