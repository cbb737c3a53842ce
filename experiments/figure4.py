"""Figure 4: images of pre-training against few-shot accuracy, with early stopping."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

# The paper's 9M, 30M, 90M and all of the 303M images of JFT.
PERCENT = {9_000_000: 3, 30_000_000: 10, 90_000_000: 30, 300_000_000: 100}


def measure(setting: "Setting") -> list[Measurement]:
    """Lists four models and two ResNets on four parts of JFT."""
    return [
        Measurement(
            {"model": model, "JFT": f"{PERCENT[images]}%"},
            [
                setting.pretrain(model, "jft", subset=f"{PERCENT[images]}%", seed=seed)
                for seed in range(setting.seeds)
            ],
            setting.fewshot_metric,
            at_best=True,
            paper=accuracy,
            x=setting.num_images("jft") * PERCENT[images] / 100,
            paper_x=images,
        )
        for (model, images), accuracy in paper.FIGURE_4.items()
    ]


def draw(results: "Results") -> "Figure":
    """Draws a line for each model."""
    from experiments.runner import pictures

    figure, (axes,) = pictures.panels(1, width=6, height=4.4)
    pictures.points(axes, results, log="x")
    axes.set(xlabel="number of JFT pre-training images", ylabel="linear 5-shot ImageNet top-1 [%]")
    return pictures.finish(figure)


EXPERIMENT = Experiment(
    "figure4",
    "Figure 4: few-shot accuracy by the size of the data set of pre-training",
    measure,
    rows=("model",),
    column="JFT",
    draw=draw,
    about="Models pre-trained on random parts of JFT, all with the hyperparameters of Table 3 "
    "and for as many steps as on all of it, stopped early and read at the best evaluation on "
    "held-out images. In the paper, ResNets are ahead on the smallest part and level off "
    "sooner, and ViTs overtake them on more: ViT-B/32 is much worse than R50x1 on 9M images and "
    "better on 90M. The paper's points are read off its figure. It gives no patience: here it "
    "is a tenth of a run's evaluations. ViT-b/32 is B/32 with every hidden size halved.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
