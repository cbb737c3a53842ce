"""Lines and a bar on a terminal: a pseudo-terminal, whose screen is read as a person reads it."""

import contextlib
import fcntl
import os
import re
import signal
import struct
import sys
import termios
import tty
import types

import jax.numpy as jnp
import pytest

from vit_jax import interruption, reporting, terminal


class Screen:
    """A pseudo-terminal, and what it shows: it knows carriage returns and new lines."""

    def __init__(self, columns):
        self._master, slave = os.openpty()
        tty.setraw(slave)  # New lines come as they were written.
        os.set_blocking(self._master, False)
        self.stdout = os.fdopen(slave, "w", encoding="utf-8")
        self.text = ""
        self.resize(columns)

    def resize(self, columns):
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, size)

    def read(self):
        """All that has been written to it."""
        self.stdout.flush()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._master, 1 << 16):
                self.text += data.decode()
        return self.text

    def lines(self):
        shown = []
        for line in self.read().split("\n"):
            shown.append("")
            for part in line.split("\r"):
                shown[-1] = part + shown[-1][len(part) :]
        return [line.rstrip() for line in shown]

    def close(self):
        self.stdout.close()
        os.close(self._master)


@pytest.fixture
def screen(monkeypatch):
    screen = Screen(100)
    monkeypatch.setenv("TERM", "xterm")
    yield screen
    screen.close()


def report(folder, stdout, between=lambda step: None):
    """Ten steps of a run, of which the fifth and the last are logged."""
    cost = reporting.Cost(batch_size=8, devices=1, flops=1e9)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stdout))
        reporter = reporting.Reporter(folder, 0, 10, reporting.Progress(), cost, lambda step: 0.1)
        stack.callback(reporter.close)
        for step in range(1, 11):
            metrics = {"loss": jnp.float32(1.0), "grad_norm": jnp.float32(1.0)}
            reporter.add(step, metrics)
            if step % 5 == 0:
                reporter.log(step)
            between(step)


def test_a_bar_stays_below_the_lines(screen, tmp_path):
    def between(step):
        if step == 6:
            terminal.say("evaluated: accuracy 0.5")
        if step == 7:
            signals = types.SimpleNamespace(received=signal.SIGTERM)
            interruption.Stop(signals).say("saved step 7")

    report(tmp_path, screen.stdout, between)
    evaluated, saved, bar, end = screen.lines()
    assert (evaluated, saved, end) == ("evaluated: accuracy 0.5", "SIGTERM: saved step 7", "")
    assert re.fullmatch(r"step 10/10  loss 1\.0000  [\d,]+ images/s  ETA 0s  \|█+\|", bar)


@pytest.mark.parametrize("columns", [5, 20, 60])
def test_a_bar_fits_a_terminal_that_is_made_narrow(columns, screen, tmp_path):
    def between(step):
        if step == 5:
            screen.read()
            screen.text = ""
            screen.resize(columns)

    report(tmp_path, screen.stdout, between)
    drawn = [part.rstrip() for part in re.split(r"[\r\n]", screen.read())]
    assert "step 10/10"[: columns - 1] in "".join(drawn)
    assert max(map(len, drawn)) <= columns


def test_a_terminal_of_unknown_width_has_a_bar(screen, tmp_path):
    screen.resize(0)
    report(tmp_path, screen.stdout)
    assert re.search(r"step 10/10  loss 1\.0000 .* images/s", screen.lines()[-2])


def test_a_bar_has_no_color(screen, tmp_path):
    report(tmp_path, screen.stdout)
    assert "\x1b[" not in screen.read()


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_has_plain_lines(term, screen, tmp_path, monkeypatch):
    monkeypatch.delenv("TERM")
    if term:
        monkeypatch.setenv("TERM", term)
    report(tmp_path, screen.stdout)
    assert "\r" not in screen.read()
    assert [line.partition("  ")[0] for line in screen.lines()] == ["step 5/10", "step 10/10", ""]


def test_no_terminal_has_plain_lines(capsys, tmp_path):
    report(tmp_path, sys.stdout)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(step \d+/10  loss 1\.0000  [\d,]+ images/s  ETA \d+s\n){2}", out)
    assert err == ""
