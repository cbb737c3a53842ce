import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vit_jax import train
from vit_jax.errors import UserError
from vit_jax.interruption import full_disk, making_workdir, only_run

from .runs import assert_same_run


def progress(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(tiny_config, tmp_path, command, start, run, number):
    config = tiny_config(
        duration="60 steps",
        checkpoint_every="1000 steps",
        log_every="7 steps",
        **{"dataset.workers": 1},
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(command(config, whole))[0] == 0
    process = start(command(config, stopped), start_new_session=True)
    while progress(stopped) < 7:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    os.killpg(process.pid, number)  # As a terminal does: to the workers too.
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    # After it Python may warn of the shared memory of a worker that the signal has ended.
    assert any(x.startswith(f"{number.name}: saved step ") for x in output.splitlines()), output
    assert "Traceback" not in output
    assert run(command(config, stopped))[0] == 0
    assert_same_run(whole, stopped, 60)


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_before_the_first_step_a_signal_ends_the_run_in_a_line(
    tiny_config, tmp_path, monkeypatch, capsys, number, end
):
    monkeypatch.setattr(train, "compile_train_step", lambda *_: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(end):
        train.train(tiny_config(), tmp_path / "run")
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"{number.name}: stopped before the next step: nothing is lost"
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run/.lock").exists()


def test_of_two_runs_in_a_workdir_the_second_is_refused(tiny_config, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with only_run(workdir):
        with pytest.raises(UserError, match=f"{workdir} is taken by .* process {os.getpid()} on"):
            train.train(tiny_config(), workdir)
        assert [path.name for path in workdir.iterdir()] == [".lock"]
    assert not list(workdir.iterdir())
    with only_run(workdir):
        pass


HOLD = """
import pathlib, sys, time
from vit_jax.interruption import only_run
with only_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_keeps_nobody_out(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"), only_run(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with only_run(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_its_holder_has_just_removed_is_taken_again(tmp_path, monkeypatch):
    original, calls = fcntl.flock, []

    def flock(file, operation):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(file)
        original(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="is taken by"), only_run(tmp_path):
            pass


def test_where_there_are_no_locks_runs_go_on(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run(tmp_path):
        pass


def test_starts_at_the_same_time_do_not_take_the_workdir_for_unwritable(tmp_path):
    def make(_):
        for _ in range(200):
            with making_workdir(tmp_path):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))


def test_a_workdir_that_cannot_be_written_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run is not writable .*choose another --workdir"):
        train.train(tiny_config(), tmp_path / "file/run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_a_users_error_with_the_way_out(tmp_path, number):
    with pytest.raises(UserError, match="cannot be written: .*; free space and run the same"):  # noqa: SIM117
        with full_disk(tmp_path):
            raise OSError(number, "full")


def test_other_errors_of_the_system_are_no_full_disk(tmp_path):
    with pytest.raises(OSError, match="gone"), full_disk(tmp_path):
        raise OSError(errno.EIO, "gone")
