"""A run that is made longer is the run that was so long from the start, or is refused."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from vit_jax import longer, train
from vit_jax.errors import UserError

from .runs import read_arrays, read_metrics, train_until

RSQRT = {"schedule.decay": "rsqrt", "schedule.timescale": "3 steps"}
CONSTANT = {"schedule.decay": "linear", "schedule.end_lr": 1e-2}
STAIRCASE = {"schedule.decay": "staircase", "schedule.drops": (0.999,)}


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(RSQRT, id="rsqrt"),
        pytest.param(STAIRCASE, id="staircase before its first drop", marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_goes_on_as_if_it_had_been_longer_from_the_start(
    schedule, tiny_config, tmp_path, capsys
):
    # An end that is a multiple of all intervals leaves no line that the whole run has not.
    common = {"checkpoint_every": "4 steps", **schedule}
    train.train(tiny_config(duration="8 steps", **common), tmp_path / "whole")
    train.train(tiny_config(duration="4 steps", **common), tmp_path / "grown")
    assert json.loads((tmp_path / "grown/metrics.json").read_text())["step"] == 4
    capsys.readouterr()
    final = train.train(tiny_config(duration="8 steps", **common), tmp_path / "grown")
    assert "is made longer, from 4 to 8 steps" in capsys.readouterr().out
    assert final["step"] == 8
    whole, grown = (read_arrays(tmp_path / name, 8) for name in ("whole", "grown"))
    assert whole.keys() == grown.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, grown[name], err_msg=name)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "grown")
    for name in ("metrics.json", "config.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "grown" / name).read_text()


@pytest.fixture
def copy(finished, tmp_path):
    """The run that other tests look at, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "copy")


def hashes(run):
    """Of every file, by its path."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def after_six_steps(tiny_config, finished):
    """Tells whether a run of another schedule, that has done its six steps, may have 60."""

    def is_longer(**schedule):
        prepared = SimpleNamespace(
            config=tiny_config(duration="60 steps", **schedule),
            workdir=finished,
            total_steps=60,
            train_source=SimpleNamespace(num_examples=1442),
        )
        return longer.is_longer(prepared, "6 steps", {})

    return is_longer


@pytest.mark.parametrize(
    "schedule", [CONSTANT, STAIRCASE], ids=["constant", "staircase before its first drop"]
)
def test_where_the_rates_would_have_been_the_same_a_run_is_made_longer(schedule, after_six_steps):
    assert after_six_steps(**schedule)


TOO_LATE = {
    # 6 steps, of which 2 are the warm-up; the rate of step 2 is base_lr in any run.
    "cosine": ({"schedule.decay": "cosine"}, 3),
    "linear": ({"schedule.decay": "linear"}, 3),
    "cool-down": ({**RSQRT, "schedule.cooldown": "2 steps"}, 5),
    "staircase": ({"schedule.decay": "staircase", "schedule.drops": (0.5,)}, 4),
}


@pytest.mark.parametrize(("schedule", "step"), TOO_LATE.values(), ids=TOO_LATE)
def test_a_run_whose_past_would_have_been_another_is_refused(schedule, step, after_six_steps):
    with pytest.raises(
        UserError, match=rf"another after step {step};.*--config.init_from="
    ) as error:
        after_six_steps(**schedule)
    assert "is at step 6 of 6" in str(error.value)


def test_a_run_that_cannot_be_made_longer_is_left_as_it_is(tiny_config, copy):
    before = hashes(copy)
    assert any("checkpoints" in name for name in before)
    with pytest.raises(UserError, match="is at step 6 of 6: .* another after step 3;"):
        train.train(tiny_config(duration="60 steps"), copy)
    assert hashes(copy) == before


def test_a_run_that_patience_ended_is_not_made_longer(tiny_config, tmp_path):
    options = {"patience": 1, "evals.val.every": "1 step", "schedule.base_lr": 1e-30, **RSQRT}
    run = tmp_path / "run"
    assert train.train(tiny_config(duration="8 steps", **options), run)["stopped_early"]
    before = (run / "metrics.json").read_text()
    with pytest.raises(UserError, match="was ended by patience 1, not by its duration"):
        train.train(tiny_config(duration="16 steps", **options), run)
    assert (run / "metrics.json").read_text() == before


def test_in_its_warm_up_a_run_of_any_schedule_may_be_made_longer(tiny_config, tmp_path, finished):
    with pytest.raises(KeyboardInterrupt):
        train_until(tiny_config(duration="4 steps"), tmp_path / "run", step=3)
    train.train(tiny_config(), tmp_path / "run")
    expected, found = read_arrays(finished, 6), read_arrays(tmp_path / "run", 6)
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)


def test_a_run_is_not_made_shorter(tiny_config, copy):
    with pytest.raises(UserError, match="a run of 6 steps, and duration '5 steps' is 5"):
        train.train(tiny_config(duration="5 steps"), copy)
    assert (copy / "metrics.json").exists()


def test_the_same_duration_in_other_words_is_the_same_run(tiny_config, copy, capsys):
    train.train(tiny_config(duration="6"), copy)
    assert "holds a finished run: nothing to do" in capsys.readouterr().out
