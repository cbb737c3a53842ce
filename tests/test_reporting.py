import json

import jax.numpy as jnp
import pytest

from vit_jax import reporting


def step(loss=1.0, grad_norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)}


def test_a_window_gives_means_and_starts_anew():
    window = reporting.Window({})
    for i, loss in enumerate((1.0, 2.0, 6.0)):
        window.add(i, step(loss))
    assert window.mean() == {"loss": 3.0, "grad_norm": 1.0}
    window.add(3, step(5.0))
    assert window.mean() == {"loss": 5.0, "grad_norm": 1.0}


def test_a_window_goes_on_after_a_checkpoint():
    first = reporting.Window({})
    first.add(1, step(1.0))
    saved = json.loads(json.dumps(first.drain()))
    second = reporting.Window(saved)
    second.add(2, step(2.0))
    assert second.mean() == {"loss": 1.5, "grad_norm": 1.0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (step(loss=float("nan")), "loss is nan at step 7"),
        (step(grad_norm=float("inf")), "grad_norm is inf at step 7"),
    ],
)
def test_what_is_not_finite_is_found_with_its_step(bad, message):
    window = reporting.Window({})
    window.add(6, step())
    window.add(7, bad)
    window.add(8, step())
    with pytest.raises(FloatingPointError, match=message):
        window.add(9, step())


def test_evaluation_does_not_count_as_training_time(monkeypatch):
    clock = iter([0.0, 10.0, 15.0, 20.0])
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    stopwatch = reporting.Stopwatch()
    with stopwatch:
        pass
    assert stopwatch.lap() == 15.0


def test_a_stopwatch_goes_on_from_what_the_run_has_taken(monkeypatch):
    # Started at 0, lapped at 10, left out from 12 to 15, asked at 20.
    clock = iter([0.0, 10.0, 12.0, 15.0, 20.0])
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    stopwatch = reporting.Stopwatch(100.0)
    assert stopwatch.lap() == 10.0
    with stopwatch:
        pass
    assert stopwatch.total() == 117.0


def test_the_progress_line_has_all_that_is_asked_for():
    scalars = {"loss": 0.51234, "accuracy": 0.845, "images_per_second": 12345.6}
    line = reporting.progress_line(200, 1000, scalars, 192.0)
    assert line == "step 200/1000  loss 0.5123  accuracy 0.8450  12,346 images/s  ETA 3m12s"
    without = {key: scalars[key] for key in ("loss", "images_per_second")}
    line = reporting.progress_line(200, 1000, without, 192.0)
    assert line == "step 200/1000  loss 0.5123  12,346 images/s  ETA 3m12s"
    assert "MFU 41.2%" in reporting.progress_line(200, 1000, scalars | {"mfu": 0.412}, 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3725, "1h02m")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert reporting.format_seconds(seconds) == text
