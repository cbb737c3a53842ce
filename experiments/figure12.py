"""Figure 12: images a second and the largest batch, by the size of the image (Appendix D.5)."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command, speed
from experiments.runner.experiment import Experiment, Measurement, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

QUANTITIES = {"speed": "images/s", "batch": "largest batch"}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SECONDS = 2.0
# What a smaller scale measures: a compilation takes longer than what it compiles.
FEW_SIZES, FEW_BATCHES, FEW_SECONDS = (64, 224, 512), (4, 64), 0.1


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the speed and the largest batch of every model and size."""
    return [
        Measurement(
            {"model": model, "quantity": words, "pixels": str(size)},
            [task],
            f"{quantity}/{size}px",
            percent=False,
            x=task.arguments["sizes"][str(size)],
            paper_x=size,
        )
        for model in paper.FIGURE_12_MODELS
        for task in [speed_task(setting, model)]
        for quantity, words in QUANTITIES.items()
        for size in sizes(setting)
    ]


def sizes(setting: "Setting") -> tuple[int, ...]:
    """The image sizes that are measured, the paper's."""
    return paper.FIGURE_12_IMAGE_SIZES if setting.scale.name == "paper" else FEW_SIZES


def speed_task(setting: "Setting", model: str) -> Task:
    """The measurement of a model's speed and memory at all image sizes."""
    from vit_jax.config import to_dict
    from vit_jax.models import create_model

    run = setting.pretrain(model, "jft")
    config = {**to_dict(run.config)["model"], "num_classes": 1000, "head_bias_init": 0.0}
    side = create_model(config).downsampling
    scaled = {size: size * run.config.dataset.image_size / 224 for size in sizes(setting)}
    whole = setting.scale.name == "paper"
    arguments = {
        "model": config,
        # To whole patches: of H/14 512 pixels become 518, as in Table 2.
        "sizes": {str(size): max(-int(-x // side), 1) * side for size, x in scaled.items()},
        "batches": list(BATCHES if whole else FEW_BATCHES),
        "seconds": SECONDS if whole else FEW_SECONDS,
    }
    name = f"speed-{model.replace('/', '-').replace('+', '-')}"
    return Task(name, "experiments.runner.speed:measure_speed", arguments, alone=True)


def draw(results: "Results") -> "Figure":
    """Draws both quantities of every model over the image sizes."""
    from experiments.runner import pictures

    figure, panels = pictures.panels(2, width=5.6, height=4.4)
    labels = ("inference speed [images/s/core]", f"largest batch in {speed.MEMORY >> 30} GiB")
    for axes, words, label in zip(panels, QUANTITIES.values(), labels, strict=True):
        pictures.points(axes, results.where(quantity=words), log="xy")
        axes.set(xlabel="input size [pixels]", ylabel=label)
    return pictures.finish(figure)


EXPERIMENT = Experiment(
    "figure12",
    "Figure 12: speed and memory by the size of the image",
    measure,
    rows=("model", "quantity"),
    column="pixels",
    draw=draw,
    about="Left, images a second in the forward pass on one device, the best over batch sizes; "
    "right, the largest batch whose compiled program needs at most 16 GiB, the memory of the "
    "paper's TPU v3 core, whatever this device has. Whether the paper's largest batch is in "
    "training is not known here; this is in the forward pass. No number is comparable with the "
    "paper's, whose points are not known here, nor between devices. Smaller scales have smaller "
    "models and images, and fewer of both sizes and batches.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
