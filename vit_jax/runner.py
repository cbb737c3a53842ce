"""Runs configs one after another, each in its own process, and puts what they found in tables.

A sweep or an experiment lists its runs, hands them to `run_all` and reads the accuracies:

    runs = [Run("lr0.01", config), ...]      # the name is also the directory of the run
    metrics = run_all(runs, workdir)         # {"lr0.01": what its metrics.json holds, or None}

A run crashes, or is killed for memory, alone: it is named in one line and the others go on. The
same command runs nothing twice: a finished run is read, and one that was stopped continues from
its last checkpoint.
"""

import fcntl
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import vit_jax
from vit_jax.errors import UserError
from vit_jax.files import write_json
from vit_jax.printable import printable, table_cell
from vit_jax.signals import Stopped, catching

if TYPE_CHECKING:
    from ml_collections import ConfigDict

MAIN = (sys.executable, "-m", "vit_jax.main")


class Run(NamedTuple):
    """A config, and the name of the directory in which it runs."""

    name: str
    config: "ConfigDict"


def run_all(runs: Sequence[Run], workdir: str | os.PathLike) -> dict[str, dict[str, Any] | None]:
    """Runs what is not finished yet, and returns what each run's metrics.json holds.

    Args:
        runs: in the order in which they run, of different names.
        workdir: takes NAME/ (see `vit_jax.train.train`), NAME.json, the config, and NAME.log,
            what the run printed, of every run.

    Returns:
        By name; None for a run that failed, which has been said in a line.

    Raises:
        UserError: a config is wrong, or `workdir` cannot be written; nothing has run then.
        SystemExit: 143 after SIGTERM, when the present run has saved its state.
    """
    from vit_jax.config import check_config  # With JAX it takes a second to import.

    for run in runs:
        check_config(run.config)
    workdir = pathlib.Path(workdir).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"workdir {workdir} is not writable ({error.strerror}): choose another --workdir"
        ) from error
    found: dict[str, dict[str, Any] | None] = {}
    for number, run in enumerate(runs, 1):
        label = f"[{number}/{len(runs)}] {run.name}"
        try:
            metrics = _finish(run, workdir, label)
        except UserError as error:
            found[run.name] = None
            say(f"{label}: failed: {error}")
        else:
            found[run.name] = metrics
            say(f"{label}: accuracy {metrics['accuracy']:.4f}")
    return found


def _finish(run: Run, workdir: pathlib.Path, label: str) -> dict[str, Any]:
    from vit_jax.config import to_dict

    directory = workdir / run.name
    finished, config = directory / "metrics.json", to_dict(run.config)
    # A finished run of a config that differs is left to vit_jax.train: it knows what may differ.
    if not finished.exists() or _read(directory / "config.json") != config:
        write_json(workdir / f"{run.name}.json", config)
        _start(run.name, workdir, label)
    return _read(finished)


def _start(name: str, workdir: pathlib.Path, label: str) -> None:
    """Runs vit_jax.main to its end."""
    config = workdir / f"{name}.json"
    command = [*MAIN, "--config", str(config), "--workdir", str(workdir / name)]
    package = pathlib.Path(vit_jax.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    log = workdir / f"{name}.log"
    with log.open("a") as output:
        try:  # The child inherits the lock: it outlives a parent that is killed.
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process still runs it: wait for that one") from None
        start = output.tell()
        say(f"{label}: running, see {log}")
        with (
            catching(signal.SIGINT, signal.SIGTERM) as signals,
            signals.held(),
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C comes here, and from here as a SIGTERM.
            ) as child,
        ):
            try:
                with signals.at_once():
                    code = child.wait()
            except BaseException:
                child.terminate()
                say(f"{label}: stopping; the same command continues from what it saves now")
                child.wait()
                if signals.received == signal.SIGINT:
                    raise Stopped from None
                raise
    if code:
        raise UserError(cause(code, log, start))


def cause(code: int, log: pathlib.Path, start: int) -> str:
    """The reason for which a process ended with a code other than 0, in a line.

    Args:
        code: of its exit; less than 0 is the signal that killed it.
        log: what it printed.
        start: where that begins, in bytes.
    """
    with log.open(errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return f"{how}, see {log}: {lines[-1] if lines else 'it printed nothing'}"


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1), None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def percent(mean: float | None, sd: float | None = None) -> str:
    """An accuracy in [0, 1] as the paper prints it: "99.15" or "99.15 ± 0.03"."""
    if mean is None:
        return ""
    return f"{100 * mean:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table, the first columns, so many, of words and the others of numbers."""
    rule = ["-"] * words + ["-:"] * (len(header) - words)
    cells = (map(table_cell, row) for row in (header, rule, *rows))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def say(line: str) -> None:
    """Prints a line at once, also into a file."""
    print(printable(line), flush=True)
