"""How several processes find each other, and what they do when one has gone."""

import json
import os
import signal
import socket
import time

import pytest

from vit_jax import processes
from vit_jax.errors import UserError

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-4]"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({**SLURM, "SLURM_JOB_ID": "7"}, "Slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # an allocation without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of a job
    ],
)
def test_a_launcher_is_one_that_has_started_several(environment, name):
    assert processes.launcher(environment) == name


@pytest.mark.parametrize(
    "flags", [(None, None, None), ("a:1", 2, 1), ("auto", None, None), (None, 1, None)]
)
def test_whole_flags_pass(flags):
    processes.check_flags(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), "go together: give all three, or none under Slurm"),
        ((None, 2, 0), "go together"),
        (("auto", 2, None), "--coordinator auto finds the number"),
        (("a", 2, 0), "--coordinator 'a' has no port"),
        (("a:1", 2, 2), "--process_id 2 is not from 0 to 1, the last of --num_processes 2"),
    ],
)
def test_half_given_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        processes.check_flags(*flags)


def test_one_process_joins_nothing_whatever_started_it(monkeypatch):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: pytest.fail("it joined"))
    processes.join(None, 1, None, "")


def test_under_a_launcher_jax_finds_the_others(monkeypatch):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *x, **options: calls.append(x))
    monkeypatch.setattr(processes, "_tell_why_it_ends", lambda workdir: None)
    processes.join(None, None, None, "")
    assert calls == [()]
    processes.join("a:1", 2, 1, "")
    assert calls[1:] == [("a:1", 2, 1)]


def test_kubernetes_needs_its_package(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[k8s\]', or give --coordinator"):
        processes.join(None, None, None, "")


@pytest.fixture
def two(tiny_config, tmp_path, command, start):
    """The workdir, the two processes of a run that has saved a step, and their logs."""
    config = tiny_config(duration="100000 steps", checkpoint_every="3 steps", log_every="2 steps")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = ("--coordinator", address, "--num_processes", "2", "--process_id")
    workdir, logs = tmp_path / "run", [tmp_path / f"{i}.log" for i in range(2)]
    both = [
        start(command(config, workdir, *flags, str(i)), stdout=log.open("w"))
        for i, log in enumerate(logs)
    ]
    deadline = time.monotonic() + 200
    while not any(x.name.isdecimal() for x in (workdir / "checkpoints").glob("*")):
        assert [p.poll() for p in both] == [None, None], [log.read_text() for log in logs]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return workdir, both, logs


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_within_a_minute(two, victim):
    workdir, both, logs = two
    os.kill(both[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert both[1 - victim].wait(90) != 0
    assert time.monotonic() - killed < 60
    time.sleep(2)  # Its last words come from another process.
    text = logs[1 - victim].read_text()
    *_, end = text.splitlines()
    assert end.startswith(f"error: process {victim} is gone"), text
    assert f"is the last saved in {workdir}" in end
    assert text.count("error:") == 1 and "Traceback" not in text
    assert json.loads((workdir / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_and_ends_both(two, number):
    workdir, both, logs = two
    both[1].send_signal(number)
    codes = [process.wait(60) for process in both]
    texts = [log.read_text() for log in logs]
    assert codes == [128 + signal.SIGTERM, 128 + number], texts
    *_, end = texts[0].splitlines()
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    assert end == f"SIGTERM: saved step {saved}; the same command continues from there"
    assert not any("Traceback" in text or "error:" in text for text in texts)
    assert not (workdir / ".lock").exists()
