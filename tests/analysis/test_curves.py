"""Training curves: what is read of a metrics.jsonl, and what is drawn of it."""

import json

import numpy as np
import pytest
from scipy.signal import lfilter

from vit_jax.analysis import curves, plots
from vit_jax.errors import UserError

from ..webpages import HOSTILE

STEPS = 60


def write(run, *records):
    lines = [x if isinstance(x, str) else json.dumps(x) for x in records]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def training(count=STEPS):
    """What a run of so many lines of training logs, as it is known beforehand."""
    rng = np.random.default_rng(0)
    return [
        {"step": 10 * n, "loss": 2 / n + rng.random() / 9, "grad_norm": 1.0, "learning_rate": 1 / n}
        | {"accuracy": 1 - 1 / n, "images_per_second": 900.0, "exaflops": 1e-7}
        for n in range(1, count + 1)
    ]


def drawn(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_smoothing_is_the_recursive_filter_without_its_start():
    values = np.random.default_rng(1).normal(3, 1, 40)
    weights = lfilter([1], [1, -0.8], np.ones(40))
    expected = lfilter([1], [1, -0.8], values) / weights
    np.testing.assert_allclose(curves.smooth(values, 0.8), expected, rtol=1e-12)
    np.testing.assert_array_equal(curves.smooth(values, 0), values)
    np.testing.assert_allclose(curves.smooth(np.full(9, 7.0), 0.99), 7)


def test_the_picture_draws_what_was_logged_and_says_what_is_smoothed(tmp_path):
    records = training()
    run = write(tmp_path, *records, {"step": 600, "eval_loss": 0.5, "eval_accuracy": 0.9})
    panels = curves.read_panels(run)
    constant = curves.default_smoothing(panels)
    figure = plots.curves(panels, constant)
    titles = ["loss", "accuracy", "learning rate", "grad norm"]
    assert [axes.get_title() for axes in figure.axes] == titles
    loss, accuracy, rate, _ = (drawn(axes) for axes in figure.axes)
    logged = [[record["step"], record["loss"]] for record in records]
    np.testing.assert_allclose(loss["training, as logged"], logged)
    ages = np.arange(STEPS)
    last = (0.8**ages * [y for _, y in logged[::-1]]).sum() / (0.8**ages).sum()
    mean = loss["training, exponential mean, constant 0.8"]
    np.testing.assert_allclose(mean[-1], [600, last])
    np.testing.assert_allclose(accuracy["evaluation, not smoothed"], [[600, 0.9]])
    (line,) = rate.values()
    np.testing.assert_allclose(line[:, 1], 1 / (1 + ages))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(words) == {*loss}


def test_short_curves_are_not_smoothed(tmp_path):
    panels = curves.read_panels(write(tmp_path, *training(12)))
    assert curves.default_smoothing(panels) == 0
    assert list(drawn(plots.curves(panels, 0).axes[0])) == ["training, as logged"]


def test_damaged_lines_and_values_are_left_out(tmp_path):
    good = {"step": 1, "loss": 2.0, "grad_norm": float("inf"), "accuracy": "high"}
    lines = ['{"step": 2, "lo', "[1]", '{"loss": 1.0}', "9" * 5000, '{"step": true, "loss": 1}']
    nested = "[" * 100_000
    huge = '{"step": 3, "loss": 1' + "0" * 400 + "}"
    run = write(tmp_path, good, *lines, nested, huge, {"step": 4, f"eval_{HOSTILE}": 0.5})
    panels = curves.read_panels(run)
    assert [panel.name for panel in panels] == ["loss", HOSTILE]
    np.testing.assert_array_equal(panels[0].training, [[1], [2]])
    assert panels[0].evaluation is None
    title = plots.curves(panels, 0).axes[1].get_title()
    assert "\x1b" not in title and "\n" not in title


@pytest.mark.parametrize(
    ("lines", "message"),
    [(None, "has no metrics.jsonl: give the workdir of a run"), ("", "has no metrics yet: wait")],
)
def test_a_run_without_curves_is_told_in_one_line(tmp_path, lines, message):
    if lines is not None:
        write(tmp_path, lines)
    with pytest.raises(UserError, match=message):
        curves.read_panels(tmp_path)
