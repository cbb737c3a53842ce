"""What a page says of its numbers: which accuracies they are, of which data sets, and whose."""

import collections
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from experiments.runner import graph
from experiments.runner.experiment import Measurement, Run, Task
from experiments.runner.scales import StandIn
from experiments.transfer import NAMES, VTAB
from vit_jax import recipes

if TYPE_CHECKING:
    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

_METRICS_OF_TASKS = {
    "experiments.transfer:mean_accuracy": "the mean of those of tasks",
    "experiments.objectnet:evaluate": "that on ObjectNet",
}
_TITLES = {**NAMES, "vtab": "a task of VTAB", "objectnet": "ObjectNet"}


def about_data(measurements: Iterable[Measurement], setting: "Setting") -> list[str]:
    """Sentences about the data sets that measurements depend on, and about no others.

    Args:
        measurements: of a page.
        setting: that they were made with.
    """
    used = _used(list(measurements))
    lines = _about_stand_ins(used, setting)
    for key, name in setting.datasets.items():
        if key == "objectnet":
            if key in used and key not in setting.scale.about_data:
                lines.append(f"ObjectNet is read from {name}.")
        elif key in used:
            lines.append(_about_named(key, name))
    return lines


def about_accuracies(results: "Results") -> list[str]:
    """A sentence on what the accuracies of a table are, and in which columns; none without one."""
    column, places = results.experiment.column, collections.defaultdict(dict)
    for result in results.found:
        if words := _metric(result.measurement):
            places[words][result.measurement.labels.get(column, "")] = None
    alike = len({frozenset(columns) for columns in places.values()}) == 1
    each = [
        words if alike else f"{words} ({', '.join(columns)})" for words, columns in places.items()
    ]
    return [f"The accuracy is {'; '.join(each)}."] if each else []


def _metric(measurement: Measurement) -> str:
    """What an accuracy is, "" of anything else."""
    if not measurement.percent or not measurement.sources:
        return ""
    source, metric = measurement.sources[0], measurement.metric
    if metric.startswith("fewshot/"):
        return "that of linear classification from 5 images a class of ImageNet"
    if metric.startswith("real/"):
        return "that on ImageNet's validation images with the labels of ReaL"
    if isinstance(source, Task):
        return _METRICS_OF_TASKS.get(source.function, "")
    if metric != "eval_accuracy":
        return ""
    if source.init_from is None and not source.rates:
        return "that of pre-training on its own validation images"
    held_out = source.config.dataset.development
    return f"that after fine-tuning, on {'held-out training' if held_out else 'test'} images"


def in_a_line(setting: "Setting") -> str:
    """What a picture says of its numbers."""
    scale = setting.scale
    named = [
        f"{_TITLES[key]} is {name}"
        for key, name in setting.datasets.items()
        if key != "objectnet" and recipes.table_name(name) != key
    ]
    return "; ".join(filter(None, (f"{scale.name} scale", scale.label, *named)))


def _used(measurements: Collection[Measurement]) -> set[str]:
    """The paper's data sets and tasks, and of what else there is something to say."""
    found = set()
    for job in graph.collect(measurements).values():
        if isinstance(job, Run):
            found.add(getattr(job, "dataset", "").partition(":")[0])
            if job.init_from or job.rates:
                found.add("tasks")
        elif job.function == "experiments.objectnet:evaluate":
            found.add("objectnet")
    metrics = [measurement.metric for measurement in measurements]
    if any(metric.startswith("fewshot/") for metric in metrics):
        found |= {"fewshot", "imagenet2012"}
    if any(metric.startswith("real/") for metric in metrics):
        found.add("real")
    return found


def _about_stand_ins(used: Collection[str], setting: "Setting") -> list[str]:
    scale = setting.scale
    stand_ins = _stand_ins(used, setting)
    if not stand_ins:
        return []
    total = next(iter(stand_ins.values())).total
    parts = ", ".join(
        f"{_TITLES[key]} is {'all' if x.images == total else f'{x.images:,}'}"
        for key, x in stand_ins.items()
    )
    lines = [f"Of the {total:,} {scale.images}, {parts}."]
    kept = [key for key in ("tasks", "fewshot", "real", "objectnet") if key in used]
    if "imagenet2012" in setting.datasets:
        kept = [key for key in kept if key not in ("fewshot", "real")]
    lines += [scale.about_data[key] for key in kept]
    if "tasks" in used:
        if "jft" in stand_ins:
            lines.append("Pre-training on JFT-300M has seen every image of every task.")
        if stand_ins.keys() & {"imagenet21k", "imagenet2012"}:
            lines.append("Pre-training on ImageNet-21k or ImageNet may have seen some of them.")
    return lines


def _stand_ins(used: Collection[str], setting: "Setting") -> dict[str, StandIn]:
    all_of = dict(setting.scale.stand_ins)
    if VTAB[0] in all_of:
        all_of["vtab"] = all_of[VTAB[0]]
    return {
        key: all_of[key]
        for key in _TITLES
        if key in used and key in all_of and key not in setting.datasets
    }


def _about_named(key: str, name: str) -> str:
    if recipes.table_name(name) == key:
        return f"{_TITLES[key]} is {name}."
    return (
        f"{_TITLES[key]} is {name} here, which the paper did not use: no number that depends on it "
        "is comparable with the paper's."
    )
