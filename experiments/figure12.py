"""Figure 12: images a second and the largest batch, by the size of the image (Appendix D.5)."""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement, Task

if TYPE_CHECKING:
    import jax
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

QUANTITIES = {"speed": "images/s", "batch": "largest batch"}
# Of a TPU v3 core, the paper's. A batch fits if the compiled program needs no more.
MEMORY = 16 * 2**30
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
    return Task(name, "experiments.figure12:measure_speed", arguments)


def measure_speed(
    workdir: pathlib.Path,
    runs: Sequence[pathlib.Path],
    model: Mapping[str, Any],
    sizes: Mapping[str, int],
    batches: Sequence[int],
    seconds: float,
) -> dict[str, float]:
    """Measures the forward pass of a model with random weights on one device.

    Args:
        workdir: stays empty.
        runs: none.
        model: the `model` section of a config.
        sizes: of the image in pixels, by their names.
        batches: images at a time that are tried, rising.
        seconds: for which each is timed, at least.

    Returns:
        By names of sizes: "speed/NAMEpx", images a second at the best of the batches, and
        "batch/NAMEpx", the largest batch that `MEMORY` takes.
    """
    del workdir, runs
    found = {}
    for name, size in sizes.items():
        programs = _Programs(model, size)
        speeds = []
        for batch in batches:
            if speeds and programs.needs(batch) > programs.limit:
                break
            speeds.append(programs.speed(batch, seconds))
        found[f"speed/{name}px"] = max(speeds)
        found[f"batch/{name}px"] = float(largest_batch(programs.needs, batches[0], batches[1]))
    return found


class _Programs:
    """The forward pass of a model, compiled for one batch after another."""

    def __init__(self, model: Mapping[str, Any], image_size: int):
        import jax
        import jax.numpy as jnp

        from vit_jax.models import DTYPES, create_model

        self._module = create_model(model)
        self._image_size = image_size
        images = jnp.zeros((1, image_size, image_size, 3))
        params = jax.jit(self._module.init)(jax.random.key(0), images)["params"]
        dtype = DTYPES[model["dtype"]]
        self._params = jax.tree.map(lambda x: x.astype(dtype), params)
        self._compiled: dict[int, Any] = {}
        stats = jax.devices()[0].memory_stats() or {}
        self.limit = stats.get("bytes_limit", MEMORY)

    def _images(self, batch: int) -> "jax.ShapeDtypeStruct":
        import jax
        import jax.numpy as jnp

        return jax.ShapeDtypeStruct((batch, self._image_size, self._image_size, 3), jnp.float32)

    def _compile(self, batch: int) -> Any:
        import jax

        if batch not in self._compiled:
            apply = jax.jit(lambda params, images: self._module.apply({"params": params}, images))
            self._compiled[batch] = apply.lower(self._params, self._images(batch)).compile()
        return self._compiled[batch]

    def needs(self, batch: int) -> int:
        """The bytes that the program for a batch takes, its weights and images among them."""
        memory = self._compile(batch).memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )

    def speed(self, batch: int, seconds: float) -> float:
        """Images a second, over so many seconds at least."""
        import jax

        shape = self._images(batch)
        images = jax.random.uniform(jax.random.key(1), shape.shape, shape.dtype, -1, 1)
        program = self._compile(batch)
        jax.block_until_ready(program(self._params, images))  # The first call prepares.
        begin, batches, taken = time.perf_counter(), 0, 0.0
        while taken < seconds:
            jax.block_until_ready(program(self._params, images))
            batches += 1
            taken = time.perf_counter() - begin
        return batches * batch / taken


def largest_batch(
    needs: Callable[[int], int], smaller: int, larger: int, memory: int = MEMORY
) -> int:
    """The largest batch that fits: memory is a constant and about so much for each image.

    A line through two batches tells where to look; what is found there is compiled to fit.

    Args:
        needs: bytes that a batch takes.
        smaller: a batch to begin with.
        larger: likewise.
        memory: in bytes.

    Returns:
        It, 0 if none fits.
    """
    slope = max((needs(larger) - needs(smaller)) / (larger - smaller), 1)
    batch = int(larger + (memory - needs(larger)) / slope)
    while batch > 0 and needs(batch) > memory:
        batch = min(batch - 1, int(batch * memory / needs(batch)))
    return max(batch, 0)


def draw(results: "Results") -> "Figure":
    """Draws both quantities of every model over the image sizes."""
    from experiments.runner import pictures

    figure, panels = pictures.panels(2, width=5.6, height=4.4)
    labels = ("inference speed [images/s/core]", f"largest batch in {MEMORY >> 30} GiB")
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
    "paper's TPU v3 core, whatever this device has. In the paper, ViTs are as fast as ResNets of "
    "their size and larger batches fit; the quadratic cost of attention hardly shows. It does not "
    "say whether its largest batch is in training; here it is in the forward pass. No number is "
    "comparable with the paper's, whose points cannot be read off, nor between devices. Smaller "
    "scales have smaller models and images, and fewer of both sizes and batches.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
