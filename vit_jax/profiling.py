"""A trace of some steps of a run, which TensorBoard's profile plugin and Perfetto open."""

import contextlib
import pathlib
import re
from typing import Any

import jax

from vit_jax.errors import UserError, brief
from vit_jax.terminal import say


def parse_steps(text: str) -> range:
    """Reads "10:20", the steps from 10 to 20, both among them; "" is none.

    Raises:
        UserError: it is of another form.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            f"--profile {brief(text)} is not understood: use FIRST:LAST, such as 10:20, where the "
            "first step of a run is 1"
        )
    return range(int(match[1]), int(match[2]) + 1)


def check_steps(steps: range, total_steps: int) -> None:
    """Raises a UserError if a run has no such steps."""
    if steps and steps[-1] > total_steps:
        raise UserError(
            f"--profile {steps[0]}:{steps[-1]} is beyond the {total_steps:,} steps of the run: "
            "name steps that it has"
        )


class Profile:
    """The trace of a run; outside of its steps nothing waits for a device.

    As they begin and end all that has been started is waited for, so that the trace holds whole
    steps. Of several processes the first traces itself.

    Args:
        steps: to trace, numbered from 1.
        directory: takes `plugins/profile/TIME/`, where TensorBoard looks.
        done: the steps that the run has done: of what is to be traced, those are passed over.
    """

    def __init__(self, steps: range, directory: pathlib.Path, done: int):
        self._steps = range(max(steps.start, done + 1), steps.stop)
        self._directory = directory
        self._trace = contextlib.ExitStack()
        self._step = contextlib.ExitStack()
        if len(self._steps) < len(steps):
            asked = f"--profile {steps[0]}:{steps[-1]}"
            left = f"from step {done + 1:,} on" if self._steps else "nothing"
            say(f"{asked}: the run goes on after step {done:,}, what is traced is {left}")
        if jax.process_index() != 0:
            self._steps = range(0)

    def begin(self, step: int, state: Any) -> None:
        """Begins a step.

        Args:
            step: its number.
            state: before it, arrays.
        """
        if step not in self._steps:
            return
        if step == self._steps[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._trace.callback(jax.profiler.stop_trace)
        self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def end(self, step: int, results: Any) -> None:
        """Ends a step.

        Args:
            step: its number.
            results: of the step, arrays.
        """
        if step not in self._steps:
            return
        self._step.close()
        if step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()
            say(f"traced steps {self._steps[0]} to {step}: tensorboard --logdir {self._directory}")

    def close(self) -> None:
        """Stops a trace that is under way."""
        self._step.close()
        self._trace.close()
