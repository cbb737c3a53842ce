"""The reports of a run in progress: what has been measured, and what is said of it."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from vit_jax.analysis import flops
from vit_jax.evaluation.registry import Evaluator
from vit_jax.terminal import Bar, can_draw, say
from vit_jax.trackers import TENSORBOARD, Track, Tracking
from vit_jax.writers import EventWriter, JsonlWriter, tags


@dataclasses.dataclass
class Progress:
    """The measurements of a run so far; a checkpoint's metadata has these fields as "progress".

    Attributes:
        window: sums of the training metrics since the last log line, see `Window`.
        evaluation: the last one of val: "step", "examples" and its scalars; empty before the first.
        best: the best of these.
        evaluations_since_best: how many there were since.
        seconds: spent in training.
        owed: the names of the evaluators that are due at this step and have not run.
    """

    window: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluations_since_best: int = 0
    seconds: float = 0.0
    owed: list[str] = dataclasses.field(default_factory=list)

    def record(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Takes down an evaluation; returns whether it is the best so far."""
        self.evaluation = {"step": step, **scalars}
        self.evaluations_since_best += 1
        if not is_better(self.evaluation, self.best):
            return False
        self.best = self.evaluation
        self.evaluations_since_best = 0
        return True

    def is_out_of_patience(self, patience: int) -> bool:
        """Tells whether the last `patience` evaluations were no better; 0 is endless patience."""
        return 0 < patience <= self.evaluations_since_best


# Which of its scalars an evaluation is judged by: the first that it has. Less is better of "loss".
_DECIDING_SCALARS = ("AP", "mIoU", "mAP", "accuracy", "loss")


def deciding_scalar(result: Mapping[str, Any]) -> str:
    """The name of the scalar by which an evaluation is judged."""
    return next(name for name in _DECIDING_SCALARS if name in result)


def is_better(result: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Tells whether an evaluation is better than the best, see `deciding_scalar`."""
    name = deciding_scalar(result)
    if name == "loss":
        return result[name] < best.get(name, math.inf)
    return result[name] > best.get(name, -1.0)


class Window:
    """The sums of the training metrics since the last log line.

    A step's metrics are fetched two steps later, so that the host runs ahead of the device, but not
    without bound.

    Args:
        sums: of an earlier `drain`, to go on after a checkpoint between two log lines.
        fetched: is told of every step whose metrics have been fetched.
    """

    _LAG = 2

    def __init__(
        self,
        sums: dict[str, float],
        fetched: Callable[[int, dict[str, float]], None] = lambda step, values: None,  # noqa: ARG005
    ):
        self._sums = collections.Counter(sums)
        self._fetched = fetched
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step that may still be running.

        Raises:
            FloatingPointError: the loss or gradient of an earlier step is not finite.
        """
        self._pending.append((step, metrics))
        if len(self._pending) > self._LAG:
            self._fetch()

    def drain(self) -> dict[str, float]:
        """Waits for all steps and returns their sums and "count"; raises as `add` does."""
        while self._pending:
            self._fetch()
        return dict(self._sums)

    def mean(self) -> dict[str, float]:
        """Waits for all steps, returns the mean of each metric and starts anew."""
        sums = self.drain()
        count = sums.pop("count")
        self._sums.clear()
        return {key: value / count for key, value in sums.items()}

    def _fetch(self) -> None:
        step, metrics = self._pending.pop(0)
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(f"{name} is {values[name]} at step {step}")
        self._sums.update(values, count=1)
        self._fetched(step, values)


class Stopwatch:
    """Seconds spent in training; evaluation and saving are left out.

    Used as a context manager around what is left out.

    Args:
        earlier: seconds of the parts of the run before this one.
    """

    def __init__(self, earlier: float = 0.0) -> None:
        self._start = time.perf_counter()
        self._earlier = earlier  # up to the last lap

    def lap(self) -> float:
        """Seconds since the last lap, and starts the next."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        self._earlier += seconds
        return seconds

    def total(self) -> float:
        """Seconds since the run began."""
        return self._earlier + time.perf_counter() - self._start

    def __enter__(self) -> None:
        self._paused = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._start += time.perf_counter() - self._paused


def progress_line(step: int, total_steps: int, scalars: Mapping[str, float], seconds: float) -> str:
    """Formats a line of progress for a person to read.

    Args:
        step: the steps done.
        total_steps: of the run.
        scalars: "loss", "images_per_second" and, where they are known, "accuracy" and "mfu".
        seconds: left at the present speed.
    """
    mfu = f"  MFU {scalars['mfu']:.1%}" if "mfu" in scalars else ""
    accuracy = f"accuracy {scalars['accuracy']:.4f}  " if "accuracy" in scalars else ""
    return (
        f"step {step}/{total_steps}  loss {scalars['loss']:.4f}  "
        f"{accuracy}{scalars['images_per_second']:,.0f} images/s{mfu}  "
        f"ETA {format_seconds(seconds)}"
    )


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, for example "1h02m" or "3m05s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Cost(NamedTuple):
    """The cost of a step.

    Attributes:
        batch_size: of all devices together.
        devices: their number.
        flops: floating-point operations to train on one image.
    """

    batch_size: int
    devices: int
    flops: float


class Live:
    """The bar of a run: the means of its last steps, and the time that is left at their speed.

    Args:
        step: that the run begins or goes on from.
        total_steps: of the run.
    """

    _STEPS = 50

    def __init__(self, step: int, total_steps: int):
        self._bar = Bar(step, total_steps)
        self._total_steps = total_steps
        self._steps: collections.deque[tuple[int, float, dict[str, float]]] = collections.deque(
            maxlen=self._STEPS
        )

    def show(
        self,
        step: int,
        metrics: dict[str, float],
        seconds: float,
        costs: Callable[[float], dict[str, float]],
    ) -> None:
        """Shows a step whose metrics have been fetched.

        Args:
            step: of the metrics.
            metrics: of the step.
            seconds: spent in training until now.
            costs: from the steps a second to "images_per_second" and, where it is known, "mfu".
        """
        self._steps.append((step, seconds, metrics))
        first, begin, _ = self._steps[0]
        if seconds <= begin:  # Of one step alone no speed is known.
            return
        speed = (step - first) / (seconds - begin)
        scalars = {
            name: sum(values[name] for *_, values in self._steps) / len(self._steps)
            for name in metrics
        }
        left = (self._total_steps - step) / speed
        line = progress_line(step, self._total_steps, scalars | costs(speed), left)
        self._bar.show(step, line)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


class _Files:
    """Writes what a run finds: metrics.jsonl, and the same for TensorBoard and for a tracker.

    Args:
        workdir: of the run.
        step: that the run begins or goes on from.
        owes_evaluation: whether the evaluations of that step are made again.
        track: the tracker.
        config: of the run, nested.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        owes_evaluation: bool,
        track: Track,
        config: Mapping[str, Any],
    ):
        self._lines = JsonlWriter(workdir / "metrics.jsonl", step, owes_evaluation)
        self._events = EventWriter(workdir, step if owes_evaluation else step + 1)
        if owes_evaluation:  # TensorBoard forgets a step as a whole.
            for line in self._lines.kept:
                self._events.write_scalars(step, tags(line.scalars))
        self._tracking = None
        if track != TENSORBOARD:
            self._tracking = Tracking(track, workdir, config, self._lines.dropped)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the scalars of a step."""
        self._lines.write_scalars(step, scalars)
        self._events.write_scalars(step, tags(scalars))
        if self._tracking:
            self._tracking.write_scalars(step, tags(scalars))

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture of a step."""
        self._events.write_picture(step, name, png)
        if self._tracking:
            self._tracking.write_picture(step, name, png)

    def close(self) -> None:
        """Closes the files, and waits for the tracker."""
        self._lines.close()
        self._events.close()
        if self._tracking:
            self._tracking.close()


class Reporter:
    """Keeps the sums and the clock of a run, and writes what they show.

    Args:
        workdir: of the run.
        step: that the run begins or goes on from.
        total_steps: of the run.
        progress: of the run so far.
        cost: of a step.
        schedule: from the step to the learning rate.
        track: where it is shown besides.
        config: of the run, nested, for the tracker.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        total_steps: int,
        progress: Progress,
        cost: Cost,
        schedule: Callable[[int], Any],
        track: Track = TENSORBOARD,
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        # Of several processes the first writes.
        self._files = (
            _Files(workdir, step, bool(progress.owed), track, config)
            if jax.process_index() == 0
            else None
        )
        self._live = Live(step, total_steps) if self._files and can_draw() else None
        self._window = Window(progress.window, self._show)
        self._stopwatch = Stopwatch(progress.seconds)
        self._logged = step  # The lap's first step is the next.
        self._total_steps = total_steps
        self._cost = cost
        self._schedule = schedule

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a training step; raises as `Window.add` does."""
        self._window.add(step, metrics)

    def log(self, step: int) -> None:
        """Writes the means since the last time, and what the run has cost so far."""
        scalars = self._window.mean()
        steps, seconds = step - self._logged, self._stopwatch.lap()
        self._logged = step
        scalars |= self._costs(step, steps, seconds)
        self._write(step, scalars)
        if not self._live:  # It has shown them.
            left = (self._total_steps - step) * seconds / steps
            say(progress_line(step, self._total_steps, scalars, left))

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        if not self._live:
            return

        def costs(steps_per_second: float) -> dict[str, float]:
            speed = steps_per_second * self._cost.batch_size
            return {"images_per_second": speed, **self._mfu(speed)}

        self._live.show(step, metrics, self._stopwatch.total(), costs)

    def _costs(self, step: int, steps: int, seconds: float) -> dict[str, float]:
        batch_size, devices, needed = self._cost
        images_per_second = steps * batch_size / seconds
        return {
            "device_days": self._stopwatch.total() * devices / (24 * 60 * 60),
            "learning_rate": float(self._schedule(step - 1)),
            "images_per_second": images_per_second,
            "exaflops": needed * batch_size * step / 1e18,
            **self._mfu(images_per_second),
        }

    def _mfu(self, images_per_second: float) -> dict[str, float]:
        peak = flops.peak_flops(jax.devices()[0].device_kind)
        if not peak:
            return {}
        return {"mfu": self._cost.flops * images_per_second / (peak * self._cost.devices)}

    def evaluated(self, step: int, evaluator: Evaluator, scalars: Mapping[str, float]) -> None:
        """Writes what an evaluator has found."""
        named = {evaluator.prefix + name: x for name, x in scalars.items() if name != "examples"}
        self._write(step, named)
        self.say(step, evaluator.describe(scalars))

    def show(self, step: int, pictures: Iterable[tuple[str, bytes]]) -> None:
        """Writes pictures, PNGs by their names."""
        for name, png in pictures:
            if self._files:
                self._files.write_picture(step, name, png)

    def say(self, step: int, text: str) -> None:
        """Prints a line that begins with the step."""
        say(f"step {step}/{self._total_steps}  {text}")

    def update(self, progress: Progress) -> None:
        """Waits for all steps and puts sums and seconds into `progress`; raises as `add` does."""
        progress.window = self._window.drain()
        progress.seconds = self._stopwatch.total()

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Stops the clock for what is not training."""
        return self._stopwatch

    def close(self) -> None:
        """Closes the files, and leaves the bar as it is."""
        if self._live:
            self._live.close()
        if self._files:
            self._files.close()

    def _write(self, step: int, scalars: Mapping[str, Any]) -> None:
        if self._files:
            self._files.write_scalars(step, scalars)
