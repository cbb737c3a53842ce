"""The parts of a run, built from a config: data sets, model, objective, optimizer, evaluators."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from vit_jax.config import count_steps
from vit_jax.data import datasets, holdout, pipeline
from vit_jax.data.augmentation import parse_augment
from vit_jax.data.class_weights import balanced_weights
from vit_jax.data.order import Order, create_order
from vit_jax.data.protocols import evaluation
from vit_jax.data.subset import take_subset
from vit_jax.errors import UserError
from vit_jax.evaluation.registry import Evaluator, create_evaluators
from vit_jax.evaluation.watched import Watched
from vit_jax.models import create_model
from vit_jax.program import (
    check_batch_size,
    create_objective,
    lower_train_step,
    run_objective,
    run_optimizer,
)
from vit_jax.sharding import Mesh, make_mesh
from vit_jax.state import SCHEDULE_LENGTHS, TrainState, create_schedule
from vit_jax.steps import Metrics, Objective
from vit_jax.teacher import Teacher, load_teacher
from vit_jax.terminal import say
from vit_jax.xla_flags import compiler_options


class Prepared(NamedTuple):
    """All that is fixed for the length of a run.

    Attributes:
        config: of the run.
        workdir: takes what the run writes.
        mesh: all devices.
        train_source: the images to train on.
        order: of these.
        eval_source: those of evaluation.
        model: maps images to logits, or to predicted patches, logits of pixels or cells.
        objective: what it is trained for.
        multiply_adds: of the forward pass of one image.
        schedule: from the step to the learning rate.
        optimizer: follows the schedule.
        evaluators: that are on, the deciding one first.
        total_steps: of the run.
        log_every: steps from one log line to the next; 0 is at the end alone.
        checkpoint_every: steps from one checkpoint to the next, likewise.
        teacher: that the model learns from, if there is one.
    """

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    train_source: datasets.Source
    order: Order
    eval_source: datasets.Source
    model: nn.Module
    objective: Objective
    multiply_adds: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    evaluators: list[Evaluator]
    total_steps: int
    log_every: int
    checkpoint_every: int
    teacher: Teacher | None = None

    @property
    def mask_names(self) -> list[str] | None:
        """The names of the classes of pixels; None where no masks are predicted."""
        return list(self.train_source.class_names) if self.train_source.has_masks else None

    @property
    def box_names(self) -> list[str] | None:
        """The names of the classes of objects; None where no boxes are predicted."""
        return list(self.train_source.class_names) if self.train_source.has_boxes else None

    @property
    def class_names(self) -> list[str] | None:
        """The class names in the order of the logits; None where no classes are predicted."""
        return list(self.train_source.class_names) if self.predicts_classes else None

    @property
    def predicts_classes(self) -> bool:
        """Tells whether the model maps images to logits of their classes."""
        return self.config.objective == "classification"

    @property
    def multi_label(self) -> bool:
        """Tells whether the model is trained to predict any number of classes of an image."""
        return self.predicts_classes and self.train_source.multi_label

    @property
    def watched(self) -> Watched:
        """The run as its evaluators see it."""
        config, data = self.config, self.config.dataset
        return Watched(
            model=self.model,
            trunk=create_model(config.model, num_classes=0),
            objective=self.objective,
            loss=config.loss,
            class_names=self.class_names,
            dataset=data.name,
            data_dir=data.data_dir,
            broken=data.broken,
            eval_source=self.eval_source,
            preprocessing=evaluation(data.protocol, data.image_size, data.jpeg_dct, data.channels),
            batch_size=config.batch_size // config.accumulate_steps,
            mesh=self.mesh,
            report=say,
            mask_names=self.mask_names,
            box_names=self.box_names,
        )


def prepare(
    config: ConfigDict,
    workdir: pathlib.Path,
    saved_names: Sequence[str] | None,
    *,
    goes_on: bool = False,
) -> Prepared:
    """Opens the data sets and builds the rest; nothing is computed yet.

    Args:
        config: of the run, checked.
        workdir: of the run.
        saved_names: class names in the order of the labels that the run began with, if it did.
        goes_on: whether it began before: its images are divided as they were then.

    Raises:
        UserError: for any mistake of the user's.
    """
    mesh = make_mesh(config.sharding)
    check_batch_size(config, mesh.size)
    train_source, eval_source = _open_sources(config, workdir, saved_names, goes_on)
    _check_loss(config, train_source)
    count = functools.partial(
        count_steps, num_examples=train_source.num_examples, batch_size=config.batch_size
    )
    total_steps = count(config.duration)
    schedule = schedule_of(config, total_steps, train_source)
    weights = None
    if config.class_weights:
        weights = functools.partial(balanced_weights, train_source)
    model, objective, multiply_adds = create_objective(
        config, len(train_source.class_names), weights
    )
    prepared = Prepared(
        config=config,
        workdir=workdir,
        mesh=mesh,
        train_source=train_source,
        order=create_order(train_source, config.dataset.sampling, config.seed),
        eval_source=eval_source,
        model=model,
        objective=run_objective(config, objective, model, mesh),
        multiply_adds=multiply_adds,
        schedule=schedule,
        optimizer=run_optimizer(config, schedule),
        evaluators=[],
        total_steps=total_steps,
        log_every=count(config.log_every),
        checkpoint_every=count(config.checkpoint_every),
        teacher=_open_teacher(config, train_source, model, mesh),
    )
    evaluators = create_evaluators(config.evals.to_dict(), prepared.watched, count)
    return prepared._replace(evaluators=evaluators)


def _open_teacher(
    config: ConfigDict, source: datasets.Source, model: nn.Module, mesh: Mesh
) -> Teacher | None:
    settings, names = config.distillation, source.class_names
    if not settings.teacher:
        return None
    if model.config.num_classes != len(names):
        raise UserError(
            f"model.num_classes is {model.config.num_classes} but {source.name} has {len(names)} "
            "classes, and a teacher tells nothing of the others: set --config.model.num_classes=0"
        )
    return load_teacher(
        settings.teacher,
        class_names=names,
        image_size=config.dataset.image_size,
        channels=config.dataset.channels,
        dtype=config.model.dtype,
        kind=settings.kind,
        mesh=mesh,
    )


def _check_loss(config: ConfigDict, source: datasets.Source) -> None:
    if source.multi_label and config.objective == "classification" and config.loss != "sigmoid":
        alone = ", and leave config.distillation.teacher out" if config.distillation.teacher else ""
        raise UserError(
            f"loss is {config.loss!r} but {source.name} has several labels an image, of which the "
            f"softmax allows one: set --config.loss=sigmoid{alone}"
        )


def schedule_of(
    config: ConfigDict, total_steps: int, train_source: datasets.Source
) -> optax.Schedule:
    """The learning rate of each step of a config's run, were it of so many steps."""
    keys = dict(config.schedule)
    for key in SCHEDULE_LENGTHS:
        keys[f"{key}_steps"] = count_steps(
            keys.pop(key), train_source.num_examples, config.batch_size
        )
    return create_schedule(total_steps=total_steps, **keys)


def open_images(
    data: ConfigDict,
    least_classes: int,
    partition: holdout.Partition | None = None,
    mask_classes: int | None = None,
    has_boxes: bool = False,
) -> tuple[datasets.Source, datasets.Source]:
    """Opens the images that a config's section `dataset` names, to train and to evaluate on.

    Args:
        data: the section.
        least_classes: see `data.labeled_files.FileRules`.
        partition: likewise.
        mask_classes: see `datasets.open_dataset`.
        has_boxes: likewise.

    Raises:
        UserError: as `datasets.open_dataset` does, or the first image to train on has other
            channels.
    """
    train, evaluated = datasets.open_dataset(
        data.name,
        data_dir=data.data_dir,
        train_split=data.train_split,
        eval_split=data.eval_split,
        development=data.development,
        files=datasets.FileRules(
            holdout=data.holdout,
            broken=data.broken,
            least_classes=least_classes,
            partition=partition,
            channels=data.channels,
        ),
        mask_classes=mask_classes,
        has_boxes=has_boxes,
    )
    pipeline.check_channels(train, data.channels)
    return train, evaluated


def _open_sources(
    config: ConfigDict, workdir: pathlib.Path, saved_names: Sequence[str] | None, goes_on: bool
) -> tuple[datasets.Source, datasets.Source]:
    data = config.dataset
    split_file = workdir / holdout.FILE
    # A single class is learned without a word: the loss is 0. A run of before goes on with it.
    tells_apart = config.objective == "classification" and not goes_on
    partition = holdout.read(split_file) if goes_on and split_file.exists() else None
    train_source, eval_source = open_images(
        data,
        2 if tells_apart else 1,
        partition,
        config.model.num_classes if config.objective == "segmentation" else None,
        config.objective == "detection",
    )
    if goes_on and train_source.partition is not partition:
        if partition is not None:
            raise UserError(
                f"{split_file} says that the run divided {data.name} itself, which has splits of "
                "its own now, such as train/: take these away, or begin anew in another --workdir"
            )
        holdout.read(split_file)  # It is gone: this says so.
    for note in train_source.notes:
        say(note)
    if train_source.has_boxes:
        _tell_crowded(train_source, config.detection.most_boxes)
    if saved_names is not None:
        sources = (train_source, eval_source)
        train_source, eval_source = (_with_labels(x, saved_names, workdir) for x in sources)
    return take_subset(train_source, data.subset, data.subset_seed), eval_source


# Images that are looked into where it takes reading them.
_LOOKED_INTO = 100


def _tell_crowded(source: datasets.Source, most: int) -> None:
    """Tells how many images have more objects than are learned from one.

    Of a data set that must be read for it, a few are looked into, evenly spread over it.
    """
    count, told = source.num_examples, getattr(source.examples, "boxes", None) is not None
    looked = count if told else min(count, _LOOKED_INTO)
    numbers = [
        np.sum(~source.boxes(int(i)).crowd) for i in np.linspace(0, count - 1, looked).astype(int)
    ]
    if crowded := sum(number > most for number in numbers):
        say(
            f"{source.name}: {crowded:,} of {looked:,} images have more than {most} objects, up to "
            f"{max(numbers):,}: the largest are learned, all with --config.detection.most_boxes"
            f"={max(numbers)}"
        )


def _with_labels(
    source: datasets.Source, saved_names: Sequence[str], workdir: pathlib.Path
) -> datasets.Source:
    """The source with the labels that a run began with: folders of numbers were once text."""
    if list(source.class_names) == list(saved_names):
        return source
    is_fixed = source.has_masks or source.has_boxes
    if is_fixed or sorted(source.class_names) != sorted(saved_names):
        raise UserError(
            f"{workdir} holds a run whose {len(saved_names)} classes are not the "
            f"{len(source.class_names)} that {source.name} has now: choose another --workdir"
        )
    labels = [saved_names.index(name) for name in source.class_names]
    return datasets.relabel(source, labels, saved_names)


def compile_train_step(
    prepared: Prepared, state: TrainState
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Compiles `steps.train_step`, so that the first step takes no longer than the others.

    Args:
        prepared: the run.
        state: in the shardings that it keeps; each step takes the memory of the one before.
    """
    lowered = lower_train_step(
        prepared.config,
        prepared.mesh,
        prepared.objective,
        prepared.optimizer,
        prepared.model.config.num_classes,
        state,
        len(prepared.train_source.class_names) if prepared.train_source.multi_label else 0,
        prepared.teacher,
    )
    options = compiler_options(prepared.mesh.devices.flat[0].platform)
    compiled, teacher = lowered.compile(options), prepared.teacher
    if teacher is None:
        return compiled
    return lambda state, batch: compiled(state, batch, teacher.params)


def train_batches(prepared: Prepared, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    """This process' rows of the batches from `first_step` on, see `pipeline.train_batches`."""
    config, data = prepared.config, prepared.config.dataset
    augmentation = parse_augment(config.augment)
    return pipeline.train_batches(
        prepared.train_source,
        batch_size=config.batch_size,
        image_size=data.image_size,
        channels=data.channels,
        protocol=data.protocol,
        jpeg_dct=data.jpeg_dct,
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        num_operations=augmentation.num_operations,
        magnitude=augmentation.magnitude,
        contrast=config.augment_contrast,
        most_boxes=config.detection.most_boxes,
        seed=config.seed,
        order=prepared.order,
        first_step=first_step,
        workers=data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
