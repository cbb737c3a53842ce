"""Figure 5: exaFLOPs of pre-training against accuracy. Shares the runs of Table 6."""

import statistics
from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.table7 import TASKS
from experiments.transfer import NAMES, score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

# ReaL is ImageNet again, and not among the five of Table 7's mean.
FIVE = [task for task in TASKS if task != "mean"]
AVERAGE, IMAGENET = "Average-5", NAMES["imagenet2012"]


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the mean of the five tasks, and ImageNet alone, of every model of Table 6."""
    found = []
    for model, epochs in dict.fromkeys(key[:2] for key in paper.TABLE_6):
        numbers = {task: paper.TABLE_6[model, epochs, task] for task in (*FIVE, "exaflops")}
        run = setting.pretrain(model, "jft", epochs=epochs)
        averages = {
            (AVERAGE, "mean"): statistics.fmean(numbers[task] for task in FIVE),
            (IMAGENET, "imagenet2012"): numbers["imagenet2012"],
        }
        found += [
            Measurement(
                {"model": model, "epochs": str(epochs), "task": name},
                **score(setting, run, task, mean_of=FIVE),
                paper=accuracy,
                x=setting.exaflops(run),
                paper_x=numbers["exaflops"],
            )
            for (name, task), accuracy in averages.items()
        ]
    return found


def draw(results: "Results") -> "Figure":
    """Draws a panel for the mean and one for ImageNet."""
    from experiments.runner import pictures

    figure, panels = pictures.panels(2)
    for axes, (task, part) in zip(panels, results.groups("task").items(), strict=True):
        axes.set(title=task, xlabel="total pre-training compute [exaFLOPs]")
        axes.set_ylabel("transfer accuracy [%]")
        pictures.points(axes, part, log="x", names=False, line=False)
    return pictures.finish(figure)


EXPERIMENT = Experiment(
    "figure5",
    "Figure 5: accuracy by the compute of pre-training",
    measure,
    rows=("model", "epochs"),
    column="task",
    draw=draw,
    about="The models of Table 6, pre-trained on JFT-300M and fine-tuned, by the floating-point "
    "operations of their pre-training; the paper's are Table 6's. Average-5 is the mean of "
    "ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers, as in Table 7; that these are the five of "
    "the paper's figure is from memory, not checked. So is what it says: for the same accuracy "
    "ViTs take less compute than ResNets, and small hybrids less than small ViTs. At the smoke "
    "scale the order of the models by compute is another, for ResNets keep their widths.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
