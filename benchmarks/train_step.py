"""A training step: ours beside what one would use instead, on one device.

    python benchmarks/train_step.py ViT-Ti/16 8
    python benchmarks/train_step.py ViT-B/16 256 --dtype bfloat16 --override remat=dots

The peers are the model of stock Flax modules in the way of the official code, with optax.adamw;
timm's, eager and by torch.compile, and Hugging Face's, with PyTorch's fused AdamW, in 16 bits under
autocast. All begin with the same weights and do AdamW (Table 3: betas 0.9 and 0.999, weight decay
0.1) on the same batch. Before they are timed, the loss and the gradient of every parameter are held
against the official model in 32 bits, and then the loss after an update.

The last line has the ratios of times, ours to theirs, below 1 where ours is faster: medians over
the rounds. Of timm's two the faster one counts.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paired
import peers
import turns
from flax.traverse_util import flatten_dict
from peers import Arrays, Workload

from vit_jax import state as states
from vit_jax import steps
from vit_jax.analysis.flops import multiply_adds, train_flops
from vit_jax.checkpoints import layouts
from vit_jax.models import create_model
from vit_jax.xla_flags import compiler_options

B1, B2, EPSILON = 0.9, 0.999, 1e-8
WEIGHT_DECAY = 0.1
LEARNING_RATE = 1e-4
# Images that the reference computes at once: it needs the memory of 32 bits.
REFERENCE_BATCH = 8


class JaxTrainer:
    """A model that JAX trains on one batch, again and again.

    Attributes:
        temporaries: bytes beside the state and the batch that the compiled step needs.
    """

    def __init__(
        self, step: Callable, state: Any, batch: dict[str, np.ndarray], options: Any = None
    ) -> None:
        """Compiles step, of (state, batch), whose state is donated, with options of XLA."""
        self._state, self._batch = jax.device_put((state, batch))
        lowered = jax.jit(step, donate_argnums=0).lower(self._state, self._batch)
        with turns.compiling():
            self._step = lowered.compile(options)
        memory = self._step.memory_analysis()
        self.temporaries = None if memory is None else memory.temp_size_in_bytes

    def __call__(self, updates: int) -> None:
        """Does that many updates."""
        for _ in range(updates):
            self._state, self._metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, self._metrics))

    def loss(self) -> float:
        """Of the batch before the last update."""
        return float(self._metrics["loss"])

    def gradients(self) -> Arrays:
        """Those of the first update, if no other has been done: Adam's first moment has them."""
        mu = optax.tree_utils.tree_get(self._state, "mu")
        return {
            name: np.asarray(x, np.float32) / np.float32(1 - B1)
            for name, x in flatten_dict(mu, sep="/").items()
        }


def ours(load: Workload) -> JaxTrainer:
    """`vit_jax.steps.train_step` with the optimizer of the recipes."""
    model = create_model(load.config)
    optimizer = states.adam(
        optax.constant_schedule(LEARNING_RATE),
        b1=B1,
        b2=B2,
        weight_decay=WEIGHT_DECAY,
        decay="all",
        mu_dtype="float32",
        clip_norm=0.0,
    )
    params = load.tree
    state = states.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=None,
        rng=jax.random.key(0),
    )
    objective = steps.classification(model, "softmax")
    step = functools.partial(steps.train_step, objective=objective, optimizer=optimizer)
    batch = {"image": load.images, "label": load.labels}
    return JaxTrainer(step, state, batch, compiler_options(jax.default_backend()))


def official(load: Workload) -> JaxTrainer:
    """The step of the official code: the stock model, its loss and optax.adamw."""
    model = peers.official(load)
    optimizer = optax.adamw(LEARNING_RATE, b1=B1, b2=B2, eps=EPSILON, weight_decay=WEIGHT_DECAY)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state, rng = state
        rng, dropout_rng = jax.random.split(rng)
        loss_fn = functools.partial(_official_loss, model, rngs={"dropout": dropout_rng})
        loss, grads = jax.value_and_grad(loss_fn)(params, batch["image"], batch["label"])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, rng), {"loss": loss}

    params = load.tree
    state = (params, optimizer.init(params), jax.random.key(0))
    return JaxTrainer(step, state, {"image": load.images, "label": load.labels})


def _official_loss(model: Any, params: Any, images: Any, labels: Any, **options: Any) -> jax.Array:
    logits = model.apply({"params": params}, images, train=bool(options), **options)
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))


class TorchTrainer:
    """A model that PyTorch trains on one batch, again and again."""

    temporaries = None

    def __init__(self, peer: str, load: Workload) -> None:
        """Puts everything on the device; the first update compiles, if anything does."""
        import torch

        self._module, self._layout, self._device = peers.torch_module(peer, load)
        self._module.train()
        self._num_heads = load.description.num_heads
        images = np.ascontiguousarray(load.images.transpose(0, 3, 1, 2))
        self._images = torch.from_numpy(images).to(self._device)
        self._labels = torch.from_numpy(load.labels.astype(np.int64)).to(self._device)
        self._in_16_bits = load.config["dtype"] == "bfloat16"
        self._optimizer = torch.optim.AdamW(
            self._module.parameters(),
            lr=LEARNING_RATE,
            betas=(B1, B2),
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def __call__(self, updates: int) -> None:
        """Does that many updates."""
        import torch

        for _ in range(updates):
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self._device, torch.bfloat16, enabled=self._in_16_bits):
                logits = self._module(self._images)
                logits = getattr(logits, "logits", logits)
            self._loss = torch.nn.functional.cross_entropy(logits.float(), self._labels)
            self._loss.backward()
            self._optimizer.step()
        paired.wait_for_torch(self._device)

    def loss(self) -> float:
        """Of the batch before the last update."""
        return self._loss.item()

    def gradients(self) -> Arrays:
        """Those of the last update."""
        found = {n: p.grad.float().cpu().numpy() for n, p in self._module.named_parameters()}
        return layouts.to_official(found, self._layout, self._num_heads)


def reference(load: Workload) -> tuple[float, Arrays]:
    """The loss and the gradients of the batch, by the official model in 32 bits."""
    load = dataclasses.replace(load, config={**load.config, "dtype": "float32"})
    grad_fn = jax.value_and_grad(functools.partial(_official_loss, peers.official(load)))
    parts = load.batch // math.gcd(load.batch, REFERENCE_BATCH)
    split = [x.reshape(parts, -1, *x.shape[1:]) for x in (load.images, load.labels)]

    @jax.jit
    def mean(params: Any, split: Any) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, *part)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.tree.map(lambda x: x / parts, jax.lax.scan(add, zeros, split)[0])

    with jax.default_matmul_precision("highest"):
        loss, gradients = jax.device_get(mean(load.tree, split))
    return float(loss), flatten_dict(gradients, sep="/")


TRAINERS: dict[str, Callable[[Workload], Any]] = {
    peers.OURS: ours,
    peers.OFFICIAL: official,
    **{peer: functools.partial(TorchTrainer, peer) for peer in peers.PEERS[1:]},
}


class Check:
    """Does two updates of a trainer, and holds them against the reference."""

    def __init__(self, load: Workload) -> None:
        """Computes the reference."""
        self._loss, self._gradients = reference(load)
        self._change: float | None = None

    def __call__(self, name: str, trainer: Any, limit: float) -> dict[str, float]:
        """Returns the errors, and by how much the first update changes the loss.

        Raises:
            Wrong: an error is above the limit, or the change another than that of the first.
        """
        trainer(1)
        loss = trainer.loss()
        errors = {
            "loss": abs(loss - self._loss) / self._loss,
            "gradients": peers.gradient_error(trainer.gradients(), self._gradients),
        }
        for what, error in errors.items():
            peers.check(name, what, error, limit)
        trainer(1)
        change = trainer.loss() - loss
        self._change = self._change or change
        peers.check(name, "the loss after an update", abs(change / self._change - 1), 5 * limit)
        return {**errors, "change_of_loss": change}


def do_two_updates(name: str, trainer: Any, limit: float) -> dict[str, float]:
    """In place of a check: returns the first loss, and by how much an update changes it."""
    del limit
    trainer(1)
    loss = trainer.loss()
    trainer(1)
    change = trainer.loss() - loss
    peers.check(name, "a loss that an update brings down", change, 0.0)
    return {"loss": loss, "change_of_loss": change}


def main(argv: list[str] | None = None) -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers.add_arguments(parser)
    parser.add_argument(
        "--unchecked", action="store_true", help="spare the reference: it takes long to compile"
    )
    args, load = peers.parse(parser, argv)
    check = do_two_updates if args.unchecked else Check(load)
    trainers, found = peers.build(load, args.peers, TRAINERS, check)
    flops = train_flops(multiply_adds(load.config, load.image_size, peers.NUM_CLASSES))
    peers.compare("train_step", args, load, trainers, found, flops)


if __name__ == "__main__":
    sys.exit(main())
