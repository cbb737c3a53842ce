"""The speed and memory of a model's forward pass on one device: a task (Appendix D.5)."""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

# Of a TPU v3 core, the paper's. A batch fits if the compiled program needs no more.
MEMORY = 16 * 2**30


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

        from vit_jax.models import create_model

        self._module = create_model(model)
        self._image_size = image_size
        shapes = jax.eval_shape(self._module.init, jax.random.key(0), self._images(1))["params"]
        rng, dtype = np.random.default_rng(0), self._module.config.compute_dtype

        def draw(x: "jax.ShapeDtypeStruct") -> "jax.Array":
            return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), dtype)

        self._params = jax.tree.map(draw, shapes)
        self._image = rng.uniform(-1, 1, (image_size, image_size, 3)).astype(np.float32)
        self._compiled: dict[int, Any] = {}
        stats = jax.devices()[0].memory_stats() or {}
        self.limit = stats.get("bytes_limit", MEMORY)

    def _images(self, batch: int) -> "jax.ShapeDtypeStruct":
        import jax

        return jax.ShapeDtypeStruct((batch, self._image_size, self._image_size, 3), np.float32)

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
        import jax.numpy as jnp

        images = jnp.broadcast_to(self._image, self._images(batch).shape)
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
