"""Strikes its own process at a chosen moment. Python runs this file at the start of every child.

`VIT_JAX_FAULT` holds a `harness.Fault` as JSON. The moment is the n-th call of a kind whose text
matches: Python's audit events tell of every file that it opens, renames, makes or removes, from
whatever thread, and the lines that are printed are noted here. So it is the same moment in every
run, however fast the machine is.
"""

import builtins
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time

WRITES = os.O_WRONLY | os.O_RDWR


def kind_and_text(event, args):
    """What an audit event is here, None if it is nothing that a moment is made of."""
    if event == "open":
        path, _, flags = args
        return "write" if (flags or 0) & WRITES else "read", str(path)
    if event in ("os.rename", "os.mkdir", "shutil.rmtree", "import"):
        return event.rpartition(".")[2], str(args[1] if event == "os.rename" else args[0])
    return None


class Striker:
    def __init__(self, kind, pattern, nth, do, target, amount, mark):
        self.kind, self.pattern, self.nth = kind, re.compile(pattern), nth
        self.do, self.target, self.amount, self.mark = do, target, amount, mark
        self.count = itertools.count(1)  # Its next() is atomic: events come from many threads.

    def audit(self, event, args):
        found = kind_and_text(event, args)
        if found is not None:
            self.notice(*found)

    def notice(self, kind, text):
        if kind == self.kind and self.pattern.search(text) and next(self.count) == self.nth:
            with open(self.mark, "w") as file:
                file.write(text)
            getattr(self, self.do)()

    def kill(self):
        """The signal `target`, `amount` seconds after the moment."""
        number = signal.Signals[f"SIG{self.target}"]
        if self.amount:
            later = threading.Timer(self.amount, os.kill, (os.getpid(), number))
            later.daemon = True  # A process that has come to its end does not wait for it.
            later.start()
        else:
            os.kill(os.getpid(), number)

    def limit(self):
        """No file grows from now on, whoever writes it: EFBIG, which needs no rights."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

    def fill(self):
        """Fills the disk that `target` lies on: ENOSPC."""
        with open(self.target, "wb", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        ballast.write(bytes(size))
                except OSError:
                    continue

    def read_only(self):
        """Takes the right to write from every directory in `target`."""
        for directory, _, _ in os.walk(self.target):
            os.chmod(directory, 0o555)

    def take_away(self):
        os.rename(self.target, f"{self.target}.away")

    def cut(self):
        """Leaves `amount` bytes of a file, whose whole is kept beside it."""
        shutil.copy(self.target, f"{self.target}.whole")
        os.rename(f"{self.target}.whole", os.path.join(os.path.dirname(self.mark), "whole"))
        os.truncate(self.target, self.amount)

    def clock(self):
        """Sets the clock by `amount` seconds."""
        now, amount = time.time, self.amount
        time.time = lambda: now() + amount
        time.time_ns = lambda: int((now() + amount) * 1e9)

    def wait(self):
        """Goes on when there is a file `target`."""
        while not os.path.exists(self.target):
            time.sleep(0.05)


def install(fault):
    striker = Striker(**fault)
    if striker.kind != "line":
        sys.addaudithook(striker.audit)
        return
    original = builtins.print

    def noted(*args, **options):
        original(*args, **options)
        striker.notice("line", " ".join(map(str, args)))

    builtins.print = noted


if "VIT_JAX_FAULT" in os.environ:
    # Not in what this process starts: one fault, one process.
    install(json.loads(os.environ.pop("VIT_JAX_FAULT")))
