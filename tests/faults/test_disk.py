"""A disk that takes no more, must not be written, or is gone."""

import os
import shutil

import pytest

from . import harness
from .harness import LONG, Fault, some

MOMENTS = {
    "config.json is written": Fault("write", r"\.config\.json\."),
    "event file is opened": Fault("write", r"/events\.out"),
    "step 2 is logged": Fault("line", r"^compiling"),
    "save of 4 begins": Fault("mkdir", r"checkpoints/4\.\S*tmp"),
    "save of 8 gets its name": Fault("rename", r"checkpoints/8$"),
    "best/6 begins": Fault("mkdir", r"best/6\.\S*tmp"),
    "step 22 is logged": Fault("line", r"^step 20/\d+  loss"),
    "last save begins": Fault("mkdir", rf"checkpoints/{harness.STEPS}\.\S*tmp"),
    "metrics.json is written": Fault("write", r"\.metrics\.json\."),
}


@pytest.mark.parametrize("moment", some(MOMENTS))
@pytest.mark.parametrize("how", ["EFBIG", "ENOSPC"] if LONG else ["EFBIG"])
def test_a_full_disk_is_told_in_a_line_and_costs_nothing(
    how, moment, disk, train, finishes, reference, row, tmp_path
):
    if how == "ENOSPC" and disk is None:
        pytest.skip("a disk of its own can be mounted by root only")
    workdir = (disk if how == "ENOSPC" else tmp_path) / "run"
    strike = ("fill", str(disk / "ballast")) if how == "ENOSPC" else ("limit", "")
    outcome = train(MOMENTS[moment]._replace(do=strike[0], target=strike[1]), workdir).end()
    assert outcome.struck, outcome.text
    line = harness.assert_refused(outcome)
    harness.assert_nothing_half_written(workdir, reference)
    if how == "ENOSPC":
        (disk / "ballast").unlink()
    finishes(workdir)
    row(f"disk full ({how})", moment, f"“{line}”, then bit-identical")


AT_STEP_10 = Fault("line", r"^step 10/\d+  loss")


@pytest.mark.parametrize("moment", some(["start", "step 10"]))
def test_a_workdir_that_becomes_read_only(moment, train, finishes, reference, row, tmp_path):
    workdir = tmp_path / "run"
    fault = None
    if moment == "start":
        workdir.mkdir(mode=0o555)
    else:
        fault = AT_STEP_10._replace(do="read_only", target=str(workdir))
    outcome = train(fault).end()
    line = harness.assert_refused(outcome)
    for directory, _, _ in os.walk(workdir):
        os.chmod(directory, 0o755)
    harness.assert_nothing_half_written(workdir, reference)
    finishes()
    row("read-only workdir", moment, f"“{line}”, then bit-identical")


@pytest.mark.parametrize("name", some(["", "checkpoints"]))
def test_a_workdir_that_vanishes(name, train, finishes, row, tmp_path):
    target = tmp_path / "run" / name
    outcome = train(AT_STEP_10._replace(do="take_away", target=str(target))).end()
    line = harness.assert_refused(outcome)
    away = target.with_name(target.name + ".away")
    shutil.rmtree(target, ignore_errors=True)
    away.rename(target)
    finishes()
    row(f"{name or 'workdir'} vanishes", "step 10", f"“{line}”, then bit-identical")
