"""Table 2: the largest models beside the best of others."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.transfer import NAMES, cost, score

if TYPE_CHECKING:
    from experiments.runner.setting import Setting

OTHERS = {"BiT-L": "BiT-L (R152x4)", "Noisy Student": "Noisy Student (EfficientNet-L2)"}


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the accuracies of ours and, of others, what the paper has; then the costs."""
    starts = {
        (model, dataset): setting.pretrain(model, dataset) for _, model, dataset in paper.TABLE_2
    }
    ours = [
        Measurement(
            _labels(task, model, dataset),
            **score(setting, starts[model, dataset], task, large=True),
            paper=mean,
            paper_sd=sd,
        )
        for (task, model, dataset), (mean, sd) in paper.TABLE_2.items()
    ]
    others = [
        Measurement(_labels(task, model), [], paper=mean, paper_sd=sd)
        for (task, model), (mean, sd) in paper.TABLE_2_OTHERS.items()
    ]
    costs = [
        Measurement(
            _labels("exaflops", *start),
            **cost(setting, run),
            paper=paper.TABLE_6.get((start[0], 14, "exaflops")) if start[1] == "jft" else None,
        )
        for start, run in starts.items()
    ]
    core_days = [
        Measurement(_labels("thousand TPUv3-core-days", *start), [], paper=number, percent=False)
        for start, number in paper.TABLE_2_CORE_DAYS.items()
    ]
    return [*ours, *others, *costs, *core_days]


def _labels(task: str, model: str, dataset: str = "") -> dict[str, str]:
    of = f"{model}, {NAMES[dataset]}" if dataset else OTHERS[model]
    return {"task": NAMES.get(task, task), "model": of}


EXPERIMENT = Experiment(
    "table2",
    "Table 2: comparison with the state of the art",
    measure,
    rows=("task",),
    column="model",
    about="The paper's largest models, pre-trained on JFT-300M or ImageNet-21k and fine-tuned "
    "on each task, the mean and the deviation of several runs of fine-tuning. In the paper, "
    "ViT-H/14 is ahead of BiT-L and Noisy Student, for fewer core-days; those two columns are "
    "the paper's alone, nothing of them is run. On ImageNet and ReaL, fine-tuning is at 512 "
    "pixels (518 of H/14), with Polyak averaging; a smaller scale has fewer pixels. The days of "
    "TPUv3 cores are the paper's; what our pre-training needs is counted in exaFLOPs, beside "
    "those of Table 6.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
