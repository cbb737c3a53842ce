"""Two runs in one workdir, and two processes of one run of which one ends."""

import socket
import time

import pytest

from . import harness
from .harness import LONG, Fault

WAITS_AT_6 = Fault("line", r"^step 6/\d+  loss", do="wait")


def test_the_second_run_in_a_workdir_is_refused(train, reference, row, tmp_path):
    first = train(WAITS_AT_6._replace(target=str(tmp_path / "go")))
    first.wait_until_struck()
    second = tmp_path / "second"
    second.mkdir()
    line = harness.assert_refused(train(scratch=second).end())
    assert str(tmp_path / "run") in line
    (tmp_path / "go").touch()
    outcome = first.end()
    assert outcome.code == 0, outcome.text
    harness.assert_finished_alike(tmp_path / "run", reference)
    row("two runs in a workdir", "step 6 of the first", f"“{line}”, the first bit-identical")


def two(train, tmp_path, victim=None, fault=None, workdir=None):
    """Starts both processes of a run; returns them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = ("--coordinator", address, "--num_processes", "2", "--process_id")
    started = []
    for index in range(2):
        scratch = tmp_path / f"process-{index}"
        scratch.mkdir(exist_ok=True)
        struck = fault if index == victim else None
        started.append(train(struck, workdir, (*flags, str(index)), scratch))
    return started


@pytest.mark.skipif(not LONG, reason="test_processes.py kills one in the short schedule")
@pytest.mark.parametrize("name", ["KILL", "TERM"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_of_two_ends_and_both_go_on_to_the_same_bits(
    name, victim, train, row, tmp_path
):
    whole = tmp_path / "whole"
    for outcome in [process.end() for process in two(train, tmp_path, workdir=whole)]:
        assert outcome.code == 0, outcome.text
    moment = Fault("write", rf"checkpoints/12\.\S*tmp/.*process_{victim}", target=name)
    both = two(train, tmp_path, victim, moment)
    both[victim].wait_until_struck()
    start = time.monotonic()
    outcomes = [process.end(90) for process in both]
    seconds = time.monotonic() - start
    assert seconds < 70
    other = outcomes[1 - victim]
    assert "Traceback" not in other.text, other.text
    if name == "KILL":
        assert other.code != 0
        (line,) = other.stderr.splitlines()
        assert f"process {victim} is gone" in line and "is the last saved" in line
    else:
        assert [outcome.code for outcome in outcomes] == [143, 143], other.text
        assert "saved step" in outcomes[0].stdout
    for outcome in [process.end() for process in two(train, tmp_path)]:
        assert outcome.code == 0, outcome.text
    harness.assert_same_run(whole, tmp_path / "run", harness.STEPS)
    told = "one line" if name == "KILL" else "both saved and ended"
    row(
        f"process {victim} of two: {name}",
        "save of 12",
        f"{told} in {seconds:.0f} s, bit-identical",
    )
