"""Figure 14: more of what the class token attends to. Shares its maps with Figure 6."""

from typing import TYPE_CHECKING

from experiments import figure6
from experiments.runner import command
from experiments.runner.experiment import Experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results


def draw(results: "Results") -> "Figure":
    """Draws all images and their masks."""
    return figure6.draw_masks(results, figure6.COMPUTED)


EXPERIMENT = Experiment(
    "figure14",
    "Figure 14: further attention maps",
    figure6.measure,
    rows=("model",),
    column="of the patches",
    draw=draw,
    about=figure6.ABOUT
    + f"The images are {figure6.COMPUTED} drawn at random from those that the run is evaluated on, "
    "always the same.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
