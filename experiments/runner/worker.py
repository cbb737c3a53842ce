"""A process that does one run or task after another, so that imports are paid once.

`python -m experiments.runner.worker [CORE ...]` takes a job a line, as JSON, and answers each with
a line; it keeps to the cores of these numbers, if any are given:

    {"workdir": ..., "log": ..., "config": {...}}
    {"workdir": ..., "log": ..., "function": ..., "arguments": {...}, "of": [...], "runs": [...]}
    {"state": "finished" | "failed" | "busy", "reason": ..., "is_unknown": true}

A job that another process is at is "busy": the log is locked, until its process ends, however it
does. The end of stdin ends a worker, while it works by a SIGTERM to itself: whoever asked is gone,
and what has been done so far is saved.
"""

import fcntl
import importlib
import json
import os
import pathlib
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, BinaryIO, TextIO

from experiments.runner.outcomes import TASK_FILE
from vit_jax import command, tensorflow_env
from vit_jax.errors import UserError, first_line
from vit_jax.files import write_json


def main() -> int:
    """Works until stdin ends."""
    if (cores := {*map(int, sys.argv[1:])}) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # Before the libraries start their threads.
    # What else reads or prints must not take or send such lines.
    requests, answers = _own(sys.stdin, "rb"), _own(sys.stdout, "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    working = threading.Event()
    threading.Thread(target=_read, args=(requests, jobs, working), daemon=True).start()
    _prepare()
    while (job := jobs.get()) is not None:
        answer = _do(job)
        working.clear()
        answers.write(json.dumps(answer).encode() + b"\n")
    return 0


def _prepare() -> None:
    tensorflow_env.quiet()
    command.keep_programs()


def _own(stream: TextIO, mode: str) -> BinaryIO:
    # Without a buffer, whose lock would be held by the thread when Python ends.
    return os.fdopen(os.dup(stream.fileno()), mode, buffering=0)


def _read(
    requests: BinaryIO, jobs: "queue.Queue[dict[str, Any] | None]", working: threading.Event
) -> None:
    for line in requests:
        working.set()
        jobs.put(json.loads(line))
    jobs.put(None)
    if working.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _do(job: dict[str, Any]) -> dict[str, Any]:
    with pathlib.Path(job["log"]).open("a") as log, _locked(log) as is_ours:
        if not is_ours:
            return {"state": "busy"}
        try:
            with _printing_to(log):
                _run(job)
        except UserError as error:
            return {"state": "failed", "reason": str(error)}
        except Exception as error:
            kind = type(error).__name__
            reason = f"{kind}: {first_line(error)}, see {log.name}"
            return {"state": "failed", "reason": reason, "is_unknown": True}
    return {"state": "finished"}


@contextmanager
def _locked(file: TextIO) -> Generator[bool]:
    """Locks a file; yields whether it is ours, as it is where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    except OSError:
        yield True
        return
    try:
        yield True
    finally:  # stdout keeps the file open until the next job: to close it would not be enough.
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def _printing_to(log: TextIO) -> Generator[None]:
    """Has all that is printed go to a log, what C++ prints as well, and an error last of all."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    try:
        yield
    except UserError as error:
        command.report(error)
        raise
    except Exception:
        traceback.print_exc()
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _run(job: dict[str, Any]) -> None:
    workdir = pathlib.Path(job["workdir"])
    if "function" in job:
        _do_task(job, workdir)
        return
    from vit_jax.config import read_config
    from vit_jax.train import train

    config = workdir.with_name(f"{workdir.name}.json")
    write_json(config, job["config"])
    train(read_config(str(config)), workdir)


def _do_task(job: dict[str, Any], workdir: pathlib.Path) -> None:
    asked = {key: job[key] for key in ("function", "arguments", "of")}
    metrics, task = workdir / "metrics.json", workdir / TASK_FILE
    # Another command may have done it meanwhile.
    if metrics.exists() and task.exists() and asked.items() <= json.loads(task.read_text()).items():
        return
    module, _, name = job["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    workdir.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    runs = [pathlib.Path(run) for run in job["runs"]]
    scalars = function(workdir=workdir, runs=runs, **job["arguments"])
    # The task before its metrics: by these it is finished.
    metrics.unlink(missing_ok=True)
    write_json(task, asked | {"seconds": time.perf_counter() - begin})
    write_json(metrics, {key: float(x) for key, x in scalars.items()})


if __name__ == "__main__":
    command.run(main)
