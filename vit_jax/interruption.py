"""Ends of a run from outside: SIGTERM, by which schedulers do, and a directory that is full."""

import contextlib
import errno
import pathlib
import signal
import threading
from collections.abc import Callable, Generator

import jax
from jax.experimental import multihost_utils

from vit_jax.files import storage_errors


@contextlib.contextmanager
def sigterm() -> Generator[Callable[[int], bool]]:
    """Yields a function of the step: whether to save and stop, the same on all processes."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # noqa: ARG005
        return
    received = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()  # noqa: ARG005
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def making_workdir(workdir: pathlib.Path) -> Generator[None]:
    """Makes the directory, if it is not there; what an error leaves empty of it is removed.

    Raises:
        UserError: it cannot be written.
    """
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    try:
        _make(workdir)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # What is not empty stays.
            for path in made:
                path.rmdir()
        raise


def _make(workdir: pathlib.Path) -> None:
    probe = workdir / f".writable-{jax.process_index()}"
    with storage_errors(
        lambda reason: f"workdir {workdir} is not writable ({reason}): choose another --workdir"
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def full_disk(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Turns the error of a disk that takes no more into a UserError with the way out."""
    return storage_errors(
        lambda reason: (
            f"{workdir} cannot be written: {reason}; free space and run the same command again, it "
            "continues from the last checkpoint"
        ),
        errnos=(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    )
