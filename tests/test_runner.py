import fcntl
import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from vit_jax import runner
from vit_jax.errors import UserError
from vit_jax.runner import Run


@pytest.fixture
def runs(tiny_config):
    def make(**rates):
        return [
            Run(name, tiny_config(**{"schedule.base_lr": rate})) for name, rate in rates.items()
        ]

    return make


def test_results_are_those_of_metrics_json(runs, stand_in, tmp_path, read_metrics, capsys):
    found = runner.run_all(runs(a=0.01, b=0.02), tmp_path)
    assert found == {name: read_metrics(tmp_path / name) for name in "ab"}
    assert found["b"]["accuracy"] == pytest.approx(0.7)
    assert stand_in(tmp_path) == ["a", "b"]
    assert "[2/2] b: accuracy 0.7000" in capsys.readouterr().out
    assert (tmp_path / "a.log").read_text() == "a line\n"


def test_what_is_finished_is_not_run_again(runs, stand_in, tmp_path):
    first = runner.run_all(runs(a=0.01), tmp_path)
    stand_in(tmp_path)
    again = runner.run_all(runs(a=0.01, b=0.02), tmp_path)
    assert stand_in(tmp_path) == ["b"]
    assert again["a"] == first["a"]


def test_a_finished_run_of_another_config_is_left_to_training_to_judge(runs, stand_in, tmp_path):
    runner.run_all(runs(a=0.01), tmp_path)
    stand_in(tmp_path)
    runner.run_all(runs(a=0.02), tmp_path)
    assert stand_in(tmp_path) == ["a"]


def test_a_failing_run_is_one_line_and_loses_no_other(runs, stand_in, tmp_path, capsys):
    found = runner.run_all(runs(a=0.5, b=0.6, c=0.01), tmp_path)
    assert (found["a"], found["b"]) == (None, None)
    assert found["c"]["accuracy"] == pytest.approx(0.8)
    failed = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert failed[0] == "[1/3] a: failed: the loss is not finite: stopped"
    assert failed[1].startswith("[2/3] b: failed: killed by SIGKILL, see ")
    assert len(failed) == 2
    stand_in(tmp_path)
    runner.run_all(runs(a=0.5, b=0.6, c=0.01), tmp_path)
    assert stand_in(tmp_path) == ["a", "b"]


@pytest.mark.usefixtures("stand_in")
def test_a_wrong_config_stops_everything_before_the_first_run(runs, tmp_path):
    bad = runs(b=0.01)[0]
    bad.config.dataset.batch = 3
    with pytest.raises(UserError, match="batch"):
        runner.run_all([*runs(a=0.01), bad], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.usefixtures("stand_in")
def test_an_unwritable_workdir_is_one_line(runs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --workdir"):
        runner.run_all(runs(a=0.01), tmp_path / "file" / "sweep")


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_lets_the_run_save_and_goes_no_further(runs, stand_in, tmp_path, number, end):
    def terminate():
        deadline = time.monotonic() + 30
        while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(end) as caught:
        runner.run_all(runs(a=0.7, b=0.01), tmp_path)
    thread.join()
    assert getattr(caught.value, "code", 143) == 143
    assert (tmp_path / "saved").exists()
    assert stand_in(tmp_path) == ["a"]
    assert signal.getsignal(number) == before


def test_a_run_that_another_process_has_is_not_started_twice(runs, stand_in, tmp_path, capsys):
    with (tmp_path / "a.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert runner.run_all(runs(a=0.01), tmp_path) == {"a": None}
    assert "another process still runs it" in capsys.readouterr().out
    assert stand_in(tmp_path) == []


@pytest.mark.usefixtures("stand_in")
def test_a_damaged_metrics_json_is_a_failed_run(runs, tmp_path):
    runner.run_all(runs(a=0.01), tmp_path)
    (tmp_path / "a" / "metrics.json").write_text("{")
    assert runner.run_all(runs(a=0.01), tmp_path) == {"a": None}


def test_mean_and_sd_are_those_of_numpy():
    values = [0.9123, 0.9088, 0.9301]
    expected = np.mean(values), np.std(values, ddof=1)
    assert runner.mean_and_sd(values) == pytest.approx(expected)
    assert runner.mean_and_sd([0.5]) == (0.5, None)


def test_percentages_and_tables():
    assert runner.percent(0.99154, 0.000349) == "99.15 ± 0.03"
    assert runner.percent(0.5) == "50.00"
    text = runner.markdown(["a", "b"], [["x", "1"], ["y", ""]])
    assert text == "| a | b |\n| - | -: |\n| x | 1 |\n| y |  |"


@pytest.mark.usefixtures("stand_in")
def test_the_config_of_a_run_is_written_for_it(runs, tmp_path):
    (run,) = runs(a=0.03)
    runner.run_all([run], tmp_path)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(run.config.to_json())
