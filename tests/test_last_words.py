"""What a process of several says when another has gone; the lines are those of jaxlib itself."""

import subprocess
import sys

import pytest

from vit_jax.last_words import pass_on

_TRACE = """*** Check failure stack trace: ***
    @     0x7ffb5f8f8174  absl::lts_20260526::log_internal::LogMessage::SendToLog()
"""
_DIED = "Terminating process because the JAX distributed service detected fatal errors. This most "
_DIED += "likely indicates that another task died; see the other task logs for more details. "
_UNHEALTHY = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
_CRASHED = "The tasks have crashed. Check the task logs for an earlier error, or scheduler events\n"
_LEADER = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was "
_LEADER += "preempted/died/restarted unexpectedly or this task is experiencing network issues.\n"

ENDS = {
    "0.12, a worker": (
        "E1126 16:21:50.414060   18908 coordination_service.cc:1518] [159] Use error polling to "
        f"propagate the following error to all tasks: {_UNHEALTHY}1\n{_CRASHED}\n"
        "F1126 16:21:50.414742   18919 client.h:86] "
        f"{_DIED}absl::Status: {_UNHEALTHY}1\n{_CRASHED}{_TRACE}",
        "process 1 is gone, and so the others end",
    ),
    "0.12, the leader": (
        "W1126 16:21:40.922023   18963 preemption_sync_manager.cc:147] Failed to retrieve "
        "preemption notice from coordination service: UNAVAILABLE: Stream removed\n"
        f"F1126 16:21:40.922142   18963 client.h:86] {_DIED}absl::Status: {_LEADER}{_TRACE}",
        "process 0 is gone or out of reach, and so the others end",
    ),
    "0.7, two workers": (
        "2026-11-26 16:21:48.462095: F external/xla/xla/pjrt/distributed/client.h:75] "
        f"{_DIED}absl::Status: {_UNHEALTHY}/job:jax_worker/replica:0/task:3\n"
        f"/job:jax_worker/replica:0/task:12\n{_CRASHED}",
        "processes 3, 12 are gone, and so the others end",
    ),
    "another reason": (
        f"F1126 16:21:40.922142   18963 client.h:86] {_DIED}absl::Status: LATE: too late\n",
        "the processes have lost each other (LATE: too late)",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_is_one_line_that_names_who_is_gone(name):
    text, reason = ENDS[name]
    lines = ["a warning\n", "another\n", *text.splitlines(keepends=True)]
    assert list(pass_on(lines)) == [*lines[:2], f"error: {reason}"]


def test_what_is_no_end_is_passed_on_whole():
    lines = ["W1126 16:21:40 1 preemption_sync_manager.cc:147] Failed\n", "error: no such file\n"]
    assert "".join(pass_on(lines)) == "".join(lines)


@pytest.mark.parametrize(
    ("steps", "end"),
    [((), "; nothing is saved yet in {}"), ((4, 12), "; step 12 is the last saved in {}: start")],
)
def test_it_says_what_is_saved(tmp_path, steps, end):
    for step in steps:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    text, reason = ENDS["0.12, a worker"]
    command = [sys.executable, "-m", "vit_jax.last_words", str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as reader:
        reader.stdin.write(text)
        reader.stdin.flush()  # Left open, as by a process that outlives the one that is read.
        said = reader.stderr.read()
    assert reader.returncode == 0
    assert said.startswith(f"error: {reason}{end.format(tmp_path)}")
    assert said.count("\n") == 1
