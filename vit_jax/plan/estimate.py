"""Estimates of a run from its config, without a compiler: bytes, arithmetic, lower bounds."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from vit_jax import program
from vit_jax.analysis import flops
from vit_jax.config import count_steps
from vit_jax.data.subset import parse_subset
from vit_jax.errors import UserError
from vit_jax.plan.accelerators import Target
from vit_jax.recipes import table_name
from vit_jax.sharding import AXES, AnyMesh, make_mesh, mesh_shape
from vit_jax.state import TrainState
from vit_jax.steps import Objective

# Classes and images of train. Of ImageNet those that TFDS counts; JFT as in Section 4.1; the others
# as in Section 4.1 and their own papers.
DATASETS = {
    "imagenet2012": (1_000, 1_281_167),
    "imagenet21k": (21_843, 14_197_122),
    "jft": (18_291, 303_000_000),
    "cifar10": (10, 50_000),
    "cifar100": (100, 50_000),
    "digits": (10, 1_442),
}


class Described(NamedTuple):
    """A run on devices that may be only described.

    Attributes:
        config: of the run.
        mesh: the devices.
        objective: of split parameters.
        optimizer: its learning rate is constant: no shape or time depends on it.
        num_classes: of the model.
        state: shapes and shardings.
        train_flops: to train on one image.
    """

    config: ConfigDict
    mesh: AnyMesh
    objective: Objective
    optimizer: optax.GradientTransformation
    num_classes: int
    state: TrainState
    train_flops: int

    def lower(self) -> jax.stages.Lowered:
        """Traces the train step."""
        return program.lower_train_step(
            self.config,
            self.mesh,
            self.objective,
            self.optimizer,
            self.num_classes,
            self.state,
        )

    def memory(self) -> dict[str, int]:
        """The bytes that a device keeps from step to step, and those of its part of a batch."""
        state = self.state
        average = 0 if state.ema_params is None else _bytes_a_device(state.ema_params)
        return {
            "parameters": _bytes_a_device(state.params),
            "optimizer": _bytes_a_device(state.opt_state),
            "average": average,
            "batch": _bytes_a_device(program.abstract_batch(self.config, self.mesh)),
        }


def describe(
    config: ConfigDict, num_classes: int, devices: int | Sequence[jax.Device]
) -> Described:
    """Builds what a run consists of; a teacher is left out.

    Args:
        config: checked.
        num_classes: of its data set.
        devices: themselves, or their number, with which only shapes are told.

    Raises:
        UserError: the config does not go with so many devices.
    """
    if isinstance(devices, int):
        mesh = AbstractMesh(mesh_shape(config.sharding, devices), AXES)
    else:
        mesh = make_mesh(config.sharding, devices)
    config = config.copy_and_resolve_references()
    config.distillation.teacher = ""
    program.check_batch_size(config, mesh.size)
    model, objective, multiply_adds = program.create_objective(config, num_classes)
    optimizer = program.run_optimizer(config, optax.constant_schedule(1e-3))
    init = program.state_initializer(config, model, optimizer)
    return Described(
        config=config,
        mesh=mesh,
        objective=program.run_objective(config, objective, model, mesh),
        optimizer=optimizer,
        num_classes=model.config.num_classes,
        state=program.abstract_state(init, mesh),
        train_flops=flops.train_flops(multiply_adds),
    )


def _bytes_a_device(tree: Any) -> int:
    """Counts the bytes of one device's parts of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def dataset_size(config: ConfigDict, classes: int, images: int) -> tuple[int, int]:
    """The classes and training images of a run.

    Args:
        config: of the run.
        classes: that the user says, 0 if he does not.
        images: likewise; to train on.

    Raises:
        UserError: neither the user nor `DATASETS` tells them, and they are needed.
    """
    known = DATASETS.get(table_name(config.dataset.name), (0, 0))
    # What is known are the classes of images, not those of their pixels or objects.
    of_images = known[0] if config.objective not in ("segmentation", "detection") else 0
    classes = classes or config.model.num_classes or of_images
    images = images or _images_to_train_on(config.dataset, known[1])
    if config.objective != "masked_patches" and not classes:
        raise UserError(f"the classes of {config.dataset.name} are not known here: add --classes N")
    if "epoch" in config.duration and not images:
        raise UserError(f"the images of {config.dataset.name} are not known here: add --images N")
    return classes, images


def _images_to_train_on(data: ConfigDict, known: int) -> int:
    """The images of the split that is trained on, and of its subset; 0 if it is not known."""
    # They take seconds to import, and nothing is opened.
    from vit_jax.data import datasets, splits

    default, _ = datasets.default_splits(data.name, development=data.development)
    try:
        parts = splits.slices(data.train_split or default, {"train": known})
    except (ValueError, LookupError):  # Of other splits, or of none that is known.
        return 0
    images = sum(len(range(known)[part]) for _, part in parts)
    wanted = parse_subset(data.subset) if data.subset else images
    return wanted if isinstance(wanted, int) else round(wanted * images)


class Bounds(NamedTuple):
    """The least seconds that a step takes on a target, by what would have to be the bottleneck.

    Attributes:
        arithmetic: the model's products at the peak of 16-bit arithmetic.
        memory: the state and its gradients read and written once, the batch read; activations are
            left out.
        links: every split parameter gathered and its gradient summed, every whole one's gradient
            summed over the devices.
    """

    arithmetic: float | None
    memory: float | None
    links: float | None

    @property
    def least(self) -> float | None:
        """The longest of them."""
        return max((x for x in self if x is not None), default=None)


def bounds(described: Described, target: Target) -> Bounds:
    """The roofline of a step (Williams et al., 2009)."""
    accelerator, devices = target.accelerator, target.devices
    peak = flops.peak_flops(accelerator.kind)
    work = described.train_flops * described.config.batch_size / devices
    kept = described.memory()
    state = kept["parameters"] + kept["optimizer"] + kept["average"]
    traffic = 2 * state + 2 * kept["parameters"] + kept["batch"]
    return Bounds(
        arithmetic=work / peak if peak else None,
        memory=traffic / accelerator.bandwidth if accelerator.bandwidth else None,
        links=_sent(described) / accelerator.links if accelerator.links else None,
    )


def _sent(described: Described) -> float:
    """Counts the bytes that a device sends in a step, in rings."""
    data, fsdp = (described.mesh.shape[axis] for axis in AXES)
    width = 2 if described.config.model.dtype == "bfloat16" else 4
    total = 0.0
    for x in jax.tree.leaves(described.state.params):
        size = math.prod(x.shape) * width
        if "fsdp" in x.sharding.spec:
            total += 2 * size * (fsdp - 1) / fsdp  # Gathered, and its gradient summed.
            total += 2 * size / fsdp * (data - 1) / data
        else:
            total += 2 * size * (data * fsdp - 1) / (data * fsdp)
    return total


def count_images(config: ConfigDict, images: int) -> tuple[int, int]:
    """The steps of a run, and the images that it goes through."""
    steps = count_steps(config.duration, images, config.batch_size)
    return steps, steps * config.batch_size
