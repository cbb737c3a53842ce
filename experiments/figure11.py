"""Figure 11: attention distance by layer and head, of a ViT and of a hybrid (Appendix D.7)."""

from typing import TYPE_CHECKING

from experiments import figure7
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

MODELS = ("ViT-L/16", "R50+ViT-L/16")


def measure(setting: "Setting") -> list[Measurement]:
    """Lists how far the heads of the lowest and the highest layer look."""
    return [
        Measurement({"model": model, "quantity": words}, [task], metric)
        for model in MODELS
        for task in [figure7.distance_task(setting.pretrain(model, "jft"))]
        for metric, words in figure7.OF_ATTENTION.items()
    ]


def draw(results: "Results") -> "Figure":
    """Draws a dot for each head, a panel for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    models = results.groups("model")
    parts = figure.subfigures(1, len(models))
    for part, group in zip(parts, models.values(), strict=True):
        figure7.draw_distances(results, group.found[0], part)
    return figure


EXPERIMENT = Experiment(
    "figure11",
    "Figure 11: attention distance of a ViT and of a hybrid",
    measure,
    rows=("model",),
    column="quantity",
    draw=draw,
    about="The distance between a patch and all others, weighted by attention and averaged over "
    f"the patches and {figure7.IMAGES} images: a dot for each head and layer of ViT-L/16 and of "
    "R50+ViT-L/16, both as pre-trained on JFT-300M. Distances in the table are in sides of the "
    "image. No such numbers of the paper are known here.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
