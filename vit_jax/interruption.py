"""SIGTERM, by which schedulers end a run: it is saved first."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator

import jax
from jax.experimental import multihost_utils


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
