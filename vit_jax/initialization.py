"""The parameters that a run begins with: its own, or those of `init_from`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_jax.checkpoints.pretrained import Pretrained, fold_normalization, load_pretrained
from vit_jax.checkpoints.transfer import print_report, transfer
from vit_jax.config import left_to_weights, take_from_weights
from vit_jax.errors import UserError
from vit_jax.preparation import create_objective
from vit_jax.reporting import say
from vit_jax.state import Params, TrainState, replace_params

# What the weights of init_from decide: a model that differs in one of these is another.
FIXED_BY_WEIGHTS = (
    "architecture",
    "patch_size",
    "hidden_size",
    "num_layers",
    "mlp_dim",
    "num_heads",
    "resnet_layers",
    "width_factor",
    "gelu",
    "layer_norm_epsilon",
    "group_norm_epsilon",
    "position_embedding",
    "position_placement",
)


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
    _check_fit(filled, weights)
    if left := left_to_weights(config):
        values = ", ".join(f"{key} {filled.model[key]}" for key in left)
        say(f"as {pretrained.source} has it: {values}")
    return filled, weights


def _check_model(model: ConfigDict, pretrained: Pretrained) -> None:
    for key in FIXED_BY_WEIGHTS:
        wanted, found = (_plain(x.get(key)) for x in (model, pretrained.model))
        if wanted is not None and wanted != found:
            known = f"--config.model.{key}={found}" if key != "architecture" else "its own config"
            raise UserError(
                f"model.{key} is {wanted} but {pretrained.source} was trained with {found}: "
                f"set {known}"
            )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_fit(config: ConfigDict, weights: Params) -> None:
    # Only the data set tells how many classes the head has, and weights do not fill the head.
    model, *_ = create_objective(config, num_classes=1)
    size = config.dataset.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    transfer(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), weights)


def initialize_from(weights: Params, state: TrainState) -> TrainState:
    """Puts weights into a fresh state and prints what became of each parameter."""
    fresh = multihost_utils.process_allgather(state.params, tiled=True)
    params, report = transfer(fresh, weights)
    if jax.process_index() == 0:
        print_report(report)
    return replace_params(state, params)
