"""Lets benchmarks prepare side by side on one machine, and take its device in turns.

`gpu.py` starts them all at once. Each compiles while no other does, since XLA tries kernels out;
says when it could be timed; and waits until it is told to be. Alone, a benchmark waits for nothing.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

# A folder of the benchmarks that run together, and what one of them is called there.
FOLDER, NAME = "BENCHMARK_TURNS", "BENCHMARK_NAME"
_PAUSE_SECONDS = 0.05


def ready(folder: Path, name: str) -> Path:
    """The file with which a benchmark says that it can be timed."""
    return folder / f"{name}.ready"


def go(folder: Path, name: str) -> Path:
    """The file with which it is told to."""
    return folder / f"{name}.go"


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Keeps the device to this process, as far as the others compile."""
    if FOLDER not in os.environ:
        yield
        return
    with (Path(os.environ[FOLDER]) / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wait() -> None:
    """Waits for the turn of this process to be timed; ends it if who gives turns has gone."""
    if FOLDER not in os.environ:
        return
    folder, name = Path(os.environ[FOLDER]), os.environ[NAME]
    ready(folder, name).touch()
    parent = os.getppid()
    while not go(folder, name).exists():
        if os.getppid() != parent:
            raise SystemExit("gpu.py has ended, and nobody else gives turns")
        time.sleep(_PAUSE_SECONDS)
