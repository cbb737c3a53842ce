"""A run that is made longer: `duration` may grow where the past would have been the same."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints.training import saved_steps
from vit_jax.config import count_steps
from vit_jax.errors import UserError
from vit_jax.preparation import Prepared, schedule_of
from vit_jax.reporting import Progress
from vit_jax.terminal import say


def is_longer(prepared: Prepared, before: str, progress: Mapping[str, Any]) -> bool:
    """Tells whether a run goes on to a later end than the one that it had.

    It may where every step until now had the learning rate that it would have had in a run of the
    new length: what follows is then that run, bit by bit. Decay rsqrt does not depend on the
    length before its cool-down; linear and cosine do from the end of the warm-up on, and staircase
    from the first drop on.

    Args:
        prepared: the run, with its new duration.
        before: the duration that it had.
        progress: that was saved, the fields of `Progress`.

    Raises:
        UserError: the new duration is shorter, or the past would have been another; or it was not
            its duration that ended the run.
    """
    config, workdir, total_steps = prepared.config, prepared.workdir, prepared.total_steps
    earlier = count_steps(before, prepared.train_source.num_examples, config.batch_size)
    if total_steps == earlier:
        return False
    if total_steps < earlier:
        raise UserError(
            f"{workdir} holds a run of {earlier:,} steps, and duration {config.duration!r} is "
            f"{total_steps:,}: a run can be made longer, not shorter; choose another --workdir, or "
            "change it back"
        )
    if Progress(**progress).is_out_of_patience(config.patience):
        raise UserError(
            f"{workdir} was ended by patience {config.patience}, not by its duration: change it "
            f"back, and to train its weights for longer start --config.init_from={workdir} in "
            "another --workdir"
        )
    done = max(saved_steps(workdir / "checkpoints"), default=0)
    if (same := _same_steps(prepared, earlier, done)) < done:
        raise UserError(
            f"{workdir} is at step {done:,} of {earlier:,}: in a run of {total_steps:,} the "
            f"learning rate (schedule.decay {config.schedule.decay}) would have been another "
            f"after step {same:,}; change duration back, and to train its weights for longer start "
            f"--config.init_from={workdir} in another --workdir"
        )
    say(f"{workdir} is made longer, from {earlier:,} to {total_steps:,} steps")
    return True


def _same_steps(prepared: Prepared, earlier: int, done: int) -> int:
    """Counts the first steps done that have the same learning rate in a run of either length."""
    count = jnp.arange(done)
    schedules = (
        schedule_of(prepared.config, steps, prepared.train_source)
        for steps in (earlier, prepared.total_steps)
    )
    old, new = (np.asarray(jax.vmap(schedule)(count)) for schedule in schedules)
    return int(np.argmax(old != new)) if (old != new).any() else done


def reopen(workdir: pathlib.Path) -> None:
    """Has a finished run be one that goes on: it is finished where it has a metrics.json."""
    if jax.process_index() == 0:
        (workdir / "metrics.json").unlink(missing_ok=True)
