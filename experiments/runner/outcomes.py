"""What has become of runs and tasks, as their folders tell: any command can read it at any time."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
from typing import TYPE_CHECKING, Any

from experiments.runner.experiment import Run, Task
from experiments.runner.graph import Job
from vit_jax.errors import UserError, first_line, shortlist
from vit_jax.files import atomic_write

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# What a task was asked for, beside its metrics.json.
TASK_FILE = "task.json"
# Runs note "device_days".
SECONDS_A_DAY = 24 * 60 * 60
# What of a finished run may be otherwise besides: the update is that of the whole batch.
_HARDWARE = {"accumulate_steps"}


class AnotherRun(UserError):
    """A finished run lies where one of another config is wanted."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The runs and tasks of a scale: of each a folder NAME, NAME.log, and NAME.error if it failed.

    Attributes:
        folder: of all.
    """

    folder: pathlib.Path
    # Those whose needs were found to be theirs; finished once, they stay so.
    _sound: dict[str, Job] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def workdir(self, job: Job) -> pathlib.Path:
        """The folder of a job."""
        return self.folder / job.name

    def log(self, job: Job) -> pathlib.Path:
        """What a job printed, in all its attempts."""
        return self.folder / f"{job.name}.log"

    def error(self, job: Job) -> pathlib.Path:
        """The file with the reason for which the last attempt failed."""
        return self.folder / f"{job.name}.error"

    def failure(self, job: Job) -> str:
        """The reason for which the last attempt failed, "" if none did."""
        try:
            return self.error(job).read_text().strip()
        except OSError:
            return ""

    def fail(self, job: Job, reason: str) -> None:
        """Takes down that a job has failed; the reason is one line."""
        with atomic_write(self.error(job)) as file:
            file.write_text(f"{reason}\n", errors="backslashreplace")

    def forget_failure(self, job: Job) -> None:
        """Has the next attempt begin without the failure of the last."""
        self.error(job).unlink(missing_ok=True)

    def is_finished(self, job: Job) -> bool:
        """Tells whether a job has been done: this one, not another of its name.

        What it needs may have been removed since, but not be of another config.

        Raises:
            AnotherRun: a run of another config is finished in its folder, or in that of what it
                needs.
            UserError: its files are damaged.
        """
        folder = self.workdir(job)
        if not (folder / "metrics.json").exists():
            return False
        if isinstance(job, Task):
            try:
                asked = {key: x for key, x in read(folder / TASK_FILE).items() if key != "seconds"}
            except UserError:
                return False
            if asked != request(job):
                return False
        elif differences := _differences(job, read(folder / "config.json")):
            raise AnotherRun(
                f"{folder} holds a run of another config ({shortlist(differences)}): choose "
                "another --output, or change these back, or remove it with all that starts from it"
            )
        self._check_needs(job)
        return True

    def _check_needs(self, job: Job) -> None:
        if self._sound.get(job.name) is job:
            return
        for needed in job.needs:
            try:
                self.is_finished(needed)
            except AnotherRun:
                raise
            except UserError:  # Damaged files say nothing of what was made of it.
                pass
        self._sound[job.name] = job

    def problem(self, job: Job) -> str:
        """The line that says why a job has no result, "" if it has."""
        try:
            if self.is_finished(job):
                return ""
        except UserError as error:
            return f"{job.name} failed: {error}"
        if failure := self.failure(job):
            return f"{job.name} failed: {failure}"
        log = self.log(job)
        if not log.exists():
            return f"{job.name} has not run"
        return f"{job.name} runs" if _is_locked(log) else f"{job.name} was stopped"

    def complete(self, run: Run) -> "ConfigDict":
        """The config of a run whose needs are finished, with what these decide.

        Raises:
            UserError: their files are damaged.
        """
        config = run.config.copy_and_resolve_references()
        if run.init_from is not None:
            config.init_from = self._weights(run, run.init_from)
        if run.rates:
            config.schedule.base_lr = self._best_rate(run)
        self._keep_division(run, config)
        return config

    def _keep_division(self, run: Run, config: "ConfigDict") -> None:
        """Has what goes on divide its batches as before: it came to a checkpoint, so it fits."""
        folder = self.workdir(run)
        if any(path.name.isdigit() for path in folder.glob("checkpoints/*")):
            with contextlib.suppress(UserError, KeyError):
                config.accumulate_steps = read(folder / "config.json")["accumulate_steps"]

    def _weights(self, run: Run, init_from: Run) -> str:
        # A folder that has been moved with all its runs goes on: they are found by their names.
        with contextlib.suppress(UserError, KeyError):
            before = read(self.workdir(run) / "config.json")["init_from"]
            if pathlib.PurePath(before).name == init_from.name:
                return before
        return str(self.workdir(init_from).absolute())

    def _best_rate(self, run: Run) -> float:
        finished = [rate for rate in run.rates if not self.problem(rate)]
        metrics = {
            x.config.schedule.base_lr: read(self.workdir(x) / "metrics.json") for x in finished
        }
        return max(sorted(metrics), key=lambda rate: metrics[rate].get("accuracy") or 0.0)


def _is_locked(log: pathlib.Path) -> bool:
    """Tells whether a worker is at what this is the log of; True where there are no locks."""
    try:
        with log.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def request(task: Task) -> dict[str, Any]:
    """What a task is asked for, as JSON has it."""
    names = [run.name for run in task.of]
    asked = {"function": task.function, "arguments": dict(task.arguments), "of": names}
    return json.loads(json.dumps(asked))


def read(path: pathlib.Path) -> dict[str, Any]:
    """What a file of JSON holds.

    Raises:
        UserError: it cannot be read, or holds no object.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    return value


def _differences(run: Run, saved: dict[str, Any]) -> list[str]:
    """Where the config of a finished run is another, but for what other runs decide."""
    from vit_jax.config import complete_evals, take_from_weights, to_dict
    from vit_jax.config_migration import complete_sections, migrate

    saved = migrate(saved)
    config = complete_evals(complete_sections(run.config))
    wanted = to_dict(take_from_weights(config, saved.get("model", {})))
    if run.init_from is not None:
        wanted["init_from"] = saved.get("init_from")
    if run.rates:
        wanted["schedule"]["base_lr"] = saved.get("schedule", {}).get("base_lr")
    if wanted == saved:
        return []
    from vit_jax.checkpoints.training import config_differences
    from vit_jax.train import resumable_changes  # It takes seconds to import.

    return config_differences(saved, wanted, resumable_changes(wanted) | _HARDWARE)
