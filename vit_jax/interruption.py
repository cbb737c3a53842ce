"""Ends of a run from outside: a signal, a directory that is full or that another run has."""

import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import signal
import socket
import tempfile
from collections.abc import Generator
from typing import NoReturn, TextIO

import jax
from jax.experimental import multihost_utils

from vit_jax.errors import UserError
from vit_jax.files import storage_errors
from vit_jax.signals import Signals, Stopped, catching, told
from vit_jax.terminal import say


class Stop:
    """A run's end by a signal: SIGTERM, by which schedulers end it, or Ctrl-C."""

    def __init__(self, signals: Signals) -> None:
        """Takes what knows of the signals of this process."""
        self._signals = signals

    def is_due(self, step: int) -> bool:
        """Tells all processes, each of which must ask, whether to save and stop after a step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signals.received is not None

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Has what is within go on until it asks whether its end is due."""
        if jax.process_count() > 1:  # JAX tells the others of a SIGTERM, so that all end together.
            return self._signals.held(functools.partial(signal.raise_signal, signal.SIGTERM))
        return self._signals.held()

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Ends what is within by KeyboardInterrupt, in a run of one process: it may take long."""
        return self._signals.at_once()

    def has_come(self) -> bool:
        """Tells whether a signal has come to this process."""
        return self._signals.received is not None

    def say(self, text: str) -> None:
        """Prints the line that tells of the signal."""
        told()
        say(f"{(self._signals.received or signal.SIGTERM).name}: {text}")

    def leave(self, text: str) -> NoReturn:
        """Ends the run, on all processes, with a line: by SystemExit or `Stopped`."""
        self.say(text)
        if jax.process_count() > 1:
            raise SystemExit(128 + (self._signals.received or signal.SIGTERM))
        raise Stopped


@contextlib.contextmanager
def stopping() -> Generator[Stop]:
    """Yields what ends the run; before its first step a signal does so at once.

    Raises:
        SystemExit: 143 after SIGTERM.
        Stopped: after Ctrl-C.
    """
    # Of several processes JAX catches SIGTERM.
    ours = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    with catching(*ours) as signals:
        stop = Stop(signals)
        try:
            yield stop
        except Stopped:
            raise
        except KeyboardInterrupt:
            if signals.received is None:
                raise
            stop.say("stopped before the next step: nothing is lost")
            raise Stopped from None


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
    with storage_errors(
        lambda reason: f"workdir {workdir} is not writable ({reason}): choose another --workdir"
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):  # It has no name that another could take.
            pass


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Generator[None]:
    """Keeps other runs out of a directory, by a lock that ends with this process however it ends.

    The lock is on `.lock` in it, which is removed at the end; one that a killed run has left is no
    obstacle. Of several processes the first holds it. Where the file system has no locks nobody is
    kept out.

    Raises:
        UserError: another run is at work there.
    """
    if jax.process_index() != 0:
        yield
        return
    path = workdir / ".lock"
    file = _lock(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # While it is locked: see `_lock`.
            path.unlink()
        file.close()


def _lock(path: pathlib.Path) -> TextIO:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.readline().strip() or "another process"
            raise UserError(
                f"workdir {path.parent} is taken by a run that is at work, {holder}: wait for its "
                "end or end it, or choose another --workdir"
            ) from None
        except OSError:  # There are no locks here.
            return file
        # Whoever held it may have removed the file just before: what is locked then has no name.
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
                return file
        file.close()


def full_disk(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Turns the error of a disk that takes no more into a UserError with the way out."""
    return storage_errors(
        lambda reason: (
            f"{workdir} cannot be written: {reason}; free space and run the same command again, it "
            "continues from the last checkpoint"
        ),
        errnos=(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    )
