"""Images, the data set, the clock and the loss go wrong under a run."""

import numpy as np
import pytest

from vit_jax.checkpoints.training import saved_steps

from . import harness
from .harness import Fault, some


def strike_at(step, do, target="", amount=0):
    return Fault("line", rf"^step {step}/\d+  loss", 1, do, str(target), amount)


@pytest.mark.parametrize(("split", "evaluation"), some([("test", 12), ("watched", 8)]))
def test_an_image_that_breaks_before_an_evaluation_costs_no_step(
    split, evaluation, images, chance, train, finishes, row, tmp_path
):
    folder = images / "watched/test" if split == "watched" else images / "data/test"
    image = chance.choice(sorted(folder.rglob("*.png")))
    outcome = train(strike_at(evaluation - 4, "cut", image, 60)).end()
    (tmp_path / "whole").rename(image)
    line = harness.assert_refused(outcome)
    assert str(image) in line
    assert saved_steps(tmp_path / "run/checkpoints")[0] == evaluation
    finishes()
    row(f"image of {split} cut", f"evaluation at {evaluation}", "one line, then bit-identical")


@pytest.mark.parametrize("number", some(range(3)))
def test_an_image_that_breaks_in_training_costs_no_step(
    number, images, chance, train, finishes, row, tmp_path
):
    del number  # The draws differ.
    image = chance.choice(sorted((images / "data/train").rglob("*.png")))
    step = 2 * chance.randint(1, 6)
    outcome = train(strike_at(step, "cut", image, 60)).end()
    (tmp_path / "whole").rename(image)
    line = harness.assert_refused(outcome)
    assert str(image) in line
    assert saved_steps(tmp_path / "run/checkpoints")[0] >= step
    finishes()
    row("image of train cut", f"step {step}", "one line, then bit-identical")


def test_a_data_set_that_vanishes_is_told_in_a_line(images, chance, train, finishes, row, tmp_path):
    step = 2 * chance.randint(1, 6)
    away = images / "data.away"
    try:
        outcome = train(strike_at(step, "take_away", images / "data")).end()
        lines = [harness.assert_refused(outcome)]
        lines.append(harness.assert_refused(train().end()))
    finally:
        away.rename(images / "data")
    assert all(str(images / "data") in line for line in lines)
    assert saved_steps(tmp_path / "run/checkpoints")[0] >= step
    finishes()
    row("data set removed", f"step {step}, and at the start", "one line each, then bit-identical")


@pytest.mark.parametrize("seconds", some([-10 * 365 * 86_400, 10 * 365 * 86_400]))
def test_the_clock_may_be_set(seconds, chance, train, finishes, row):
    step = 2 * chance.randint(1, 6)
    outcome = train(strike_at(step, "clock", amount=seconds)).end()
    told = "no notice"
    if outcome.code:  # Orbax, in the middle of a save, takes it for the time that this has taken.
        told = f"“{harness.assert_refused(outcome)}”"
    finishes()
    row(f"clock set by {seconds // 86_400:+,} days", f"step {step}", f"{told}, bit-identical")


def test_a_loss_that_is_not_finite_ends_in_a_line_and_is_not_saved(train, row, tmp_path):
    # Weights become 10^12 times larger in every step.
    outcome = train(**{"schedule.base_lr": 1e6, "optimizer.weight_decay": 1e6}).end()
    line = harness.assert_refused(outcome)
    assert "is nan at step" in line or "is inf at step" in line
    for step in saved_steps(tmp_path / "run/checkpoints"):
        for name, value in harness.read_arrays(tmp_path / "run", step).items():
            assert np.isfinite(value.astype(np.float64)).all(), (step, name)
    row("loss not finite", "first steps", f"“{line}”")
