"""Figure 9: the class token against global average pooling, at three learning rates (D.3)."""

import json
from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.experiment import Run
    from experiments.runner.results import Result, Results
    from experiments.runner.setting import Setting

MODEL = "ViT-B/32"
EPOCHS = 7  # Table 3's.
NAMES = {"token": "CLS-Token", "gap": "GAP"}
# The paper has no class token at 3e-4, and no rate between: Appendix D.3's claim is about rates.
RATES = (3e-4, 5e-4, 8e-4)


def measure(setting: "Setting") -> list[Measurement]:
    """Lists both classifiers at every rate."""
    return [
        Measurement(
            {"classifier": NAMES[classifier], "base_lr": f"{rate:g}"},
            [
                setting.pretrain(
                    MODEL,
                    "jft",
                    seed=seed,
                    variant=f"{classifier}-lr{rate:g}",
                    changes={
                        "model.classifier": classifier,
                        "schedule.base_lr": rate,
                        "evals.fewshot.every": "1 epochs",
                    },
                )
                for seed in range(setting.seeds)
            ],
            setting.fewshot_metric,
            paper=paper.FIGURE_9.get((classifier, rate)),
        )
        for classifier in NAMES
        for rate in RATES
    ]


def draw(results: "Results") -> "Figure":
    """Draws the few-shot accuracy of every run as it goes, and the paper's at the end."""
    from experiments.runner import pictures

    figure, (axes,) = pictures.panels(1, width=6, height=4.2)
    names = [_name(result) for result in results.found]
    styles = pictures.series_styles(names)
    behind = pictures.paper_axes(axes, results)
    for name, result in zip(names, results.found, strict=True):
        looks = styles[name]
        curves = [_curve(results, source) for source in result.measurement.sources]
        for number, curve in enumerate(filter(None, curves)):
            label = None if number else name
            axes.plot(*zip(*curve, strict=True), label=label, **{**looks, "markersize": 4})
        if result.measurement.paper is not None:
            behind.axhline(result.measurement.paper, color=looks["color"], alpha=0.4, linewidth=1.5)
    if behind is not axes:
        behind.set(xlim=(0, EPOCHS))
    axes.set(xlabel="epochs of training", ylabel="ImageNet linear 5-shot accuracy [%]")
    return pictures.finish(figure)


def _name(result: "Result") -> str:
    labels = result.measurement.labels
    return f"{labels['classifier']}, lr={labels['base_lr']}"


def _curve(results: "Results", run: "Run") -> list[tuple[float, float]]:
    """The epochs and few-shot accuracies in percent at which a run was evaluated."""
    folder = results.folders.get(run.name)
    if folder is None:
        return []
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metric = results.setting.fewshot_metric
    an_epoch = results.setting.num_images("jft") / run.config.batch_size
    return [(r["step"] / an_epoch, 100 * r[metric]) for r in records if metric in r]


EXPERIMENT = Experiment(
    "figure9",
    "Figure 9: class token and global average pooling",
    measure,
    rows=("classifier",),
    column="base_lr",
    draw=draw,
    about="ViT-B/32 pre-trained on JFT-300M with the class token as the representation, or with "
    "the mean over the patches, at several base learning rates. In the paper, pooling is as "
    "good as the class token if its learning rate is right: with 3e-4, not with 8e-4. The model "
    "is chosen here: the paper's class token reaches ViT-B/32's accuracy of Figures 4 and 13. "
    "The paper has three curves, read off where they end, the horizontal lines; the others are "
    "measured here, for the claim is about rates. A smaller scale multiplies the rates.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
