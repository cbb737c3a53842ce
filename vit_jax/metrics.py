"""What a run tells while it goes: a line to read, metrics.jsonl and TensorBoard."""

import collections
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from clu import metric_writers

from vit_jax.files import atomic_write


class JsonlWriter(metric_writers.MetricWriter):
    """Appends scalars to a file, one JSON object a line.

    Args:
        path: of the file.
        last_step: later lines, which a killed run wrote after its last checkpoint, are dropped:
            the resumed run writes them again.
    """

    def __init__(self, path: pathlib.Path, last_step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _step(line) <= last_step]
        with atomic_write(path) as part:
            part.write_text("".join(kept))
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Does nothing: every line is flushed as it is written."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _unsupported(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("metrics.jsonl holds scalars only")

    write_summaries = write_images = write_videos = write_audios = _unsupported
    write_texts = write_histograms = write_pointcloud = write_hparams = _unsupported


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # The last line of a run that was killed while writing it.
        return math.inf


def create_writer(workdir: pathlib.Path, last_step: int) -> metric_writers.MetricWriter:
    """Writes to metrics.jsonl and, for TensorBoard, event files; on the first process only."""
    if jax.process_index():
        return metric_writers.MultiWriter([])
    return metric_writers.MultiWriter(
        [
            JsonlWriter(workdir / "metrics.jsonl", last_step),
            metric_writers.SummaryWriter(str(workdir)),
        ]
    )


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
    """One line for a person to read.

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
