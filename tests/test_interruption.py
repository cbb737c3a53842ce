import errno
import json
import signal
import time

import pytest

from vit_jax import train
from vit_jax.errors import UserError
from vit_jax.interruption import full_disk

from .runs import assert_same_run


def progress(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tiny_config, tmp_path, command, start, run):
    config = tiny_config(duration="60 steps", checkpoint_every="1000 steps", log_every="7 steps")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(command(config, whole))[0] == 0
    process = start(command(config, stopped))
    while progress(stopped) < 7:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saved step" in output
    assert "Traceback" not in output
    assert run(command(config, stopped))[0] == 0
    assert_same_run(whole, stopped, 60)


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
