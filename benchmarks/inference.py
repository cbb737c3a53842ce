"""Logits of a batch of images: ours beside what one would use instead, on one device.

    python benchmarks/inference.py ViT-Ti/16 8
    python benchmarks/inference.py ViT-B/16 256 --dtype bfloat16

The peers are those of train_step.py, PyTorch's under torch.inference_mode; in 16 bits all weights
are converted before. Before they are timed, their logits are held against those of the official
model in 32 bits.

The last line has the ratios of times, ours to theirs, below 1 where ours is faster: medians over
the rounds. Of timm's two the faster one counts.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import paired
import peers
import turns
from peers import Workload

from vit_jax.analysis.flops import multiply_adds
from vit_jax.models import create_model
from vit_jax.xla_flags import compiler_options


class JaxPredictor:
    """A model whose logits JAX computes for one batch, again and again.

    Attributes:
        temporaries: bytes beside the weights and the images that the compiled program needs.
    """

    def __init__(self, model: Any, load: Workload, options: Any = None) -> None:
        """Compiles the model, its weights converted to the dtype of the computation.

        Args:
            model: ours or the official one.
            load: what it is to do.
            options: of the compiler.
        """
        weights = jax.tree.map(lambda x: x.astype(load.config["dtype"]), load.tree)
        self._arguments = jax.device_put(({"params": weights}, load.images))
        lowered = jax.jit(model.apply).lower(*self._arguments)
        with turns.compiling():
            self._apply = lowered.compile(options)
        memory = self._apply.memory_analysis()
        self.temporaries = None if memory is None else memory.temp_size_in_bytes

    def __call__(self, batches: int) -> None:
        """Goes through the batch that many times."""
        logits = [self._apply(*self._arguments) for _ in range(batches)]
        self._logits = jax.block_until_ready(logits)[-1]

    def logits(self) -> np.ndarray:
        """The last ones, [batch, classes]."""
        return np.asarray(self._logits, np.float32)


class TorchPredictor:
    """A model whose logits PyTorch computes for one batch, again and again."""

    temporaries = None

    def __init__(self, peer: str, load: Workload) -> None:
        """Puts everything on the device; the first call compiles, if anything does."""
        import torch

        self._module, _, self._device = peers.torch_module(peer, load)
        dtype = getattr(torch, load.config["dtype"])
        self._module.eval().to(dtype)
        images = np.ascontiguousarray(load.images.transpose(0, 3, 1, 2))
        self._images = torch.from_numpy(images).to(self._device, dtype)

    def __call__(self, batches: int) -> None:
        """Goes through the batch that many times."""
        import torch

        with torch.inference_mode():
            for _ in range(batches):
                logits = self._module(self._images)
        self._logits = getattr(logits, "logits", logits)
        paired.wait_for_torch(self._device)

    def logits(self) -> np.ndarray:
        """The last ones, [batch, classes]."""
        return self._logits.float().cpu().numpy()


PREDICTORS: dict[str, Callable[[Workload], Any]] = {
    peers.OURS: lambda load: JaxPredictor(
        create_model(load.config), load, compiler_options(jax.default_backend())
    ),
    peers.OFFICIAL: lambda load: JaxPredictor(peers.official(load), load),
    **{peer: functools.partial(TorchPredictor, peer) for peer in peers.PEERS[1:]},
}


def reference(load: Workload) -> np.ndarray:
    """The logits of the batch, by the official model in 32 bits."""
    load = dataclasses.replace(load, config={**load.config, "dtype": "float32"})
    with jax.default_matmul_precision("highest"):
        predictor = JaxPredictor(peers.official(load), load)
    predictor(1)
    return predictor.logits()


def main(argv: list[str] | None = None) -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers.add_arguments(parser)
    args, load = peers.parse(parser, argv)
    expected = reference(load)

    def check(name: str, predictor: Any, limit: float) -> dict[str, float]:
        predictor(1)
        error = peers.relative_error(predictor.logits(), expected)
        peers.check(name, "logits", error, limit)
        return {"logits": error}

    predictors, found = peers.build(load, args.peers, PREDICTORS, check)
    flops = 2 * multiply_adds(load.config, load.image_size, peers.NUM_CLASSES)
    peers.compare("inference", args, load, predictors, found, flops)


if __name__ == "__main__":
    sys.exit(main())
