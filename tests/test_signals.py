"""How commands end by SIGINT and SIGTERM, each in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

# What the command does; `ready` tells that it has begun.
COMMANDS = """
import contextlib, gc, hashlib, os, pathlib, signal, sys, time
from vit_jax import command, signals

def ready():
    print("ready", flush=True)

def sleep():
    ready()
    time.sleep(30)

def collect():
    class Slow:
        def __del__(self):
            ready()
            time.sleep(1)
            time.sleep(1)
    Slow()
    time.sleep(30)

def compute():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def wrap():
    try:
        sleep()
    except KeyboardInterrupt as error:
        raise RuntimeError("a library ends") from error

def tidy():
    try:
        sleep()
    finally:
        print("tidy", flush=True)

def save():
    with signals.catching(signal.SIGINT, signal.SIGTERM) as caught, caught.held():
        ready()
        while caught.received is None:
            time.sleep(0.01)
        time.sleep(4 if sys.argv[2] == "once" else 30)
        print("saved", flush=True)
        raise signals.Stopped

def evaluate():
    with signals.catching(signal.SIGINT, signal.SIGTERM) as caught, caught.held():
        try:
            with caught.at_once():
                ready()
                # It takes longer than signals.GRACE_SECONDS, on any machine.
                hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)
        except KeyboardInterrupt:
            print("saved", flush=True)
            raise signals.Stopped

command.run(lambda: globals()[sys.argv[1]]() or 0)
"""


def start(name, *arguments, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS, name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # It is within what it does then.
    return process


def end(process, *numbers):
    """Sends signals; returns the exit code, what is printed and the seconds that it took."""
    begin = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, errors, time.monotonic() - begin


@pytest.mark.parametrize("name", ["sleep", "collect", "compute", "wrap"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_ends_in_one_line_wherever_it_is(name, number):
    code, output, errors, seconds = end(start(name), number)
    assert (code, output, errors) == (128 + number, "", "interrupted\n")
    assert seconds < 15


def test_what_is_half_done_is_put_away():
    assert end(start("tidy"), signal.SIGTERM)[:3] == (143, "tidy\n", "interrupted\n")


def test_what_is_held_is_done_first():
    code, output, errors, _ = end(start("save", "once"), signal.SIGINT)
    assert (code, output, errors) == (130, "saved\n", "")


def test_what_is_held_is_done_also_after_what_could_not_end_at_once():
    assert end(start("evaluate"), signal.SIGTERM)[:3] == (143, "saved\n", "")


@pytest.mark.parametrize("name", ["save", "compute"])
def test_the_second_ctrl_c_leaves_at_once(name):
    code, output, errors, seconds = end(start(name, "twice"), signal.SIGINT, signal.SIGINT)
    assert (code, output, errors) == (130, "", "")
    assert seconds < 15


def test_a_signal_that_the_shell_has_it_ignore_stays_ignored():
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = start("sleep", preexec_fn=ignore)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert end(process, signal.SIGTERM)[0] == 143
