"""Table 4: the recipes of fine-tuning, and which learning rate each task takes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement, Run, Task
from experiments.transfer import NAMES, score

if TYPE_CHECKING:
    from experiments.runner.setting import Setting

# Not in the paper: of which model. This one is in Table 5 with public data.
MODEL, DATASET = "ViT-B/16", "imagenet21k"
SWEPT = [task for task, (_, rates) in paper.TABLE_4.items() if len(rates) > 1]


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the held-out accuracy at every rate; then the rate that is taken, and its accuracy."""
    start = setting.pretrain(MODEL, DATASET)
    finals = {task: setting.finetune(start, task) for task in SWEPT}
    held_out = {
        (run.config.schedule.base_lr, task): run for task in SWEPT for run in finals[task][0].rates
    }
    return [
        *(
            Measurement(_labels(task, f"{rate:g}"), [run])
            for (rate, task), run in sorted(held_out.items())
        ),
        *(_taken(task, finals[task][0]) for task in SWEPT),
        *(
            Measurement(
                _labels(task, "test"),
                **score(setting, start, task),
                paper=paper.TABLE_5.get((DATASET, task, MODEL)),
            )
            for task in paper.TABLE_4
        ),
    ]


def _labels(task: str, column: str) -> Mapping[str, str]:
    return {"task": NAMES[task], "steps": f"{paper.TABLE_4[task][0]}", "learning rate": column}


def _taken(task: str, run: Run) -> Measurement:
    source = Task(f"rate-{run.name}", "experiments.transfer:base_lr", of=(run,))
    return Measurement(_labels(task, "taken"), [source], "base_lr", percent=False)


EXPERIMENT = Experiment(
    "table4",
    "Table 4: fine-tuning",
    measure,
    rows=("task", "steps"),
    column="learning rate",
    about="Every rate of a task is tried with a part of the training images held out: in the "
    "paper 10% of Pets and Flowers, 2% of CIFAR, 1% of ImageNet; at a smaller scale as many of "
    "all. The columns of rates are accuracies on that part. The most accurate, the lowest of "
    "equals, is taken and trained on all training images; test is what that reaches. All tasks "
    "of VTAB share the rate 0.01; the number is their mean. Which rates the paper took is not "
    "known here, and its numbers beside test are Table 5's. Chosen here: ViT-B/16 pre-trained "
    "on ImageNet-21k. Steps are the paper's; a smaller scale has fewer, and two rates of a row, "
    "multiplied.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
