"""The program of a run: what a config trains, and its step as the compiler gets it.

No data set is opened and no device asked for, so that a step can be compiled for devices that are
described (see `vit_jax.plan`).
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vit_jax import lora
from vit_jax.analysis import flops
from vit_jax.config import check_teaching, left_to_weights, take_from_weights
from vit_jax.data.augmentation import parse_augment
from vit_jax.distillation import Distillation
from vit_jax.errors import UserError, brief
from vit_jax.image_size import sides
from vit_jax.mixing import Mix, create_mix
from vit_jax.models import (
    Model,
    create_model,
    describe,
    detection,
    masked,
    prediction_defaults,
    segmentation,
)
from vit_jax.multipliers import multipliers, parse_multipliers
from vit_jax.sharding import AnyMesh, batch_sharding, gathering, state_sharding
from vit_jax.state import Params, TrainState, create_optimizer, init_params, init_train_state
from vit_jax.steps import (
    Batch,
    Metrics,
    Objective,
    classification,
    masked_patches,
    train_step,
    weigh_objects,
)
from vit_jax.steps import detection as detection_objective
from vit_jax.steps import segmentation as segmentation_objective
from vit_jax.teacher import Teacher


def check_batch_size(config: ConfigDict, devices: int) -> None:
    """Raises a UserError if a batch does not divide evenly over the devices and parts."""
    parts = devices * config.accumulate_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} does not divide evenly over {devices} devices x "
            f"{config.accumulate_steps} accumulate_steps: use a multiple of {parts}"
        )


def create_objective(
    config: ConfigDict,
    num_classes: int,
    class_weights: Callable[[int], np.ndarray] | None = None,
) -> tuple[Model, Objective, int]:
    """The model, what it is trained for, and the multiply-adds of one image.

    Args:
        config: of a run.
        num_classes: of its data set.
        class_weights: float32 weights of the model's classes, from their number; None for none.

    Raises:
        UserError: the model has fewer classes than the data set, or as `check_teaching` does.
    """
    size, channels = config.dataset.image_size, config.dataset.channels
    if config.objective == "masked_patches":
        rate, target = config.masking.rate, config.masking.target
        model = masked.predictor(create_model(config.model), target)
        multiply_adds = masked.multiply_adds(model, size, rate)
        return model, masked_patches(model, rate, target), multiply_adds
    if 0 < config.model.num_classes < num_classes:
        raise UserError(
            f"model.num_classes is {config.model.num_classes} but {config.dataset.name} has "
            f"{num_classes} classes: use at least as many, or 0 to take the data set's"
        )
    num_classes = config.model.num_classes or num_classes
    if config.objective == "segmentation":
        check_teaching(config)
        model = segmentation.segmenter(create_model(config.model, num_classes=num_classes))
        multiply_adds = segmentation.multiply_adds(model, size, channels)
        return model, segmentation_objective(model), multiply_adds
    if config.objective == "detection":
        check_teaching(config)
        trunk = create_model(config.model, num_classes=num_classes)
        model = detection.detector(trunk, head_shape(config))
        return model, detection_objective(model), detection.multiply_adds(model, size, channels)
    model = create_model(config.model, num_classes=num_classes)
    check_teaching(config)  # What came from weights is known now.
    teaching, distillation = config.distillation, None
    if teaching.teacher:
        distillation = Distillation(teaching.kind, teaching.alpha, teaching.temperature)
    weights = None if class_weights is None else class_weights(num_classes)
    objective = classification(
        model, config.loss, config.label_smoothing, distillation=distillation, class_weights=weights
    )
    return model, objective, flops.multiply_adds(config.model, size, num_classes, channels)


def head_shape(config: ConfigDict) -> detection.HeadShape:
    """The size of the head of a run of detection."""
    settings = config.detection
    return detection.HeadShape(settings.width, settings.layers, settings.upsample)


# What weights may have in place of a model's defaults, with parameters that these have not.
_OTHER_PARAMETERS = (
    {"classifier": "map"},
    {"position_embedding": "relative"},
    {"position_embedding": "2d"},
    {"position_placement": "layers"},
    {"position_embedding": "2d", "position_placement": "layers"},
    {"layer_scale": 1.0},
    {"num_registers": 1},
    {"mlp": "swiglu"},
    {"distillation_token": True},
)


def check_multipliers(config: ConfigDict) -> None:
    """Checks the learning rates of the optimizer by the names of the model's parameters.

    What the config leaves to its weights may be anything: whatever passes with some weights does.

    Raises:
        UserError: as `multipliers.multipliers` does.
    """
    text, decay = lr_multipliers(config), config.optimizer.layer_decay
    if not text and decay == 1:
        return
    defaults = prediction_defaults(config.model.architecture)
    found = flatten_dict(_parameters(config, defaults))
    if config.lora.rank:
        _check_frozen(config, ["/".join(path) for path in found])
    try:
        multipliers(unflatten_dict(found), text, decay)
        return
    except UserError:
        if not left_to_weights(config):
            raise
    for other in _OTHER_PARAMETERS:
        with contextlib.suppress(UserError):  # Not every model may have it.
            found |= flatten_dict(_parameters(config, defaults | other))
    multipliers(unflatten_dict(found), text, decay)


def _check_frozen(config: ConfigDict, names: Sequence[str]) -> None:
    """Refuses learning rates under which LoRA would freeze none of the model's parameters."""
    (frozen,) = parse_multipliers(lora.FROZEN)
    given = [each.pattern for each in parse_multipliers(config.optimizer.lr_multipliers)]
    held = filter(frozen.pattern.fullmatch, names)
    if all(any(pattern.fullmatch(name) for pattern in given) for name in held):
        raise UserError(
            f"optimizer.lr_multipliers {brief(config.optimizer.lr_multipliers)} gives every "
            "parameter a rate, so LoRA freezes nothing: name fewer, or set --config.lora.rank=0"
        )


def _parameters(config: ConfigDict, of_weights: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the parameters; only the data set tells the number of classes."""
    model, *_ = create_objective(take_from_weights(config, of_weights), num_classes=1)
    size, channels = config.dataset.image_size, config.dataset.channels
    init = functools.partial(init_params, model, seed=0, image_size=size, channels=channels)
    return jax.eval_shape(lambda: adapt(config, init()))


def lr_multipliers(config: ConfigDict) -> str:
    """The learning rates of a run by parameter, see `multipliers`: under LoRA most are 0."""
    text = config.optimizer.lr_multipliers
    if not config.lora.rank:
        return text
    return ",".join(filter(None, (text.rstrip(", "), lora.FROZEN)))


def adapt(config: ConfigDict, params: Params) -> Params:
    """The parameters that a run trains: those of its model and, under LoRA, the change of some."""
    rank, targets = config.lora.rank, config.lora.targets
    if not rank:
        return params
    return lora.with_adapters(params, rank=rank, targets=targets, seed=config.seed)


def run_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of a run."""
    settings = {**config.optimizer, "lr_multipliers": lr_multipliers(config)}
    return create_optimizer(settings, schedule)


def run_objective(
    config: ConfigDict, objective: Objective, model: nn.Module, mesh: AnyMesh
) -> Objective:
    """The objective of the parameters that a run trains, as they lie on a mesh.

    Args:
        config: of the run.
        objective: of the model's own parameters.
        model: of the run.
        mesh: from `sharding.make_mesh`.
    """
    placed = gathering(objective, mesh, model.config.compute_dtype)
    return lora.merging(placed, config.lora.alpha) if config.lora.rank else placed


def state_initializer(
    config: ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[[], TrainState]:
    """Returns a function that makes the state with which a run begins."""
    return functools.partial(
        init_train_state,
        model,
        optimizer,
        seed=config.seed,
        image_size=config.dataset.image_size,
        channels=config.dataset.channels,
        average=config.ema_decay > 0,
        adapt=functools.partial(adapt, config),
    )


def abstract_state(init: Callable[[], TrainState], mesh: AnyMesh) -> TrainState:
    """The shapes, dtypes and shardings of the state that `init` makes, and no arrays."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )


def abstract_batch(
    config: ConfigDict, mesh: AnyMesh, several_labels: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of what a step reads, masks or boxes where they are learned.

    Args:
        config: of the run.
        mesh: from `sharding.make_mesh`.
        several_labels: the classes of the data set where an image has any number of labels; 0 where
            it has one.
    """
    rows, (height, width) = batch_sharding(mesh), sides(config.dataset.image_size)
    images = (config.batch_size, height, width, config.dataset.channels)
    labels, dtype = (config.batch_size,), jnp.int32
    if several_labels:
        labels, dtype = (config.batch_size, several_labels), jnp.float32
    elif config.objective == "segmentation":
        labels, dtype = (config.batch_size, height, width), jnp.uint8
    elif config.objective == "detection":
        labels, dtype = (config.batch_size, config.detection.most_boxes, 5), jnp.float32
    return {
        "image": jax.ShapeDtypeStruct(images, jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct(labels, dtype, sharding=rows),
    }


def batch_mix(config: ConfigDict, num_classes: int) -> Mix | None:
    """The change that a step makes to its batch on the device, see `mixing.create_mix`."""
    augmentation = parse_augment(config.augment)
    return create_mix(
        mixup_alpha=augmentation.mixup_alpha,
        cutmix_alpha=augmentation.cutmix_alpha,
        erase_probability=augmentation.erase_probability,
        num_classes=num_classes,
    )


def batch_weights(config: ConfigDict) -> Callable[[Batch], Batch] | None:
    """The addition of a step to its batch before that is split, see `steps.train_step`."""
    if config.objective != "detection":
        return None
    grid = detection.grid_of_cells(
        describe(config.model), config.dataset.image_size, config.detection.upsample
    )
    return functools.partial(weigh_objects, grid=grid)


def lower_train_step(
    config: ConfigDict,
    mesh: AnyMesh,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    num_classes: int,
    state: TrainState,
    several_labels: int = 0,
    teacher: Teacher | None = None,
) -> jax.stages.Lowered:
    """Traces `steps.train_step` for the devices of a mesh.

    Args:
        config: of the run.
        mesh: from `sharding.make_mesh`.
        objective: of parameters as `state` has them, see `run_objective`.
        optimizer: of the run.
        num_classes: of the model.
        state: arrays or their shapes, in the shardings that it keeps; each step takes the memory of
            the one before.
        several_labels: as in `abstract_batch`.
        teacher: whose parameters the step takes as well, after the batch.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    update = functools.partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
        mix=batch_mix(config, num_classes),
        lr_multipliers=lr_multipliers(config),
        weigh=batch_weights(config),
    )

    def taught(state: TrainState, batch: Batch, params: Any) -> tuple[TrainState, Metrics]:
        logits = functools.partial(cast(Teacher, teacher).logits, params)
        return update(state, batch, teacher=logits)

    inputs = [state, abstract_batch(config, mesh, several_labels)]
    shardings = [places, batch_sharding(mesh)]
    if teacher is not None:
        inputs.append(teacher.params)
        shardings.append(jax.tree.map(lambda x: x.sharding, teacher.params))
    step: Any = jax.jit(
        update if teacher is None else taught,
        in_shardings=tuple(shardings),
        out_shardings=(places, None),
        donate_argnums=0,
    )
    return step.lower(*inputs)
