"""The numbers of an experiment, read from its runs."""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.runner.experiment import Experiment, Measurement, Run
from experiments.runner.graph import Job
from experiments.runner.outcomes import SECONDS_A_DAY, TASK_FILE, Outcomes, read
from experiments.runner.setting import Setting
from vit_jax.errors import UserError, nearest
from vit_jax.files import atomic_write
from vit_jax.runner import mean_and_sd


@dataclasses.dataclass(frozen=True)
class Result:
    """What has been found of a measurement.

    Attributes:
        measurement: what was asked for.
        values: of each source, None where it failed or has not run.
        problems: a line for each of those.
    """

    measurement: Measurement
    values: tuple[float | None, ...]
    problems: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Of the values that there are, None if there are none."""
        found = self._found()
        return mean_and_sd(found)[0] if found else None

    @property
    def sd(self) -> float | None:
        """The sample standard deviation (n - 1), None of less than two values."""
        found = self._found()
        return mean_and_sd(found)[1] if found else None

    def _found(self) -> list[float]:
        return [value for value in self.values if value is not None]


@dataclasses.dataclass(frozen=True)
class Results:
    """What has been found of an experiment, or of a part of it.

    Attributes:
        experiment: whose results these are.
        setting: under which it ran.
        found: in the order of `Experiment.measure`.
        folders: of the runs and tasks that are finished, by name.
    """

    experiment: Experiment
    setting: Setting
    found: tuple[Result, ...]
    folders: Mapping[str, pathlib.Path]

    def where(self, **labels: str) -> "Results":
        """The results whose labels have these values."""
        kept = [x for x in self.found if labels.items() <= x.measurement.labels.items()]
        return dataclasses.replace(self, found=tuple(kept))

    def groups(self, label: str) -> "dict[str, Results]":
        """The results by the value of a label, in order of appearance; without it is ""."""
        groups: dict[str, list[Result]] = {}
        for result in self.found:
            groups.setdefault(result.measurement.labels.get(label, ""), []).append(result)
        return {
            value: dataclasses.replace(self, found=tuple(found)) for value, found in groups.items()
        }

    @property
    def problems(self) -> list[str]:
        """The lines of all that failed or has not run, each once."""
        return list(dict.fromkeys(line for result in self.found for line in result.problems))


class Reader:
    """Reads the results of experiments; what several of them ask for is read once.

    Args:
        outcomes: where the runs lie.
    """

    def __init__(self, outcomes: Outcomes):
        self._outcomes = outcomes
        self._problem = functools.cache(outcomes.problem)

    def results(
        self, experiment: Experiment, setting: Setting, measurements: Sequence[Measurement]
    ) -> Results:
        """What has been found of the measurements of an experiment."""
        found = tuple(map(self._result, measurements))
        jobs = {x.name: x for measurement in measurements for x in measurement.sources}
        for job in list(jobs.values()):
            jobs |= {needed.name: needed for needed in job.needs}
        folders = {
            name: self._outcomes.workdir(job)
            for name, job in jobs.items()
            if not self._problem(job)
        }
        return Results(experiment, setting, found, folders)

    def _result(self, measurement: Measurement) -> Result:
        read_all = [self._read(measurement, source) for source in measurement.sources]
        values, problems = zip(*read_all, strict=True) if read_all else ((), ())
        return Result(measurement, tuple(values), tuple(filter(None, problems)))

    def _read(self, measurement: Measurement, job: Job) -> tuple[float | None, str]:
        """The value of a source, or the line that says why there is none."""
        if problem := self._problem(job):
            return None, problem
        try:
            return self._value(measurement, job), ""
        except UserError as error:
            return None, f"{job.name}: {error}"

    def _value(self, measurement: Measurement, job: Job) -> float:
        metric, metrics = measurement.metric, self._metrics(job)
        if isinstance(job, Run):
            every = self._points(job)
        else:
            every = {name: {0: value} for name, value in metrics.items()}
        if metric not in every:
            raise UserError(_no_metric(metric, every.keys() - {"step"}))
        points = every[metric]
        step = max(points)
        if measurement.at_best and isinstance(job, Run):
            step = (metrics.get("best") or {}).get("step")
        value = points.get(step)
        if value is None or not math.isfinite(value):
            at = f" at the best step, {step}," if measurement.at_best else ""
            raise UserError(
                f"failed: there is no number {metric!r}{at} in {self._outcomes.workdir(job)}"
            )
        return value

    @functools.cache  # noqa: B019 - it lives as long as the reader.
    def _metrics(self, job: Job) -> dict[str, Any]:
        return read(self._outcomes.workdir(job) / "metrics.json")

    @functools.cache  # noqa: B019 - likewise.
    def _points(self, job: Job) -> dict[str, dict[int, float]]:
        """What metrics.jsonl holds: of each metric its values by step."""
        path = self._outcomes.workdir(job) / "metrics.jsonl"
        points: dict[str, dict[int, float]] = collections.defaultdict(dict)
        try:
            for record in map(json.loads, path.read_text().splitlines()):
                for name, value in record.items():
                    points[name][record["step"]] = value
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        return dict(points)

    def write(self, results: Results, path: pathlib.Path) -> None:
        """Writes results.jsonl, a record for each measurement and seed.

        A record has the keys "experiment", "scale", "labels", "seed", "metric", "value" (null where
        there is none: "problem" says why), "paper" (as it prints it), "reference" (what that is, if
        it is not the paper's), "run" (its name), "steps", "seconds" (of training, on all devices
        together; of a task, of all it did) and "config_sha", the start of the SHA-256 of the config
        as it ran.

        Raises:
            UserError: the file cannot be written.
        """
        with atomic_write(path) as temporary, temporary.open("w") as file:
            for result in results.found:
                for index in range(len(result.values)):
                    record = self._record(results, result, index)
                    file.write(json.dumps(record, allow_nan=False) + "\n")

    def _record(self, results: Results, result: Result, index: int) -> dict[str, Any]:
        measurement, value = result.measurement, result.values[index]
        job = measurement.sources[index]
        return {
            "experiment": results.experiment.name,
            "scale": results.setting.scale.name,
            "labels": dict(measurement.labels),
            "seed": job.config.seed if isinstance(job, Run) else index,
            "metric": measurement.metric,
            "value": value,
            "paper": measurement.paper,
            "reference": results.experiment.reference if measurement.paper is not None else "",
            "run": job.name,
            "problem": self._read(measurement, job)[1],
            **(self._costs(job) if job.name in results.folders else _NO_COSTS),
        }

    @functools.cache  # noqa: B019 - likewise.
    def _costs(self, job: Job) -> dict[str, Any]:
        try:
            return self._costs_of_run(job) if isinstance(job, Run) else self._costs_of_task(job)
        except UserError:
            return _NO_COSTS

    def _costs_of_run(self, run: Run) -> dict[str, Any]:
        points = self._points(run)
        days = points.get("device_days", {})
        config = read(self._outcomes.workdir(run) / "config.json")
        # Where the folder lies makes no difference.
        config["init_from"] = pathlib.PurePath(config.get("init_from") or "").name
        return {
            "steps": max(days, default=None),
            "seconds": SECONDS_A_DAY * days[max(days)] if days else None,
            "config_sha": _sha(config),
        }

    def _costs_of_task(self, job: Job) -> dict[str, Any]:
        asked = read(self._outcomes.workdir(job) / TASK_FILE)
        seconds = asked.pop("seconds", None)
        return {"steps": None, "seconds": seconds, "config_sha": _sha(asked)}


def _no_metric(metric: str, names: Iterable[str]) -> str:
    near = nearest(metric, names)
    hint = f"did you mean {near!r}? " if near else ""
    return f"failed: has no metric {metric!r}: {hint}it has {', '.join(sorted(names))}"


_NO_COSTS: dict[str, Any] = {"steps": None, "seconds": None, "config_sha": None}


def _sha(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
