"""The train state, and the optimizer and schedule that a config describes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize, sides
from vit_jax.multipliers import with_multipliers

Params = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a run carries from one step to the next.

    The input needs no state of its own: the order of the images is a pure function of the seed and
    the step (see `vit_jax.data.pipeline`).

    Attributes:
        step: int32 scalar, the number of updates done.
        params: the parameters, float32, in the official tree.
        opt_state: of the optax optimizer.
        ema_params: Polyak average of params, or None.
        rng: typed PRNG key; step k draws from `fold_in(rng, k)`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None
    rng: jax.Array

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


# Those that `end_lr` ends.
ENDING_DECAYS = ("linear", "cosine")
DECAYS = (*ENDING_DECAYS, "rsqrt", "staircase")
# BiT's hyper-rule divides the learning rate by 10 after these shares of the steps (Kolesnikov et
# al., 2020, arXiv 1912.11370).
DROPS = (0.3, 0.6, 0.9)
# The arguments of `create_schedule` that count steps, which a config gives as durations.
SCHEDULE_LENGTHS = ("warmup", "timescale", "cooldown")


def check_warmup(warmup: float, total: float, unit: str = "steps", cooldown: float = 0) -> None:
    """Raises a UserError if a run of `total` steps, or epochs, ends before its warm-up does.

    Or, where it has a cool-down, if that would begin before.
    """
    if warmup >= total:
        raise UserError(
            f"schedule.warmup is {warmup:.9g} {unit} but the run has {total:.9g}: "
            "shorten --config.schedule.warmup or lengthen --config.duration"
        )
    if warmup + cooldown > total:
        raise UserError(
            f"schedule.cooldown is {cooldown:.9g} {unit} but the run has {total:.9g}, of which "
            f"{warmup:.9g} are the warm-up: shorten --config.schedule.cooldown"
        )


def create_schedule(
    *,
    base_lr: float,
    decay: str,
    warmup_steps: int,
    total_steps: int,
    end_lr: float,
    timescale_steps: int = 10_000,
    cooldown_steps: int = 0,
    drops: Sequence[float] = DROPS,
) -> optax.Schedule:
    """Linear warm-up from 0, a decay, and at the end a linear cool-down to 0, if any.

    Args:
        base_lr: the learning rate when the warm-up is over.
        decay: "linear" or "cosine", to end_lr at the end (Appendix B.1); "rsqrt", base_lr /
            sqrt(1 + t / timescale_steps) after t steps (Zhai et al., 2022, arXiv 2106.04560);
            "staircase", a tenth of what it was at each of the drops.
        warmup_steps: of the warm-up.
        total_steps: of the run.
        end_lr: of a linear or cosine decay.
        timescale_steps: of "rsqrt": after three times as many the rate has halved.
        cooldown_steps: in so many last steps the learning rate is multiplied by the share of them
            that is left. It goes with any decay.
        drops: of "staircase": shares of total_steps, after whose steps the rate is lower.

    Raises:
        UserError: the run is too short, or there is no such decay.
    """
    check_warmup(warmup_steps, total_steps, cooldown=cooldown_steps)
    decay_steps = total_steps - warmup_steps
    if decay == "cosine":
        after = optax.cosine_decay_schedule(base_lr, decay_steps, end_lr / base_lr)
    elif decay == "linear":
        after = optax.linear_schedule(base_lr, end_lr, decay_steps)
    elif decay == "rsqrt":
        after = _rsqrt(base_lr, timescale_steps)
    elif decay == "staircase":
        after = _staircase(base_lr, [round(x * total_steps) - warmup_steps for x in drops])
    else:
        raise UserError(f"schedule.decay {decay!r} is unknown: use {', '.join(DECAYS)}")
    warmup = optax.linear_schedule(0.0, base_lr, warmup_steps)
    schedule = optax.join_schedules([warmup, after], [warmup_steps])
    return _cooled(schedule, total_steps, cooldown_steps) if cooldown_steps else schedule


def _rsqrt(base_lr: float, timescale: int) -> optax.Schedule:
    return lambda count: base_lr / jnp.sqrt(1.0 + count / timescale)


def _staircase(base_lr: float, drops: Sequence[int]) -> optax.Schedule:
    # As published, the first step of a lower rate is the one after the drop.
    return lambda count: base_lr * 0.1 ** jnp.sum(count > jnp.array(drops))


def _cooled(schedule: optax.Schedule, total_steps: int, cooldown_steps: int) -> optax.Schedule:
    def cooled(count: Any) -> Any:
        return schedule(count) * jnp.clip((total_steps - count) / cooldown_steps, 0.0, 1.0)

    return cooled


def adam(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    decay: str,
    mu_dtype: str,
    clip_norm: float,
    lr_multipliers: str = "",
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay: each step subtracts lr * weight_decay * p (AdamW).

    Args:
        schedule: step to learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        weight_decay: multiplied by the learning rate, unlike big_vision's, whose 1e-4 at
            base_lr 1e-3 is 0.1 here.
        decay: which parameters decay, "all" or "kernels".
        mu_dtype: dtype of the first moment, "float32" or "bfloat16".
        clip_norm: global norm to clip gradients at; 0 for none.
        lr_multipliers: by parameter name, see `multipliers.with_multipliers`.
        layer_decay: by layer, see `multipliers.layer_scales`; 1 is off.
    """
    moments = optax.scale_by_adam(b1=b1, b2=b2, mu_dtype=jnp.dtype(mu_dtype))
    rates = {"text": lr_multipliers, "layer_decay": layer_decay}
    return _chain(schedule, moments, weight_decay, decay, clip_norm, rates)


# As in big_vision's code: Adafactor does not factor axes that are shorter.
_SHORTEST_FACTORED_AXIS = 32


def adafactor(
    schedule: optax.Schedule,
    *,
    momentum: float,
    decay_rate: float,
    b2: float,
    weight_decay: float,
    decay: str,
    mu_dtype: str,
    clip_norm: float,
    lr_multipliers: str = "",
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Adafactor as it trained ViT-G (Zhai et al., 2022, arXiv 2106.04560, Section 3.4).

    Of a second moment only the means over its rows and over its columns are kept, those of its two
    longest axes if both are 32 or more. Unlike that of Shazeer and Stern (2018, arXiv 1804.04235)
    it has a first moment, does not scale an update by its parameter, and clips none by itself.

    Args:
        schedule: step to learning rate.
        momentum: decay of the first moment, a mean of what the second moments have scaled, which
            starts at 0 and is not corrected for that; 0 for none.
        decay_rate: the second moments decay by 1 - t ** -decay_rate in step t, from 1 ...
        b2: ... but by no more than this.
        weight_decay: as in `adam`, and so are the others.
        decay: which parameters decay, "all" or "kernels".
        mu_dtype: dtype of the first moment, "float32" or "bfloat16".
        clip_norm: global norm to clip gradients at; 0 for none.
        lr_multipliers: by parameter name, see `multipliers.with_multipliers`.
        layer_decay: by layer, see `multipliers.layer_scales`; 1 is off.
    """

    def second_moment_decay(step: Any, exponent: Any) -> jax.Array:
        return jnp.minimum(b2, 1.0 - (step + 1.0) ** -exponent)

    scaled = optax.scale_by_factored_rms(
        decay_rate=decay_rate,
        min_dim_size_to_factor=_SHORTEST_FACTORED_AXIS,
        decay_rate_fn=second_moment_decay,
    )
    mean = optax.ema(momentum, debias=False, accumulator_dtype=jnp.dtype(mu_dtype))
    moments = optax.chain(scaled, mean) if momentum else scaled
    rates = {"text": lr_multipliers, "layer_decay": layer_decay}
    return _chain(schedule, moments, weight_decay, decay, clip_norm, rates)


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    decay: str,
    mu_dtype: str,
    clip_norm: float,
    lr_multipliers: str = "",
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """SGD with momentum, whose accumulator has mu_dtype; the other arguments are those of adam."""
    trace = optax.trace(decay=momentum, accumulator_dtype=jnp.dtype(mu_dtype))
    rates = {"text": lr_multipliers, "layer_decay": layer_decay}
    return _chain(schedule, trace, weight_decay, decay, clip_norm, rates)


def _chain(
    schedule: optax.Schedule,
    moments: optax.GradientTransformation,
    weight_decay: float,
    decay: str,
    clip_norm: float,
    rates: Mapping[str, Any],
) -> optax.GradientTransformation:
    if decay not in DECAY_MASKS:
        raise UserError(f"optimizer.decay {decay!r} is unknown: use {' or '.join(DECAY_MASKS)}")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    decayed = optax.add_decayed_weights(weight_decay, DECAY_MASKS[decay])
    optimizer = optax.chain(*clip, moments, decayed, optax.scale_by_learning_rate(schedule))
    return with_multipliers(optimizer, **rates)


def _kernels(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


DECAY_MASKS = {"all": None, "kernels": _kernels}
OPTIMIZERS = {"adam": adam, "adafactor": adafactor, "sgd": sgd}


def optimizer_keys(name: str) -> set[str]:
    """The keys that an optimizer's config may have: the arguments of its function."""
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer.name {name!r} is unknown: use {', '.join(OPTIMIZERS)}")
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    return {"name"} | set(parameters) - {"schedule"}


def create_optimizer(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Builds the optimizer that a config's `optimizer` section describes."""
    config = dict(config)
    return OPTIMIZERS[config.pop("name")](schedule, **config)


def init_params(model: nn.Module, *, seed: int, image_size: ImageSize) -> Params:
    """Fresh parameters; traceable.

    Args:
        model: maps images [batch, height, width, 3] to logits.
        seed: of the run.
        image_size: of the images.
    """
    images = jnp.zeros((1, *sides(image_size), 3))
    return model.init(_keys(seed)[0], images)["params"]


def create_state(
    params: Params, optimizer: optax.GradientTransformation, *, seed: int, average: bool
) -> TrainState:
    """The state before the first step; traceable.

    Args:
        params: to begin with. They are copied: what came from the host may lie in its memory, and
            must not be donated.
        optimizer: whose state is initialized.
        seed: of the run's randomness.
        average: whether to keep a Polyak average.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if average else None,
        rng=_keys(seed)[1],
    )


def init_train_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    image_size: ImageSize,
    average: bool,
    adapt: Callable[[Params], Params] = lambda params: params,
) -> TrainState:
    """A fresh state of fresh parameters, see `init_params` and `create_state`; traceable.

    The parameters of the state are what `adapt` makes of those of the model.
    """
    params = adapt(init_params(model, seed=seed, image_size=image_size))
    return create_state(params, optimizer, seed=seed, average=average)


def _keys(seed: int) -> jax.Array:
    """The key of the parameters and that of the run."""
    return jax.random.split(jax.random.key(seed))
