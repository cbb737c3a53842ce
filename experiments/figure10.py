"""Figure 10: position embeddings of ViT-L/16 under three settings of hyperparameters (D.4)."""

from typing import TYPE_CHECKING, Any

from experiments import figure7
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

MODEL = "ViT-L/16"
# The last two are Table 3's own, the first is from memory of the paper.
SETTINGS: dict[str, dict[str, Any]] = {
    "7 epochs, LR=0.0002, WD=0.01": {
        "epochs": 7,
        "variant": "lr0.0002-wd0.01",
        "changes": {"schedule.base_lr": 2e-4, "optimizer.weight_decay": 0.01},
    },
    "7 epochs, LR=0.0004, WD=0.1": {"epochs": 7},
    "14 epochs, LR=0.0004, WD=0.1": {"epochs": 14},
}
QUANTITIES = {name: figure7.OF_EMBEDDINGS[name] for name in ("neighbors", "line", "others")}


def measure(setting: "Setting") -> list[Measurement]:
    """Lists mean similarities under every setting."""
    tasks = {
        name: figure7.embedding_task(setting.pretrain(MODEL, "jft", **options))
        for name, options in SETTINGS.items()
    }
    return [
        Measurement({"setting": name, "quantity": words}, [task], metric, percent=False)
        for name, task in tasks.items()
        for metric, words in QUANTITIES.items()
    ]


def draw(results: "Results") -> "Figure":
    """Draws the similarities of all positions, a panel for each setting."""
    from matplotlib.figure import Figure

    from experiments.runner import analyses
    from vit_jax.analysis import plots

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    settings = results.groups("setting")
    parts = figure.subfigures(1, len(settings))
    for part, (name, found) in zip(parts, settings.items(), strict=True):
        arrays = analyses.load_arrays(results, found.found[0])
        if arrays is None:
            analyses.nothing(part, found.found[0])
            continue
        plots.draw_similarity(part, arrays["similarity"])
        part.axes[0].set_title(f"{MODEL}\n{name}", fontsize=10)
    return figure


EXPERIMENT = Experiment(
    "figure10",
    "Figure 10: position embeddings by hyperparameters",
    measure,
    rows=("setting",),
    column="quantity",
    draw=draw,
    about="The cosine similarities between the position embeddings of ViT-L/16, pre-trained on "
    "JFT-300M with three sets of hyperparameters. The last two are Table 3's; the first is from "
    "memory of the paper, not checked. The titles have the paper's values; smaller scales "
    "multiply learning rates by a factor and shorten all runs.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
