"""Figure 3: the data set of pre-training against accuracy on ImageNet. Shares Table 5's runs."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.transfer import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

DATASETS = ("imagenet2012", "imagenet21k", "jft")
TRANSFORMERS = {
    (model, dataset): accuracy
    for (dataset, task, model), accuracy in paper.TABLE_5.items()
    if task == "imagenet2012"
}
# Not in the paper: which of BiT's ResNets span the area. These are the smallest one, and the
# largest that Table 3 has.
BAND = ("R50x1", "R152x2")
RESNETS = {
    (model, dataset): paper.TABLE_6[model, 7, "imagenet2012"] if dataset == "jft" else None
    for model in BAND
    for dataset in DATASETS
}


def measure(setting: "Setting") -> list[Measurement]:
    """Lists every model on every data set that the paper has for it."""
    return [
        Measurement(
            {"pre-trained on": NAMES[dataset], "model": model},
            setting.finetune(setting.pretrain(model, dataset), "imagenet2012"),
            paper=accuracy,
            x=place,
            paper_x=place,
        )
        for (model, dataset), accuracy in {**TRANSFORMERS, **RESNETS}.items()
        for place in [DATASETS.index(dataset)]
    ]


def draw(results: "Results") -> "Figure":
    """Draws a line for each model over the three data sets, and the area between the ResNets."""
    from experiments.runner import pictures

    figure, (axes,) = pictures.panels(1, width=6.4, height=4.6)
    pictures.points(axes, results)
    _shade(axes, results)
    pictures.finish(figure)
    for each in figure.axes:
        each.set_xticks(range(len(DATASETS)), [NAMES[name] for name in DATASETS])
        each.set(xlabel="pre-training data set", ylabel="ImageNet top-1 [%]")
        each.margins(x=0.12)
    return figure


def _shade(axes: "Axes", results: "Results") -> None:
    from experiments.runner import pictures

    ends = [
        {r.measurement.x: r.mean for r in results.where(model=model).found if r.mean is not None}
        for model in BAND
    ]
    places = sorted(ends[0].keys() & ends[1].keys())
    lowest, highest = ([100 * end[place] for place in places] for end in ends)
    color = pictures.style(BAND[0])["color"]
    axes.fill_between(places, lowest, highest, color=color, alpha=0.15, linewidth=0, zorder=0)


EXPERIMENT = Experiment(
    "figure3",
    "Figure 3: transfer to ImageNet by the data set of pre-training",
    measure,
    rows=("model",),
    column="pre-trained on",
    draw=draw,
    about="Models pre-trained on ever more images and fine-tuned on ImageNet. In the paper, "
    "ViT-L is behind ViT-B after the smallest data set and ahead of it after the largest. Its "
    "numbers are Table 5's. The shaded area is between ResNets; which bound the paper's is not "
    "known here: these are R50x1 and R152x2, whose paper's numbers on JFT are Table 6's. Table "
    "3 has no ResNet on ImageNet and ImageNet-21k: there they take ViT-B's row. Nor has it "
    "ViT-H/14 on ImageNet-21k, which takes ViT-L's.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
