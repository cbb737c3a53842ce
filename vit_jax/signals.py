"""SIGINT and SIGTERM: a command ends in one line where that loses nothing, and no signal is lost.

Python raises KeyboardInterrupt wherever the main thread is. In a callback of the garbage collector
that has no effect, in a save it does harm, and while a program is compiled it waits for minutes.
"""

import contextlib
import functools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

# From the first signal until a command that may end anywhere is ended, also in the middle of a
# compilation: what it has half written it removes in that time.
GRACE_SECONDS = 3.0

_POLL_SECONDS = 0.1


class Stopped(KeyboardInterrupt):
    """The end of a run by SIGINT that has been told already, see `told`."""


class Signals:
    """The signal that has come, and whether it may end the program at any place.

    Attributes:
        received: the last one, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._held = False
        self._pass_on: Callable[[], Any] | None = None

    @contextlib.contextmanager
    def held(self, pass_on: Callable[[], Any] | None = None) -> Generator[None]:
        """Has what is within go on after a signal: it looks at `received`, and leaves.

        Args:
            pass_on: is called instead of anything else, by what has no place to end alone.
        """
        with self._set(held=True, pass_on=pass_on):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Generator[None]:
        """Ends what is within `held` and this as well by KeyboardInterrupt, unless passed on."""
        if self._pass_on is not None:
            yield
            return
        with self._set(held=False):
            if self.received is not None:
                raise KeyboardInterrupt(self.received)
            yield

    @contextlib.contextmanager
    def _set(self, held: bool, pass_on: Callable[[], Any] | None = None) -> Generator[None]:
        before = self._held, self._pass_on, _guard.held
        self._held, self._pass_on = held, pass_on
        _guard.held |= held  # What is held sees to its end also after what ends at once in it.
        try:
            yield
        finally:
            self._held, self._pass_on, _guard.held = before

    def handle(self, number: int, frame: Any) -> None:
        """Handles a signal, in the main thread."""
        del frame
        self.received = signal.Signals(number)
        if self._pass_on is not None:
            self._pass_on()
        elif not self._held:
            raise KeyboardInterrupt(self.received)


@contextlib.contextmanager
def catching(*numbers: signal.Signals) -> Generator[Signals]:
    """Yields what knows of these signals; one that ends the program raises KeyboardInterrupt.

    Of SIGTERM that is SystemExit, 143, further out. A signal that whoever started the program has
    it ignore, as a shell does for what runs in the background, stays ignored.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = tuple(x for x in numbers if signal.getsignal(x) != signal.SIG_IGN)
    previous = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    except KeyboardInterrupt as error:
        if signals.received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Guard:
    """The part of a command's guard that other threads see.

    Attributes:
        held: whether the program sees to its end itself.
        told: whether it has said that it ends.
        repeated: how many signals were sent again because their exception had no effect.
    """

    held = False
    told = False
    repeated = 0


_guard = _Guard()


def told() -> None:
    """Notes that a line has been printed of the signal: another would be one too many."""
    _guard.told = True


@contextlib.contextmanager
def guarding() -> Generator[Signals]:
    """Guards a command: it can always be ended, at the second SIGINT at once.

    Yields:
        What knows of the signals; of SIGTERM it raises SystemExit.
    """
    with catching(signal.SIGINT, signal.SIGTERM) as signals, contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_sending_again())
            stack.enter_context(_watching())
        yield signals


@contextlib.contextmanager
def _sending_again() -> Generator[None]:
    """Sends the signal again whose exception was dropped, by a callback or a destructor."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            previous(unraisable)
            return
        arguments = getattr(unraisable.exc_value, "args", ())
        number = arguments[0] if arguments else signal.SIGINT
        _guard.repeated += 1
        send = functools.partial(os.kill, os.getpid(), number)
        threading.Timer(_POLL_SECONDS, send).start()  # When the callback has ended.

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # Another that has been put before it stays.
            sys.unraisablehook = previous


@contextlib.contextmanager
def _watching() -> Generator[None]:
    """Has a thread learn of signals, also while the main one waits for what is not Python."""
    _guard.repeated, _guard.told = 0, False
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()


def _watch(reader: socket.socket) -> None:
    first, interrupts, deadline = None, 0, 0.0
    with reader:
        while True:
            if select.select([reader], [], [], None if first is None else _POLL_SECONDS)[0]:
                received = reader.recv(64)
                if not received:
                    return
                ours = [x for x in received if x in (signal.SIGINT, signal.SIGTERM)]
                interrupts += ours.count(signal.SIGINT)
                if first is None and ours:
                    first, deadline = ours[0], time.monotonic() + GRACE_SECONDS
            if interrupts - _guard.repeated > 1:
                os._exit(128 + signal.SIGINT)
            if _guard.held or _guard.told:  # It ends by itself, the others of its run with it.
                deadline = time.monotonic() + GRACE_SECONDS
            if first is not None and time.monotonic() > deadline:
                os.write(2, b"interrupted\n")
                os._exit(128 + first)
