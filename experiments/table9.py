"""Table 9: the 19 tasks of VTAB-1k."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.transfer import NAMES, score
from vit_jax.data.vtab import PREFIX, TASKS

if TYPE_CHECKING:
    from experiments.runner.setting import Setting


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the cells of the paper."""
    return [
        Measurement(
            {
                "group": TASKS[task].group if task in TASKS else "",
                "task": task.replace("_", " "),
                "model": f"{model}, {NAMES[dataset]}",
            },
            **score(
                setting,
                setting.pretrain(model, dataset),
                f"{PREFIX}{task}" if task in TASKS else "vtab",
            ),
            paper=accuracy,
        )
        for (task, model, dataset), accuracy in paper.TABLE_9.items()
    ]


EXPERIMENT = Experiment(
    "table9",
    "Table 9: VTAB-1k",
    measure,
    rows=("group", "task"),
    column="model",
    about="Every task has 1,000 images to fine-tune on (fewer at a smaller scale), and all "
    "share one setting: learning rate 0.01, 2,500 steps, 384 pixels, which a smaller scale "
    "reduces. The mean is that of the 19 tasks, and stands in Table 2, too. In the paper, "
    "ViT-H/14 is ahead on most; Figure 2 draws the means of the groups.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
