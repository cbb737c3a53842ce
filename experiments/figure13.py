"""Figure 13: axial attention, accuracy against compute and against speed (Appendix D.6)."""

import dataclasses
from typing import TYPE_CHECKING

from experiments import figure12, paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

ACCURACY, SPEED = "5-shot accuracy", "images/s"
EPOCHS = 7


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the accuracy, with the exaFLOPs, and the speed of every model."""
    found = []
    for model, (exaflops, accuracy) in paper.FIGURE_13.items():
        runs = [
            setting.pretrain(model, "jft", epochs=EPOCHS, seed=seed)
            for seed in range(setting.seeds)
        ]
        found += [
            Measurement(
                {"model": model, "quantity": ACCURACY},
                runs,
                setting.fewshot_metric,
                paper=accuracy,
                x=setting.exaflops(runs[0]),
                paper_x=exaflops,
            ),
            Measurement(
                {"model": model, "quantity": SPEED},
                [figure12.speed_task(setting, model)],
                "speed/224px",
                percent=False,
            ),
        ]
    return found


def draw(results: "Results") -> "Figure":
    """Draws accuracy over exaFLOPs, and over images a second."""
    from experiments.runner import pictures

    figure, (left, right) = pictures.panels(2, width=5, height=4)
    pictures.points(left, results.where(quantity=ACCURACY), log="x")
    left.set(xlabel="total compute [exaFLOPs]", ylabel="ImageNet 5-shot linear top-1 [%]")
    pictures.points(right, _by_speed(results), log="x")
    right.set(xlabel="peak inference speed [images/s/core]", ylabel=left.get_ylabel())
    return pictures.finish(figure)


def _by_speed(results: "Results") -> "Results":
    """The accuracies, with the speeds as their abscissas; the paper's speeds are not known."""
    speeds = {r.measurement.labels["model"]: r.mean for r in results.where(quantity=SPEED).found}
    found = [
        dataclasses.replace(
            result,
            measurement=dataclasses.replace(
                result.measurement, x=speeds[result.measurement.labels["model"]], paper_x=None
            ),
        )
        for result in results.where(quantity=ACCURACY).found
    ]
    return dataclasses.replace(results, found=tuple(found))


EXPERIMENT = Experiment(
    "figure13",
    "Figure 13: axial attention",
    measure,
    rows=("model",),
    column="quantity",
    draw=draw,
    about="Models pre-trained on JFT-300M for 7 epochs: 5-shot accuracy on ImageNet against the "
    "exaFLOPs of pre-training, and against the images a second of Figure 12 at 224 pixels. In "
    "the paper, whose points are read off, Axial-ViTs are ahead of the ViTs that they are made "
    "from and take more compute, for every layer has two MLPs. Its speeds are not known here "
    "and its points are not drawn there.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
