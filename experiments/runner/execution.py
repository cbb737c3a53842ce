"""Runs what experiments need: several at once, each after what it needs, nothing twice.

What is finished is read, what was stopped goes on. One that fails, or takes its process with it, is
named in a line; what needs it has failed as well, and the others go on.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from experiments.runner import graph, placement
from experiments.runner.checks import check_run
from experiments.runner.experiment import Measurement, Run, Task
from experiments.runner.graph import Job
from experiments.runner.outcomes import Outcomes, read, request
from vit_jax.config import to_dict
from vit_jax.errors import UserError
from vit_jax.files import make_folder
from vit_jax.reporting import format_seconds
from vit_jax.runner import cause, say
from vit_jax.signals import Signals, Stopped, catching

WORKER = (sys.executable, "-m", "experiments.runner.worker")

# What does not end sooner is said to run.
_LONG_SECONDS = 20.0
# How often it is looked whether others have finished what is waited for.
_POLL_SECONDS = 2.0
# How long another shard has to try again what failed before this command began.
_RETRY_HOURS = 2.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an execution has come to.

    Attributes:
        failed: the names of what failed, or needs what failed.
        elsewhere: the names of what other shards have still to do.
    """

    failed: list[str]
    elsewhere: list[str]


def execute(
    measurements: Sequence[Measurement],
    outcomes: Outcomes,
    *,
    workers: int,
    runs_per_process: int,
    shard: tuple[int, int] = (0, 1),
    title: str = "all",
) -> Outcome:
    """Runs what measurements need and is not finished, or the part of one shard.

    Args:
        measurements: of one or more experiments.
        outcomes: where the runs lie.
        workers: how many run at once.
        runs_per_process: after so many a process is replaced.
        shard: which part this is, from 0, and of how many. What it needs of another it waits for.
        title: of it all, in the first line that is printed.

    Returns:
        What failed, and what is left to others.

    Raises:
        UserError: the folder cannot be written, or there are less GPUs than workers.
        SystemExit: 143 after SIGTERM, when the present runs have saved their state.
        Stopped: after SIGINT, likewise.
    """
    environments = placement.environments(workers)
    make_folder(outcomes.folder)
    jobs = graph.collect(measurements)
    mine = set(graph.part(jobs, *shard))
    sources = {source.name for measurement in measurements for source in measurement.sources}
    board = Board(jobs, sources, mine, outcomes)
    say(f"{title}: {board.counts()}, {workers} at a time")
    board.check()
    places = zip(placement.shares(workers), environments, strict=True)
    pool = [Slot(*place, runs_per_process) for place in places]
    with catching(signal.SIGINT, signal.SIGTERM) as signals, signals.held():
        try:
            _work(board, pool, signals)
        except BaseException:
            if busy := sum(slot.job is not None for slot in pool):
                say(f"stopping {busy}; the same command continues from what they save now")
            for slot in pool:
                slot.stop()
            if signals.received == signal.SIGINT:
                raise Stopped from None
            raise
        finally:
            for slot in pool:
                slot.close()
    return Outcome(board.failed(), board.elsewhere())


def _work(board: "Board", pool: "Sequence[Slot]", signals: Signals) -> None:
    while board.has_work() or any(slot.job for slot in pool):
        for slot in pool:
            others = [x.job for x in pool if x.job]
            if slot.job or any(map(_is_alone, others)):
                continue
            if job := board.next_due(others):
                _start(job, slot, board)
        busy = {slot.answers: slot for slot in pool if slot.job}
        with signals.at_once():
            ready = wait(list(busy), timeout=_POLL_SECONDS)
        for slot in (busy[pipe] for pipe in ready):
            board.settle(*slot.receive())
        for slot in pool:
            slot.tell_if_long()


def _start(job: Job, slot: "Slot", board: "Board") -> None:
    try:
        slot.start(job, board.outcomes, board.label(job))
    except UserError as error:  # The files of what it needs are damaged.
        board.settle(job, {"state": "failed", "reason": str(error)})


def _is_alone(job: Job) -> bool:
    return isinstance(job, Task) and job.alone


class Board:
    """What is left to do, what can begin, and what has become of the others.

    Args:
        jobs: all there are, each after what it needs.
        sources: the names of those that are asked for; of the others only what these lack is done.
        mine: the names of those that this shard does.
        outcomes: where they lie.
    """

    def __init__(
        self, jobs: Mapping[str, Job], sources: Iterable[str], mine: set[str], outcomes: Outcomes
    ):
        self.outcomes = outcomes
        self._states: dict[str, str] = {}
        self._needed = self._find_needed(jobs, sources)
        self._mine = {name: job for name, job in self._needed.items() if name in mine}
        self._others = {name: job for name, job in self._needed.items() if name not in mine}
        self._left = dict(self._mine)
        self._not_before: dict[str, float] = {}
        self._looked = 0.0
        self._awaited: set[str] = set()
        self._total = len(mine)
        self._settled = len(mine - self._mine.keys())
        self._begin = time.time()

    def counts(self) -> str:
        """How many runs and tasks this shard has, and how many of them need not run any more."""
        return f"{self._total} runs, {self._settled} finished"

    def check(self) -> None:
        """Has what cannot run fail, before what it needs has run for days."""
        for job in self._needed.values():
            self._check(job)

    def _find_needed(self, jobs: Mapping[str, Job], sources: Iterable[str]) -> dict[str, Job]:
        """What is asked for and not finished, and likewise what that needs."""
        needed, rest = set(), list(sources)
        while rest:
            name = rest.pop()
            if name not in self._states and not self._is_finished(jobs[name]):
                self._states[name] = "left"
                needed.add(name)
                rest += [job.name for job in jobs[name].needs]
        return {name: job for name, job in jobs.items() if name in needed}

    def _is_finished(self, job: Job) -> bool:
        try:
            finished = self.outcomes.is_finished(job)
        except UserError:  # Its attempt will say it.
            return False
        if finished:
            self._states[job.name] = "finished"
        return finished

    def _check(self, job: Job) -> None:
        try:
            self.outcomes.is_finished(job)
            if isinstance(job, Run):
                check_run(job)
        except UserError as error:
            if job.name in self._mine:
                self.settle(job, {"state": "failed", "reason": str(error)})

    def has_work(self) -> bool:
        """Tells whether something of this shard has not begun."""
        return bool(self._left)

    def label(self, job: Job) -> str:
        """Names a job, with how many have been settled."""
        return f"[{self._settled}/{self._total}] {job.name}"

    def next_due(self, others: Sequence[Job]) -> Job | None:
        """Takes what can begin now; what cannot any more has failed.

        What needs to be alone comes last. Beside others something that goes back to another run is
        taken, if there is any: those that go back to the same one are often of the same programs,
        which then are compiled once, not at the same time.

        Args:
            others: what is at work.
        """
        self._look_at_others()
        due = [job for job in sorted(self._left.values(), key=_is_alone) if self._is_due(job)]
        if others:
            due = [job for job in due if not _is_alone(job)]
        roots = {graph.root(job).name for job in others}
        apart = (job for job in due if graph.root(job).name not in roots)
        job = next(apart, next(iter(due), None))
        if job is not None:
            del self._left[job.name]
        return job

    def _is_due(self, job: Job) -> bool:
        states = {needed.name: self._states[needed.name] for needed in job.needs}
        if reason := _hopeless(job, states, self.outcomes):
            self.settle(job, {"state": "failed", "reason": reason})
        elif "left" in states.values():
            self._tell_awaited([x for x in states if states[x] == "left" and x in self._others])
        elif time.monotonic() >= self._not_before.get(job.name, 0.0):
            # Another command may have done it.
            if job.name not in self._not_before or not self._is_finished(job):
                return True
            self.settle(job, {"state": "finished"})
        return False

    def _look_at_others(self) -> None:
        if time.monotonic() < self._looked + _POLL_SECONDS:
            return
        self._looked = time.monotonic()
        awaited = {needed.name for job in self._left.values() for needed in job.needs}
        self._read_others(awaited & self._others.keys())

    def _read_others(self, names: Iterable[str]) -> None:
        for job in (self._others[name] for name in names if self._states[name] == "left"):
            if not self._is_finished(job) and self._has_failed_elsewhere(job):
                self._states[job.name] = "failed"

    def _has_failed_elsewhere(self, job: Job) -> bool:
        """What failed before this command began is tried again, when its shard comes to it."""
        try:
            failed = self.outcomes.error(job).stat().st_mtime
        except OSError:
            return False
        return failed >= self._begin or time.time() > self._begin + 3600 * _RETRY_HOURS

    def _tell_awaited(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._awaited:
                self._awaited.add(name)
                failure = self.outcomes.failure(self._others[name])
                again = f" again within {_RETRY_HOURS:g} hours: it failed before" if failure else ""
                say(f"waiting for {name}, which another shard has to do{again}")

    def settle(self, job: Job, answer: Mapping[str, Any], seconds: float | None = None) -> None:
        """Takes down what has become of a job: "finished", "failed", or "busy" elsewhere."""
        if answer["state"] == "busy":
            if not self._not_before:
                say(f"{self.label(job)}: another command is at it; what others do is waited for")
            self._not_before[job.name] = time.monotonic() + _POLL_SECONDS
            self._left = {
                name: x for name, x in self._mine.items() if name in {job.name, *self._left}
            }
            return
        self._left.pop(job.name, None)
        self._states[job.name] = answer["state"]
        self._settled += 1
        if answer["state"] == "failed":
            self.outcomes.fail(job, answer["reason"])
            say(f"{self.label(job)}: failed: {answer['reason']}")
        else:
            took = "" if seconds is None else f", {format_seconds(seconds)}"
            say(f"{self.label(job)}: {_found(job, self.outcomes)}{took}")

    def failed(self) -> list[str]:
        """The names of what failed, also elsewhere as far as it is known."""
        return [name for name in self._needed if self._states[name] == "failed"]

    def elsewhere(self) -> list[str]:
        """The names of what others have still to do: not of what failed, whenever that was."""
        self._read_others(self._others)
        left = (job for name, job in self._others.items() if self._states[name] == "left")
        return [job.name for job in left if not self.outcomes.failure(job)]


def _hopeless(job: Job, states: Mapping[str, str], outcomes: Outcomes) -> str:
    """The reason for which a job cannot run any more, "" if it may."""
    rates = {rate.name for rate in job.rates} if isinstance(job, Run) else set()
    failed = [needed for needed in job.needs if states[needed.name] == "failed"]
    lost = [needed for needed in failed if needed.name not in rates]
    if not lost and rates and len(failed) == len(rates):
        lost = failed
    return f"{lost[0].name} failed: {outcomes.failure(lost[0])}" if lost else ""


def _found(job: Job, outcomes: Outcomes) -> str:
    try:
        metrics = read(outcomes.workdir(job) / "metrics.json")
    except UserError as error:
        return str(error)
    # "accuracy" in metrics.jsonl is that of the batches of training.
    name = "eval_accuracy" if isinstance(job, Run) else "accuracy"
    return f"{name} {metrics['accuracy']:.4f}" if "accuracy" in metrics else "done"


class Slot:
    """A place for a worker, which is started when there is something to do, and what it is at.

    Args:
        cores: numbers of those that its processes keep to, empty for all.
        environment: of its processes.
        runs_per_process: after so many it is replaced.

    Attributes:
        job: what it is at, or None.
    """

    def __init__(self, cores: Sequence[int], environment: Mapping[str, str], runs_per_process: int):
        self.job: Job | None = None
        self._command = [*WORKER, *map(str, cores)]
        self._environment = environment
        self._runs_per_process = runs_per_process
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def answers(self) -> Any:
        """The pipe in which the answer arrives."""
        return self._running().stdout

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def start(self, job: Job, outcomes: Outcomes, label: str) -> None:
        """Has the worker begin a job; `receive` tells what became of it.

        Raises:
            UserError: the files of what it needs are damaged, or its log cannot be written.
        """
        line = json.dumps(_message(job, outcomes)).encode() + b"\n"
        self._label, self._log = label, outcomes.log(job)
        self._begin, self._told = time.monotonic(), False
        outcomes.forget_failure(job)
        try:  # Before the process, which may end before it opens it.
            self._log.touch()
            self._start = self._log.stat().st_size
        except OSError as error:
            raise UserError(f"{self._log} cannot be written: {error.strerror}") from error
        if self._process is None:
            self._done = 0
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,  # Ctrl-C comes here, and from here as a SIGTERM.
                bufsize=0,
            )
        self.job = job
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line)
        except BrokenPipeError:  # It has died: `receive` says how.
            pass

    def receive(self) -> tuple[Job, dict[str, Any], float]:
        """The job, what became of it and the seconds that it took."""
        job, process = self.job, self._running()
        assert job is not None and process.stdout is not None
        line = process.stdout.readline()
        seconds = time.monotonic() - self._begin
        self.job = None
        if not line.endswith(b"\n"):
            self.close()
            reason = cause(process.returncode, self._log, self._start)
            return job, {"state": "failed", "reason": reason}, seconds
        answer = json.loads(line)
        self._done += isinstance(job, Run)
        # What an unknown error leaves behind, the next run should not have to do with.
        if self._done >= self._runs_per_process or answer.get("is_unknown"):
            self.close()
        return job, answer, seconds

    def tell_if_long(self) -> None:
        """Says once of what runs for long where its output is."""
        if self.job and not self._told and time.monotonic() > self._begin + _LONG_SECONDS:
            self._told = True
            say(f"{self._label}: running, see {self._log}")

    def stop(self) -> None:
        """Has a worker that is at something save it and end."""
        if self._process is not None and self.job is not None:
            self._process.terminate()

    def close(self) -> None:
        """Ends the worker, which is at nothing or has been stopped, and waits for it."""
        if self._process is not None:
            process, self._process = self._process, None
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _message(job: Job, outcomes: Outcomes) -> dict[str, Any]:
    where = {
        "workdir": str(outcomes.workdir(job).absolute()),
        "log": str(outcomes.log(job).absolute()),
    }
    if isinstance(job, Run):
        return where | {"config": to_dict(outcomes.complete(job))}
    runs = [str(outcomes.workdir(run).absolute()) for run in job.of]
    return where | request(job) | {"runs": runs}
