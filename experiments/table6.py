"""Table 6: ViTs, ResNets and hybrids of all sizes after pre-training on JFT, and what it costs."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.transfer import NAMES, cost, score

if TYPE_CHECKING:
    from experiments.runner.setting import Setting


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the cells of the paper."""
    return [_cell(setting, *key, number) for key, number in paper.TABLE_6.items()]


def _cell(setting: "Setting", model: str, epochs: int, task: str, number: float) -> Measurement:
    start = setting.pretrain(model, "jft", epochs=epochs)
    return Measurement(
        {"model": model, "epochs": str(epochs), "task": NAMES[task]},
        **cost(setting, start) if task == "exaflops" else score(setting, start, task),
        paper=number,
    )


EXPERIMENT = Experiment(
    "table6",
    "Table 6: scaling of ViTs, ResNets and hybrids",
    measure,
    rows=("model", "epochs"),
    column="task",
    about="Every model pre-trained on JFT-300M for 7 or 14 epochs and fine-tuned on each task; "
    "Figure 5 draws these numbers. ExaFLOPs are those of pre-training, 6 for each multiply-add "
    "of a forward pass. The epochs are the paper's: a smaller scale keeps their order, not "
    "their number. At the smoke scale the order of the models by compute is another, for "
    "ResNets keep their widths. Not in the paper: the recipe of R200x3, which takes that of "
    "R152x2.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
