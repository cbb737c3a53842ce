"""Table 5: ViTs by model and by the data set of pre-training."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.transfer import NAMES, score

if TYPE_CHECKING:
    from experiments.runner.setting import Setting


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the cells that the paper has."""
    return [
        Measurement(
            {"pre-trained on": NAMES[dataset], "task": NAMES[task], "model": model},
            **score(setting, setting.pretrain(model, dataset), task),
            paper=accuracy,
        )
        for (dataset, task, model), accuracy in paper.TABLE_5.items()
    ]


EXPERIMENT = Experiment(
    "table5",
    "Table 5: transfer after pre-training on ImageNet, ImageNet-21k and JFT-300M",
    measure,
    rows=("pre-trained on", "task"),
    column="model",
    about="Each ViT pre-trained on each of three data sets and fine-tuned on each task at 384 "
    "pixels (fewer at a smaller scale), without Polyak averaging. In the paper, on ImageNet, "
    "ViT-L is behind ViT-B after the smallest data set and ahead of it after the largest. "
    "Figure 3 draws these numbers. Where Table 3 has two lengths, 7/14 or 30/90 epochs, these "
    "are the longer. It has no row for ViT-H/14 on ImageNet-21k, which takes ViT-L's.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
