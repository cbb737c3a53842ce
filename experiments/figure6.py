"""Figure 6: what the class token attends to. Shares its maps with Figure 14."""

from typing import TYPE_CHECKING

from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

SHOWN, COMPUTED = 3, 24
ABOUT = (
    "Attention rollout (Appendix D.8) of ViT-L/16, pre-trained on JFT-300M and fine-tuned on "
    "ImageNet: the mean over the heads of every layer, the identity for the residual connection, "
    "rows made to sum to 1, all layers multiplied. The class token's row of the result, enlarged "
    "to the image, is laid over it as a mask. The number "
    "is the share of the patches over which the attention is spread: e to "
    "the power of its entropy, by the number of patches. "
)


def measure(setting: "Setting") -> list[Measurement]:
    """Lists how widely the attention is spread."""
    run = setting.finetune(setting.pretrain("ViT-L/16", "jft"), "imagenet2012")[0]
    function = "experiments.runner.analyses:rollouts"
    task = Task(f"rollout-{run.name}", function, {"images": COMPUTED}, of=(run,))
    return [Measurement({"model": "ViT-L/16", "of the patches": "attended to"}, [task], "spread")]


def draw(results: "Results") -> "Figure":
    """Draws three images and their masks."""
    return draw_masks(results, SHOWN)


def draw_masks(results: "Results", count: int) -> "Figure":
    """Draws the first images and their masks."""
    from matplotlib.figure import Figure

    from experiments.runner import analyses
    from vit_jax.analysis import plots

    arrays = analyses.load_arrays(results, results.found[0])
    if arrays is None:
        figure = Figure(figsize=(6, 1.5))
        analyses.nothing(figure, results.found[0])
        return figure
    return plots.masked_images(arrays["images"][:count], arrays["masks"][:count])


EXPERIMENT = Experiment(
    "figure6",
    "Figure 6: examples of attention from the class token to the image",
    measure,
    rows=("model",),
    column="of the patches",
    draw=draw,
    about=ABOUT + "Which run the paper shows is not known here. The images are the first three of "
    "those drawn at random for Figure 14, whatever they show.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
