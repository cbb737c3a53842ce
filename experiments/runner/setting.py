"""The words in which an experiment says what it runs: pre-train this, fine-tune that on it."""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from experiments.runner.experiment import Run
from experiments.runner.graph import Job
from experiments.runner.scales import Scale, StandIn, count_steps
from vit_jax import program, recipes, sweep
from vit_jax.analysis import flops
from vit_jax.config_rules import parse_duration
from vit_jax.data.subset import parse_subset
from vit_jax.data.vtab import PREFIX, TASKS
from vit_jax.errors import UserError, brief_name, nearest
from vit_jax.evaluation import fewshot
from vit_jax.plan.estimate import DATASETS

# Those that a user can name another data set for.
PRETRAINING = ("jft", "imagenet21k", "imagenet2012")
# Not in the paper: the paper gives no patience for Figure 4's early stopping. These 5 evaluations
# are a tenth of a full run's 50.
PATIENCE = 5
EVALUATIONS = 50
SHOTS = 5
# Of the training images, what `data.datasets` holds out of those that one pre-trains on.
HELD_OUT = {"imagenet2012": 0.01}
# Classes and images of a data set that is not in `DATASETS`. Of a task the head is less than a
# ten-thousandth of the arithmetic, and its durations are in steps.
UNKNOWN = (1_000, 0)
# What stands in configs until the user names the folder.
UNNAMED_OBJECTNET = "objectnet:objectnet"

_TASK_NAMES = (
    *(task for task in recipes.TABLE_4 if task != "vtab"),
    *(f"{PREFIX}{task}" for task in TASKS),
)
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Trained(Run):
    """A run of a `Setting`, which others can start from.

    Attributes:
        model: the paper's name of its model.
        dataset: the paper's name of its data set.
    """

    model: str = dataclasses.field(default="", compare=False)
    dataset: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A scale, and the user's data sets and seeds.

    Attributes:
        scale: that the runs are of.
        seeds: of what is repeated.
        datasets: what the user names in place of the paper's, {"jft": "folder:/data/mine"}; and
            "objectnet", a folder.
        data_dir: where TFDS looks; "" is its default.
        images: of the training images of what the user names, as far as he says.
        classes: likewise.
        hardware: keys of every config that only say how a step is computed, such as
            {"accumulate_steps": 4}: no name has them, and what is finished stays so.
    """

    scale: Scale
    seeds: int
    datasets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data_dir: str = ""
    images: Mapping[str, int] = dataclasses.field(default_factory=dict)
    classes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    hardware: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def pretrain(
        self,
        model: str,
        dataset: str,
        *,
        epochs: int | None = None,
        subset: str = "",
        seed: int = 0,
        variant: str = "",
        changes: Mapping[str, Any] = _NOTHING,
    ) -> Run:
        """Table 3's row, evaluated at its end by few-shot accuracy too, see `fewshot_metric`.

        Args:
            model: the paper's name.
            dataset: "jft", "imagenet21k" or "imagenet2012".
            epochs: one of the row's; None for the longest.
            subset: "10%" for the protocol of Figure 4: as many steps as on all images, a part of
                them held out, by which it is stopped early, and few-shot accuracy along with each
                evaluation. "100%" is all images under that protocol.
            seed: of the run.
            variant: names `changes` in the run's folder.
            changes: of the config in the paper's sizes, {"model.classifier": "gap"}; a mapping
                takes the place of a whole section.

        Raises:
            UserError: the model or the data set is none of the paper's.
        """
        _check_name("data set to pre-train on", dataset, PRETRAINING)
        config = recipes.get_config(model, f"pretrain,{dataset}")
        if epochs:
            config.duration = f"{epochs} epochs"
        length = config.duration.replace(" ", "-")
        config.evals.fewshot.update(
            dataset=self._name("imagenet2012"),
            data_dir=self.data_dir,
            shots=str(SHOTS),
            every="0 steps",
        )
        if subset:
            _take_part(config, subset)
        config.seed = seed
        name = _join("pretrain", self._title(dataset), _title(model), length, subset, variant)
        share = float(parse_subset(subset)) if subset else 1.0
        return self._run(f"{name}-seed{seed}", config, model, dataset, changes, share)

    def masked(
        self,
        model: str,
        dataset: str = "jft",
        *,
        seed: int = 0,
        variant: str = "",
        changes: Mapping[str, Any] = _NOTHING,
    ) -> Run:
        """Masked patch prediction (Appendix B.1.2); the arguments are those of `pretrain`."""
        _check_name("data set to pre-train on", dataset, PRETRAINING)
        config = recipes.get_config(model, f"masked,{dataset}")
        config.seed = seed
        name = _join("masked", self._title(dataset), _title(model), variant)
        return self._run(f"{name}-seed{seed}", config, model, dataset, changes)

    def finetune(
        self,
        start: Run | None,
        task: str,
        *,
        model: str = "",
        large: bool = False,
        variant: str = "",
        changes: Mapping[str, Any] = _NOTHING,
    ) -> tuple[Run, ...]:
        """Table 4: a run for each seed, at the best of Table 4's rates on held-out images.

        On ImageNet "real/accuracy" is measured too.

        Args:
            start: the run of `pretrain` or `masked` whose weights are taken; None for none.
            task: a key of `recipes.TABLE_4`, or "vtab:TASK".
            model: the paper's name, where there is no start.
            large: Table 2's resolution of 512, 518 for H/14, and its Polyak averaging.
            variant: see `pretrain`.
            changes: likewise.

        Raises:
            UserError: the model or the task is none of the paper's.
        """
        _check_name("task", task, _TASK_NAMES)
        if isinstance(start, Trained):
            model = start.model
        config = recipes.get_config(model, f"finetune,{task}{',512' if large else ''}")
        config.init_from = ""
        origin = re.sub("^pretrain-", "", start.name) if start else f"scratch-{_title(model)}"
        name = _join("finetune", self._title(task), "512" if large else "", variant, "of", origin)
        rates = _middle(recipes.finetuning_row(task).base_lrs, self.scale.learning_rates)
        held_out = []
        for rate in rates if len(rates) > 1 else ():
            tried = sweep.variant(config, rate, 0, development=True)
            run = self._run(name, tried, model, task, changes, start=start)
            name_of_rate = f"{name}-held-out-lr{run.config.schedule.base_lr:g}"
            held_out.append(dataclasses.replace(run, name=name_of_rate))
        if task == "imagenet2012" and task not in self.datasets:
            config.evals.real = {"every": "0 steps", "data_dir": self.data_dir, **self.scale.real}
        runs = []
        for seed in range(self.seeds):
            final = sweep.variant(config, rates[0], seed, development=False)
            run = self._run(f"{name}-seed{seed}", final, model, task, changes, start=start)
            runs.append(dataclasses.replace(run, rates=tuple(held_out)))
        return tuple(runs)

    @property
    def fewshot_metric(self) -> str:
        """The name of the few-shot accuracy that `pretrain` measures."""
        return f"fewshot/{fewshot.short_name(self._name('imagenet2012'))}/{SHOTS}shot"

    def objectnet(self) -> dict[str, Any]:
        """An entry of `config.evals` for ObjectNet, or what stands for it."""
        entry = {"every": "0 steps", "data_dir": self.data_dir, **self.scale.objectnet}
        if entry["type"] == "objectnet":
            folder = self.datasets.get("objectnet")
            name = f"objectnet:{folder}" if folder else UNNAMED_OBJECTNET
            entry |= {"dataset": name, "data_dir": ""}
        return entry

    def num_images(self, dataset: str) -> int:
        """The training images of what stands for one of the paper's data sets."""
        if dataset in self.datasets:
            return self._size(dataset)
        stand_in = self.scale.stand_ins.get(dataset)
        return stand_in.images if stand_in else DATASETS[dataset][1]

    def count(self, run: Trained) -> tuple[int, int, float]:
        """Counts the steps of a run, the images that it goes through, and its FLOPs.

        They are those of the whole run: one that is stopped early has fewer.
        """
        config = run.config
        examples = 0.0
        if "epoch" in config.duration:
            held_out = HELD_OUT.get(run.dataset, 0.1) if config.dataset.development else 0.0
            share = float(parse_subset(config.dataset.subset or "100%"))
            examples = self.num_images(run.dataset) * (1 - held_out) * share
        steps = count_steps(config.duration, examples, config.batch_size)
        images = steps * config.batch_size
        _, _, multiply_adds = program.create_objective(config, self._num_classes(run.dataset))
        return steps, images, float(flops.train_flops(multiply_adds) * images)

    def exaflops(self, run: Run) -> float:
        """The arithmetic of all steps of a run, 6 FLOPs a multiply-add and image, over 1e18."""
        assert isinstance(run, Trained)
        return self.count(run)[2] / 1e18

    def check(self, jobs: Iterable[Job]) -> None:
        """Checks that the data sets of runs and tasks are those that one can have.

        Raises:
            UserError: one is JFT, which is Google's, and the user names none in its place; or he
                does not name the folder of ObjectNet.
        """
        jobs = list(jobs)
        if any(isinstance(job, Run) and job.config.dataset.name == "jft" for job in jobs):
            raise UserError(
                "data set 'jft' is JFT-300M, which is not public: name another to pre-train on, "
                "for example --jft imagenet21k or --jft folder:/data/photos"
            )
        if "objectnet" not in self.datasets and UNNAMED_OBJECTNET in map(_evaluated_on, jobs):
            raise UserError(
                "ObjectNet is a folder that one has to get from its authors: name it, for example "
                "--objectnet /data/objectnet"
            )

    def _run(
        self,
        name: str,
        config: ConfigDict,
        model: str,
        dataset: str,
        changes: Mapping[str, Any],
        share: float = 1.0,
        start: Run | None = None,
    ) -> Trained:
        """A run of a config in the paper's sizes, at this scale and on the data sets here."""
        for key, value in changes.items():
            section, _, last = key.rpartition(".")
            where = config[section] if section else config
            where[last] = ConfigDict(dict(value)) if isinstance(value, Mapping) else value
        classes, images = DATASETS.get(dataset, (0, 0))
        if self.scale.reduction:
            sizes = (classes, self._num_classes(dataset))
            self.scale.reduction.shrink(config, images * share, sizes)
        config.dataset.name = self._name(dataset)
        config.dataset.data_dir = self.data_dir
        stand_in = self.scale.stand_ins.get(dataset)
        if stand_in and dataset not in self.datasets:
            config.dataset.subset = _part(stand_in, share)
            config.dataset.subset_seed = stand_in.seed
        config.update_from_flattened_dict(self.hardware)
        return Trained(name, config, init_from=start, model=model, dataset=dataset)

    def _name(self, dataset: str) -> str:
        stand_in = self.scale.stand_ins.get(dataset)
        return self.datasets.get(dataset, stand_in.name if stand_in else dataset)

    def _title(self, dataset: str) -> str:
        """The data set in the name of a run: the paper's, and the user's own."""
        name = self.datasets.get(dataset, "")
        if not name.startswith(("folder:", "list:")):
            return _join(dataset, name)
        # Others have the same last name.
        path = str(pathlib.PurePath(name.partition(":")[2]))
        return _join(
            dataset, fewshot.short_name(name), hashlib.sha256(path.encode()).hexdigest()[:6]
        )

    def _num_classes(self, dataset: str) -> int:
        if dataset in self.datasets:
            return self.classes.get(dataset) or DATASETS.get(dataset, UNKNOWN)[0]
        return DATASETS.get(self._name(dataset), UNKNOWN)[0]

    def _size(self, dataset: str) -> int:
        """The images of what the user named, by his word or by opening it."""
        name = self.datasets[dataset]
        if known := self.images.get(dataset) or DATASETS.get(recipes.table_name(name), UNKNOWN)[1]:
            return known
        try:
            return _count_images(name, self.data_dir)
        except UserError as error:
            raise UserError(
                f"the images of {name} are not known here ({error}): add --{dataset}_images N"
            ) from error


@functools.cache  # A folder of millions takes minutes.
def _count_images(name: str, data_dir: str) -> int:
    from vit_jax.data import datasets

    return datasets.open_dataset(name, data_dir=data_dir)[0].num_examples


def _check_name(what: str, name: str, valid: Sequence[str]) -> None:
    if name not in valid:
        near = nearest(name, valid)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(valid)}"
        raise UserError(f"{brief_name(name)} is no {what} of the paper: {hint}")


def _evaluated_on(job: Job) -> Any:
    return None if isinstance(job, Run) else job.arguments.get("dataset")


def _middle(rates: Sequence[float], count: int) -> Sequence[float]:
    skipped = max(len(rates) - count, 0) // 2
    return rates[skipped : skipped + count]


def _take_part(config: ConfigDict, subset: str) -> None:
    """Makes a pre-training one of Figure 4's, on a part of the images."""
    # An epoch of the part is shorter: the hyperparameters, and so the steps, stay the same.
    for section, key in ((config, "duration"), (config.schedule, "warmup")):
        number, unit = parse_duration(section[key])
        if unit == "epochs":
            section[key] = f"{number / float(parse_subset(subset)):.6f} epochs"
    number, unit = parse_duration(config.duration)
    every = f"{number / EVALUATIONS:.6f} {unit}"
    config.evals.val.every = config.evals.fewshot.every = config.checkpoint_every = every
    config.patience = PATIENCE
    config.dataset.development = True
    config.dataset.subset = subset


def _part(stand_in: StandIn, share: float) -> str:
    """`config.dataset.subset` for a share of the images that a stand-in is."""
    if share * stand_in.images == stand_in.total:
        return ""
    if stand_in.seed:
        return str(stand_in.images)
    return f"{100 * share * stand_in.images / stand_in.total:.6g}%"


def _title(model: str) -> str:
    """A model in the name of a run; on some disks b is B."""
    return _slug(model.replace("ViT-b/", "ViT-half-B/"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


def _join(*words: str) -> str:
    return "-".join(filter(None, (_slug(word.replace("%", "pct")) for word in words)))
