"""How large the runs of an experiment are: as in the paper, for one GPU, or for two CPU cores.

A scale changes sizes and durations only. A run is first written down in the paper's sizes; then
`Reduction.shrink` makes it smaller, by rules that are the same for every run of the scale. So what
is compared with each other within a family keeps its order: B is smaller than L and L than H, R50x1
than R152x2, 7 epochs shorter than 14. Between families it does not: the widths of ResNets stay.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config_rules import parse_duration
from vit_jax.data.vtab import PREFIX, TASKS
from vit_jax.recipes.paper import (
    FINETUNE_BATCH_SIZE,
    PRETRAIN_IMAGE_SIZE,
    SIGMOID_HEAD_BIAS,
    TABLE_4,
)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A data set that takes the place of one of the paper's.

    Attributes:
        name: as in `config.dataset.name`.
        images: how many of its training images.
        total: how many it has.
        seed: of their choice; of two choices of one seed the smaller lies within the larger. 0 is
            that of the data sets to pre-train on, of which there are parts of parts.
    """

    name: str
    images: int
    total: int
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Reduction:
    """The rules by which a run of the paper's sizes becomes smaller.

    Attributes:
        side: an image of 224 pixels becomes one of so many; others in proportion, in steps of 8.
        width: hidden sizes are divided by it, and rounded to whole heads.
        head_size: of the attention, in place of 64.
        layers: the number of layers is divided by it, and rounded up.
        patch: the side of a patch is divided by it, rounded to a power of two. A hybrid has as many
            stages less as that takes.
        stages: a ResNet has so many, each with the units of those that it stands for.
        units: the units of a ResNet are divided by it. Its widths stay.
        steps: of a run are so many times the cube root of the paper's.
        batch_sizes: in place of 4,096 and of 512.
        rates: what learning rates of pre-training are multiplied by, by the optimizer's name:
            narrow models take higher ones, and SGD small batches lower ones.
        finetuning_rate: likewise, of fine-tuning.
        evaluations: of a run of Figure 4, which is stopped early; other runs have one, at the end.
        patience: of these.
        mirrors: whether images of the stand-ins may be mirrored.
    """

    side: int
    width: int
    head_size: int
    layers: int
    patch: int
    stages: int
    units: int
    steps: float
    batch_sizes: tuple[int, int]
    rates: Mapping[str, float]
    finetuning_rate: float
    evaluations: int
    patience: int
    mirrors: bool

    def shrink(self, config: ConfigDict, images: float, classes: tuple[int, int]) -> None:
        """Makes a run smaller, in place.

        Args:
            config: of the run in the paper's sizes.
            images: that an epoch of it has.
            classes: of the paper's data set and of what takes its place; the bias of a sigmoid's
                head is made for their number.
        """
        paper_steps = count_steps(config.duration, images, config.batch_size)
        warmup = count_steps(config.schedule.warmup, images, config.batch_size)
        steps = self.num_steps(paper_steps)
        config.duration = f"{steps} steps"
        config.schedule.warmup = f"{round(steps * warmup / paper_steps)} steps"
        if config.ema_decay:  # The average is over the same share of the run.
            config.ema_decay = max(1 - (1 - config.ema_decay) * paper_steps / steps, 0.0)
        every = steps // self.evaluations if config.patience else 0
        curve = count_steps(config.evals.fewshot.every, images, config.batch_size)
        config.patience = min(config.patience, self.patience)
        config.checkpoint_every = f"{every} steps"
        for entry in config.evals.values():
            entry.every = f"{every} steps"
        if config.evals.fewshot.dataset and not config.patience:  # As Figure 9's, a curve.
            config.evals.fewshot.every = f"{round(steps * curve / paper_steps)} steps"
        finetunes = config.batch_size <= FINETUNE_BATCH_SIZE
        config.batch_size = self.batch_sizes[finetunes]
        factor = self.finetuning_rate if finetunes else self.rates[config.optimizer.name]
        config.schedule.base_lr *= factor
        config.schedule.end_lr *= factor
        self._shrink_images(config.dataset)
        self._shrink_model(config.model)
        if config.model.head_bias_init == SIGMOID_HEAD_BIAS:
            config.model.head_bias_init *= math.log(classes[1]) / math.log(classes[0])

    def num_steps(self, paper_steps: int) -> int:
        """The steps of a run that has so many in the paper."""
        return max(round(self.steps * paper_steps ** (1 / 3)), 1)

    def _shrink_images(self, dataset: ConfigDict) -> None:
        dataset.image_size = self.image_size(dataset.image_size)
        dataset.protocol = "pad"  # An inception crop of so small an image leaves nothing to see.
        dataset.random_crop &= self.mirrors
        dataset.random_flip &= self.mirrors

    def image_size(self, size: int) -> int:
        """The side that takes the place of one of the paper's, both in pixels."""
        return max(size * self.side // PRETRAIN_IMAGE_SIZE // 8, 1) * 8

    def _shrink_model(self, model: ConfigDict) -> None:
        model.dtype = "float32"  # CPUs are slow in bfloat16.
        if "resnet_layers" in model:
            stages = self.stages
            if "patch_size" in model:
                stages = max(len(model.resnet_layers) - round(math.log2(self.patch)), 0)
            model.resnet_layers = self._units(model.resnet_layers, stages)
        if "hidden_size" in model:
            self._shrink_encoder(model)

    def _units(self, units: Sequence[int], stages: int) -> tuple[int, ...]:
        bounds = [round(i * len(units) / stages) for i in range(stages + 1)] if stages else [0]
        together = [sum(units[a:b]) for a, b in itertools.pairwise(bounds)]
        return tuple(max(round(number / self.units), 1) for number in together)

    def _shrink_encoder(self, model: ConfigDict) -> None:
        heads = max(round(model.hidden_size / self.width / self.head_size), 1)
        width = heads * self.head_size
        for key in ("mlp_dim", "representation_size"):
            model[key] = model[key] * width // model.hidden_size
        model.hidden_size, model.num_heads = width, heads
        model.num_layers = math.ceil(model.num_layers / self.layers)
        if model.patch_size > 1:
            model.patch_size = 2 ** max(round(math.log2(model.patch_size / self.patch)), 0)


def count_steps(duration: str, images: float, batch_size: int) -> int:
    """The steps of "500 steps", or of "7 epochs" of so many images each."""
    number, unit = parse_duration(duration)
    return round(number * images / batch_size if unit == "epochs" else number)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A scale of all experiments.

    Attributes:
        name: as on the command line.
        summary: a sentence for every page: what its numbers are.
        seeds: of what is repeated, unless the user says.
        learning_rates: how many of a row of Table 4 are tried, those in its middle.
        runs_per_process: that a process makes before another takes its place.
        reduction: of every run; None leaves it as it is.
        stand_ins: by the paper's name of a data set or task; a task of VTAB by "vtab:TASK".
        label: what a picture says of its numbers, in a few words.
        images: what all stand-ins are parts of, as a page calls it.
        about_data: sentences for the pages, by what they are about: "tasks" and "fewshot" of the
            stand-ins, and "real" and "objectnet".
        real: the entry of `config.evals` that stands for ReaL.
        objectnet: likewise.
    """

    name: str
    summary: str
    seeds: int
    learning_rates: int
    runs_per_process: int
    reduction: Reduction | None = None
    stand_ins: Mapping[str, StandIn] = dataclasses.field(default_factory=dict)
    label: str = ""
    images: str = ""
    about_data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    real: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "real"})
    objectnet: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "objectnet"})


# What the parts of a data set are that stand for the paper's: shares of its training images. Of
# the tasks each is another choice; they are as small, to each other, as the paper's are.
_PRETRAINING = {"jft": 1.0, "imagenet21k": 0.3, "imagenet2012": 0.1}


def _stand_ins(name: str, total: int, tasks: Mapping[str, int]) -> dict[str, StandIn]:
    """Parts of one data set for all of the paper's.

    Args:
        name: of the data set.
        total: training images that it has.
        tasks: images of each task that it is fine-tuned on, and of "vtab" for each of its 19.
    """
    found = {key: StandIn(name, round(x * total), total) for key, x in _PRETRAINING.items()}
    each = {f"{PREFIX}{task}": tasks["vtab"] for task in TASKS}
    sizes = {task: tasks[task] for task in TABLE_4 if task in tasks and task != "vtab"} | each
    for seed, (task, images) in enumerate(sizes.items(), start=1):
        found[task] = StandIn(name, images, total, seed)
    return found


def _about(held_out: str, test: str) -> dict[str, str]:
    """`Scale.about_data` of a scale whose data sets are all parts of one."""
    return {
        "tasks": "Each task but ImageNet is another choice of them; all have the same ten classes. "
        f"Learning rates are chosen on {held_out} other training images; accuracy is on the {test} "
        "test images.",
        "fewshot": "The 5 images a class of few-shot accuracy are such images too, with the "
        "classes of pre-training: it says nothing of new classes.",
        "real": "ReaL is the first half of the test images with the labels that they have.",
        "objectnet": "ObjectNet is the second half of the test images.",
    }


PAPER = Scale(
    name="paper",
    summary="Scale paper: the models, data sets and durations of the paper.",
    seeds=3,
    learning_rates=4,
    runs_per_process=1,
)

_SECOND_HALF = {"type": "classification", "split": "test[50%:]"}

MINI = Scale(
    name="mini",
    summary=(
        "Scale mini: transformers of a sixth of the paper's width and half its layers, ResNets of "
        "its widths with fewer stages and units, on parts of CIFAR-10 (32 x 32 pixels) in place of "
        "every data set. It shows what happens at this size; the numbers reproduce nothing of the "
        "paper's."
    ),
    seeds=3,
    learning_rates=2,
    runs_per_process=20,
    reduction=Reduction(
        side=32,
        width=6,
        head_size=32,
        layers=2,
        patch=4,
        stages=2,
        units=4,
        steps=20,
        batch_sizes=(128, 128),
        rates={"adam": 1.5, "sgd": 0.2},
        finetuning_rate=3.0,
        evaluations=20,
        patience=3,
        mirrors=True,
    ),
    stand_ins=_stand_ins(
        "cifar10",
        50_000,
        {
            "cifar100": 4_000,
            "cifar10": 4_000,
            "oxford_iiit_pet": 400,
            "oxford_flowers102": 200,
            "vtab": 200,
        },
    ),
    label="small models on CIFAR-10, not the paper's data",
    images="training images of CIFAR-10",
    about_data=_about("1,000", "10,000"),
    real=_SECOND_HALF | {"dataset": "cifar10", "split": "test[:50%]"},
    objectnet=_SECOND_HALF | {"dataset": "cifar10"},
)

SMOKE = Scale(
    name="smoke",
    summary=(
        "Scale smoke: transformers of a twelfth of the paper's width and a sixth of its layers, "
        "ResNets of its width with one stage and few units, trained for seconds on parts of "
        "scikit-learn's 1,797 digits in place of every data set. It shows that everything runs; "
        "the numbers say nothing of the paper's."
    ),
    seeds=2,
    learning_rates=2,
    # JAX's caches save the next run a third of its time, and grow by 7 MB with each.
    runs_per_process=40,
    reduction=Reduction(
        side=16,
        width=12,
        head_size=16,
        layers=6,
        patch=4,
        stages=1,
        units=16,
        steps=4,
        batch_sizes=(32, 16),
        rates={"adam": 4.0, "sgd": 0.2},
        finetuning_rate=10.0,
        evaluations=10,
        patience=2,
        mirrors=False,
    ),
    stand_ins=_stand_ins(
        "digits",
        1_442,
        {
            "cifar100": 300,
            "cifar10": 300,
            "oxford_iiit_pet": 200,
            "oxford_flowers102": 150,
            "vtab": 100,
        },
    ),
    label="tiny models on scikit-learn's digits, not the paper's data",
    images="training images of the digits, enlarged from 8 to 16 pixels",
    about_data=_about("144", "355"),
    real=_SECOND_HALF | {"dataset": "digits", "split": "test[:50%]"},
    objectnet=_SECOND_HALF | {"dataset": "digits"},
)

SCALES = {scale.name: scale for scale in (PAPER, MINI, SMOKE)}
