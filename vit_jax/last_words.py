"""Passes on what a process of several says on stderr, until JAX ends it because another is gone.

That JAX does from a thread of its own, by an abort with a stack trace. `python -m
vit_jax.last_words WORKDIR` reads it and says the same in one line.
"""

import io
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

# The lines with which the end begins, in jaxlib 0.7 (after the time) and later; what follows is
# about it as well.
_BEGINS = re.compile(
    r"^(?:[\d:. -]+: )?[EWF]\d* ?.*\b(coordination_service\w*|preemption_sync_manager|distributed/"
    r"client|client)\.(cc|h):\d+\]"
)
_FATAL = "Terminating process because the JAX distributed service detected fatal errors"
_UNHEALTHY = re.compile(r"stopped sending heartbeats\):\n((?:\S+\n)+?)The tasks have crashed")
_TASK = re.compile(r"(\d+)$", re.MULTILINE)


def pass_on(lines: Iterable[str]) -> Iterator[str]:
    """The lines up to the end, and then it in one line, without where the run goes on."""
    last: list[str] = []
    for line in lines:
        if last or _BEGINS.match(line):
            last.append(line)
        else:
            yield line
    text = "".join(last)
    if _FATAL in text:
        yield f"error: {_reason(text)}"
    else:
        yield text


def _reason(text: str) -> str:
    if tasks := _UNHEALTHY.search(text):
        numbers = sorted({int(x) for x in _TASK.findall(tasks[1])})
        some = ", ".join(map(str, numbers))
        gone = f"process {some} is" if len(numbers) == 1 else f"processes {some} are"
        return f"{gone} gone, and so the others end"
    if "leader task" in text:
        return "process 0 is gone or out of reach, and so the others end"
    status = re.search(r"absl::Status: (.*)", text)
    return f"the processes have lost each other ({status[1] if status else 'no reason is given'})"


def going_on(workdir: Path) -> str:
    """Says what is left of the run, and what to do."""
    # As `checkpoints.training.saved_steps`, which takes seconds to import.
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    if not steps:
        return f"; nothing is saved yet in {workdir}\n"
    return f"; step {max(steps)} is the last saved in {workdir}: start all again to go on from it\n"


def _until_told(lines: Iterable[str]) -> Iterator[str]:
    """The lines up to soon after the fatal one: what the process has started may outlive it."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    try:
        for line in lines:
            yield line
            if _FATAL in line:
                signal.alarm(2)
    except TimeoutError:
        return


def main() -> None:
    """Reads stdin to its end, which is that of the process and of those that it has started."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # They are for the process that is read.
    for line in pass_on(_until_told(io.TextIOWrapper(sys.stdin.buffer, errors="replace"))):
        end = going_on(Path(sys.argv[1])) if line.startswith("error:") and "\n" not in line else ""
        sys.stderr.write(line + end)
        sys.stderr.flush()


if __name__ == "__main__":
    main()
