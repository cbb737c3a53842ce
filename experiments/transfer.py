"""What the tables share: names of data sets and tasks, how each is scored, means, and the cost."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.runner.experiment import Run, Task
from experiments.runner.outcomes import read
from vit_jax.data.vtab import PREFIX, TASKS

if TYPE_CHECKING:
    from experiments.runner.setting import Setting

NAMES = {
    "jft": "JFT-300M",
    "imagenet21k": "ImageNet-21k",
    "imagenet2012": "ImageNet",
    "real": "ReaL",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "oxford_iiit_pet": "Pets",
    "oxford_flowers102": "Flowers",
    "vtab": "VTAB (19 tasks)",
    "mean": "mean",
    "exaflops": "exaFLOPs",
}
VTAB = tuple(f"{PREFIX}{task}" for task in TASKS)


def score(
    setting: "Setting", start: Run, task: str, *, large: bool = False, mean_of: Sequence[str] = ()
) -> dict[str, Any]:
    """The sources and the metric of a measurement: accuracy on a task after fine-tuning on it.

    Args:
        setting: makes the runs.
        start: the pre-training.
        task: of Table 4; "real", which is scored by the runs on ImageNet, and by none where the
            user names another data set in its place; "vtab:TASK"; or "vtab", the mean of all 19,
            and "mean", that of `mean_of`.
        large: whether ImageNet and ReaL are fine-tuned as in Table 2.
        mean_of: such tasks.
    """
    if task in ("vtab", "mean"):
        return {"sources": _means(setting, start, task, mean_of or VTAB), "metric": "accuracy"}
    if task == "real":
        if "imagenet2012" in setting.datasets:
            return {"sources": (), "metric": "real/accuracy"}
        runs = setting.finetune(start, "imagenet2012", large=large)
        return {"sources": runs, "metric": "real/accuracy"}
    return {"sources": setting.finetune(start, task, large=large and task == "imagenet2012")}


def _means(setting: "Setting", start: Run, name: str, tasks: Sequence[str]) -> list[Task]:
    runs = [setting.finetune(start, task) for task in tasks]
    return [
        Task(f"{name}-{start.name}-{seed}", "experiments.transfer:mean_accuracy", of=of)
        for seed, of in enumerate(zip(*runs, strict=True))
    ]


def mean_accuracy(workdir: pathlib.Path, runs: Sequence[pathlib.Path]) -> dict[str, float]:
    """The mean of the accuracies of runs, each that of its last evaluation."""
    del workdir
    found = [read(run / "metrics.json")["accuracy"] for run in runs]
    return {"accuracy": sum(found) / len(found)}


def cost(setting: "Setting", run: Run) -> dict[str, Any]:
    """Likewise, of the exaFLOPs of a run by what its products need: 6 a multiply-add."""
    task = Task(
        f"exaflops-{run.name}",
        "experiments.transfer:given",
        {"exaflops": setting.exaflops(run)},
        of=(run,),
    )
    return {"sources": [task], "metric": "exaflops", "percent": False}


def given(
    workdir: pathlib.Path, runs: Sequence[pathlib.Path], **numbers: float
) -> Mapping[str, float]:
    """The numbers themselves, once the runs that they are about are finished."""
    del workdir, runs
    return numbers


def base_lr(workdir: pathlib.Path, runs: Sequence[pathlib.Path]) -> dict[str, float]:
    """The base learning rate of the first of the runs."""
    del workdir
    return {"base_lr": read(runs[0] / "config.json")["schedule"]["base_lr"]}
