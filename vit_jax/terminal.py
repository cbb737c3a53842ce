"""Lines that a run shows while it goes, and a bar at the foot of a terminal."""

import os
import sys
import threading

import jax
from tqdm import tqdm

from vit_jax.printable import printable


class _Bar(tqdm):
    monitor_interval = 0  # No thread that would draw it while nothing moves.
    _lock = threading.RLock()  # Not one of processes, for which there may be another process.


def say(line: str) -> None:
    """Prints a line at once, above the bar if there is one; of several processes the first does."""
    if jax.process_index() == 0:
        with _Bar.external_write_mode(file=sys.stdout):
            print(printable(line), flush=True)


def can_draw() -> bool:
    """Tells whether stdout is a terminal that can write a line anew."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Bar:
    """A line of text at the foot of the terminal, and how much of the run is done.

    It has no color, and fits the terminal whenever it is drawn, at most ten times a second.

    Args:
        step: the steps done.
        total_steps: of the run.
    """

    def __init__(self, step: int, total_steps: int):
        self._bar = _Bar(
            initial=step,
            total=total_steps,
            file=sys.stdout,
            dynamic_ncols=True,
            miniters=1,
            desc=f"step {step}/{total_steps}",
            bar_format="{desc}  |{bar}|",
        )

    def show(self, step: int, text: str) -> None:
        """Shows a text and the steps done."""
        self._bar.set_description_str(printable(text), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is: what follows is printed below."""
        self._bar.close()
