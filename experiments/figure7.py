"""Figure 7: filters and position embeddings of ViT-L/32, attention distance of ViT-L/16."""

from typing import TYPE_CHECKING

from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement, Run, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

    from experiments.runner.results import Result, Results
    from experiments.runner.setting import Setting

IMAGES = 128
# Of the embeddings and of the attention, and what the table says of it.
OF_EMBEDDINGS = {
    "variance": "variance in the filters shown",
    "neighbors": "similarity of neighboring positions",
    "line": "similarity within a row or column",
    "others": "similarity of other positions",
}
OF_ATTENTION = {
    "lowest_nearest": "distance of the nearest head, lowest layer",
    "lowest_farthest": "distance of the farthest head, lowest layer",
    "highest_mean": "mean distance, highest layer",
}


def measure(setting: "Setting") -> list[Measurement]:
    """Lists what the pictures are said to show, as numbers."""
    embeddings = embedding_task(setting.pretrain("ViT-L/32", "jft"))
    distances = distance_task(setting.pretrain("ViT-L/16", "jft"))
    parts = (("ViT-L/32", embeddings, OF_EMBEDDINGS), ("ViT-L/16", distances, OF_ATTENTION))
    return [
        Measurement(
            {"model": model, "quantity": words},
            [task],
            metric,
            percent="similarity" not in words,
        )
        for model, task, quantities in parts
        for metric, words in quantities.items()
    ]


def embedding_task(run: Run) -> Task:
    """The analysis of a run's filters and position embeddings."""
    return Task(f"embeddings-{run.name}", "experiments.runner.analyses:embeddings_of", of=(run,))


def distance_task(run: Run) -> Task:
    """The analysis of a run's attention distances."""
    function = "experiments.runner.analyses:distances_of"
    return Task(f"distance-{run.name}", function, {"images": IMAGES}, of=(run,))


def draw(results: "Results") -> "Figure":
    """Draws filters, similarities and distances beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, center, right = figure.subfigures(1, 3, width_ratios=(4.4, 4.6, 5))
    embeddings, distances = (results.where(model=x).found[0] for x in ("ViT-L/32", "ViT-L/16"))
    _draw_embeddings(results, embeddings, left, center)
    draw_distances(results, distances, right)
    return figure


def _draw_embeddings(
    results: "Results", result: "Result", left: "FigureBase", center: "FigureBase"
) -> None:
    from experiments.runner import analyses
    from vit_jax.analysis import plots
    from vit_jax.analysis.embeddings import to_rgb

    model, arrays = result.measurement.labels["model"], analyses.load_arrays(results, result)
    if arrays is None:
        for figure in (left, center):
            analyses.nothing(figure, result)
        return
    components = arrays["components"]
    plots.draw_filters(left, to_rgb(components), result.mean or 0)
    left.suptitle(f"{model}: first {len(components)} principal components\nof the RGB filters")
    plots.draw_similarity(center, arrays["similarity"])
    center.axes[0].set_title(f"{model}: similarity of position embeddings")


def draw_distances(results: "Results", result: "Result", figure: "FigureBase") -> None:
    """Draws the attention distances of a model's heads."""
    from experiments.runner import analyses
    from vit_jax.analysis import plots

    arrays = analyses.load_arrays(results, result)
    if arrays is None:
        analyses.nothing(figure, result)
        return
    images = int(arrays["images"])
    plots.draw_distances(figure, arrays["distances"], float(arrays["uniform"]), images)
    figure.axes[0].set_title(f"{result.measurement.labels['model']}: attention distance")


EXPERIMENT = Experiment(
    "figure7",
    "Figure 7: filters, position embeddings, attention distance",
    measure,
    rows=("model",),
    column="quantity",
    draw=draw,
    about="Left, the first 28 principal components of the filters of the patch embedding of "
    "ViT-L/32; center, the cosine similarity of its position embeddings, a tile for each patch; "
    f"right, the mean attention distance of every head of ViT-L/16 (Appendix D.7), over {IMAGES} "
    "images. Both are as pre-trained on JFT-300M. Distances in the table are in sides of the "
    "image. No such numbers of the paper are known here.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
