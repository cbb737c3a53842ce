"""Figure 2: VTAB by groups of tasks. Shares the runs of Table 9."""

import dataclasses
from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.transfer import NAMES
from vit_jax.data.vtab import PREFIX, TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Result, Results
    from experiments.runner.setting import Setting

ALL = "all"


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the 19 tasks of the three models of Table 9."""
    return [
        Measurement(
            {
                "group": TASKS[task].group,
                "task": task.replace("_", " "),
                "model": f"{model}, {NAMES[dataset]}",
            },
            setting.finetune(setting.pretrain(model, dataset), f"{PREFIX}{task}"),
            paper=accuracy,
        )
        for (task, model, dataset), accuracy in paper.TABLE_9.items()
        if task in TASKS
    ]


def draw(results: "Results") -> "Figure":
    """Draws a bar for each model and group, and for all tasks."""
    from experiments.runner import pictures

    everything = tuple(map(_of_all, results.found))
    results = dataclasses.replace(results, found=(*everything, *results.found))
    figure, (axes,) = pictures.panels(1, width=8)
    pictures.bars(axes, results, group="group")
    groups = results.groups("group").items()
    names = [f"{name}\n({len(part.groups('task'))} tasks)" for name, part in groups]
    for each in figure.axes:
        each.set_xticks(range(len(names)), names)
        each.set(ylabel="accuracy [%]", ylim=(0, 100))
    return pictures.finish(figure)


def _of_all(result: "Result") -> "Result":
    labels = {**result.measurement.labels, "group": ALL}
    measurement = dataclasses.replace(result.measurement, labels=labels)
    return dataclasses.replace(result, measurement=measurement)


EXPERIMENT = Experiment(
    "figure2",
    "Figure 2: VTAB in groups of tasks",
    measure,
    rows=("group", "task"),
    column="model",
    draw=draw,
    about="The 19 tasks of VTAB, 1,000 training images each, in their three groups: natural, "
    "specialized and structured. A bar is the plain mean over the tasks of its group. Shown are "
    "the three columns of Table 9, from which the bars of the paper are computed here; the "
    "other models of its figure are left out.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
