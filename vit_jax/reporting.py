"""The reports of a run in progress: a line to read, metrics.jsonl and TensorBoard."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

# protobuf makes the classes as the modules are imported.
from tensorboard.compat.proto.event_pb2 import Event  # ty: ignore[missing-module-member]
from tensorboard.compat.proto.summary_pb2 import Summary  # ty: ignore[missing-module-member]
from tensorboard.summary.writer.record_writer import RecordWriter

from vit_jax.analysis import flops
from vit_jax.evaluation.registry import Evaluator
from vit_jax.files import atomic_write
from vit_jax.printable import printable


def say(line: str) -> None:
    """Prints a line at once; of several processes the first does."""
    if jax.process_index() == 0:
        print(printable(line), flush=True)


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
_DECIDING_SCALARS = ("mAP", "accuracy", "loss")


def deciding_scalar(result: Mapping[str, Any]) -> str:
    """The name of the scalar by which an evaluation is judged."""
    return next(name for name in _DECIDING_SCALARS if name in result)


def is_better(result: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Tells whether an evaluation is better than the best, see `deciding_scalar`."""
    name = deciding_scalar(result)
    if name == "loss":
        return result[name] < best.get(name, math.inf)
    return result[name] > best.get(name, -1.0)


class JsonlWriter:
    """Appends scalars to a file, one JSON object a line.

    Args:
        path: of the file.
        last_step: later lines, which a killed run wrote after its last checkpoint, are dropped:
            the resumed run writes them again.
        owes_evaluation: whether the evaluations of `last_step` are made again too.
    """

    def __init__(self, path: pathlib.Path, last_step: int, owes_evaluation: bool = False):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _is_kept(line, last_step, owes_evaluation)]
        with atomic_write(path) as part:
            part.write_text("".join(kept))
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _is_kept(line: str, last_step: int, owes_evaluation: bool) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # The last line of a run that was killed while writing it.
        return False
    if record["step"] == last_step and owes_evaluation:
        return "learning_rate" in record  # The line of training.
    return record["step"] <= last_step


class EventWriter:
    """Appends scalars to a file of events of its own, which TensorBoard reads.

    TensorBoard's writer of such files would import TensorFlow, which takes seconds.
    """

    def __init__(self, directory: pathlib.Path):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("ab"))
        self._write(file_version="brain.Event:2")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the scalars of a step."""
        values = [Summary.Value(tag=printable(name), simple_value=x) for name, x in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


class Window:
    """The sums of the training metrics since the last log line.

    A step's metrics are fetched two steps later, so that the host runs ahead of the device, but not
    without bound.

    Args:
        sums: of an earlier `drain`, to go on after a checkpoint between two log lines.
    """

    _LAG = 2

    def __init__(self, sums: dict[str, float]):
        self._sums = collections.Counter(sums)
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


class Reporter:
    """Keeps the sums and the clock of a run, and writes what they show.

    Args:
        workdir: of the run.
        step: that the run begins or goes on from.
        total_steps: of the run.
        progress: of the run so far.
        cost: of a step.
        schedule: from the step to the learning rate.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        total_steps: int,
        progress: Progress,
        cost: Cost,
        schedule: Callable[[int], Any],
    ):
        # Of several processes the first writes.
        first = jax.process_index() == 0
        owes = bool(progress.owed)
        self._writers = (
            (JsonlWriter(workdir / "metrics.jsonl", step, owes), EventWriter(workdir))
            if first
            else ()
        )
        self._window = Window(progress.window)
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
        left = (self._total_steps - step) * seconds / steps
        say(progress_line(step, self._total_steps, scalars, left))

    def _costs(self, step: int, steps: int, seconds: float) -> dict[str, float]:
        batch_size, devices, needed = self._cost
        images_per_second = steps * batch_size / seconds
        scalars = {
            "device_days": self._stopwatch.total() * devices / (24 * 60 * 60),
            "learning_rate": float(self._schedule(step - 1)),
            "images_per_second": images_per_second,
            "exaflops": needed * batch_size * step / 1e18,
        }
        peak = flops.peak_flops(jax.devices()[0].device_kind)
        return scalars | ({"mfu": needed * images_per_second / (peak * devices)} if peak else {})

    def evaluated(self, step: int, evaluator: Evaluator, scalars: Mapping[str, float]) -> None:
        """Writes what an evaluator has found."""
        named = {evaluator.prefix + name: x for name, x in scalars.items() if name != "examples"}
        self._write(step, named)
        self.say(step, evaluator.describe(scalars))

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
        """Closes the files."""
        for writer in self._writers:
            writer.close()

    def _write(self, step: int, scalars: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)
