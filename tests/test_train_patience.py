"""The best evaluation and patience, on their own and in runs."""

import dataclasses
import json

import numpy as np
import pytest

from vit_jax import train
from vit_jax.errors import UserError
from vit_jax.evaluation import metrics
from vit_jax.reporting import Progress, is_better

from .runs import assert_same_run, checkpoint_steps, read_metrics, train_until

EVERYTHING = {
    "augment": "medium2",
    "dataset.subset": "40%",
    "evals.val.every": "1 step",
    "patience": 2,
    "duration": "30 steps",
}


def scripted(accuracies):
    """Stands for `mean_metrics`: gives these accuracies, one after the other."""
    values = iter(accuracies)
    return lambda *_: {"examples": 355, "accuracy": next(values), "loss": 1.0}


def test_a_run_stops_when_its_patience_is_over(tiny_config, tmp_path, monkeypatch, capsys):
    config = tiny_config(**EVERYTHING)
    config.evals.fewshot.update(
        {"dataset": "digits", "data_dir": config.dataset.data_dir, "shots": "1"}
    )
    run = tmp_path / "run"
    # Equal is not better; a better one gives new patience.
    accuracies = [0.2, 0.1, 0.3, 0.3, 0.25, 0.9]
    monkeypatch.setattr(metrics, "mean_metrics", scripted(accuracies))
    final = train.train(config, run)
    assert final["stopped_early"] is True
    assert (final["step"], final["accuracy"]) == (5, 0.25)
    assert (final["best"]["step"], final["best"]["accuracy"]) == (3, 0.3)
    assert json.loads((run / "metrics.json").read_text()) == final
    assert [path.name for path in (run / "best").iterdir()] == ["3"]
    assert max(checkpoint_steps(run)) == 5
    output = capsys.readouterr().out
    assert "step 5/30  stopped: 2 evaluations without one better than that of step 3" in output
    records = read_metrics(run)
    assert max(r["step"] for r in records) == 5
    # Few-shot accuracy is measured at the end, wherever that is.
    assert [r["step"] for r in records if "fewshot/digits/1shot" in r] == [5]
    # The schedule is that of 30 steps: after two of warm-up, a cosine over 28.
    rates = [r["learning_rate"] for r in records if "learning_rate" in r]
    expected = 1e-2 * (1 + np.cos(np.pi * np.arange(3) / 28)) / 2
    np.testing.assert_allclose(rates[2:], expected, rtol=1e-4)
    assert train.train(config, run) == final
    assert "holds a finished run: nothing to do" in capsys.readouterr().out


def test_patience_goes_on_over_a_restart(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(**EVERYTHING | {"patience": 3})
    run = tmp_path / "run"
    monkeypatch.setattr(metrics, "mean_metrics", scripted([0.5, 0.4, 0.3, 0.2]))
    with pytest.raises(KeyboardInterrupt):
        train_until(config, run, step=4)
    assert max(checkpoint_steps(run)) == 2
    # Three remain after step 2, which was saved before its evaluation: that is made again.
    monkeypatch.setattr(metrics, "mean_metrics", scripted([0.4, 0.3, 0.2]))
    final = train.train(config, run)
    assert (final["step"], final["best"]["step"], final["stopped_early"]) == (4, 1, True)
    # Killed between its last checkpoint and metrics.json.
    (run / "metrics.json").unlink()
    monkeypatch.setattr(metrics, "mean_metrics", scripted([0.2]))
    assert train.train(config, run) == final


def test_the_last_evaluation_does_not_stop_a_run_early(tiny_config, tmp_path, monkeypatch, capsys):
    config = tiny_config(**EVERYTHING | {"duration": "3 steps", "schedule.warmup": "1 step"})
    monkeypatch.setattr(metrics, "mean_metrics", scripted([0.5, 0.4, 0.3]))
    final = train.train(config, tmp_path / "run")
    assert (final["step"], final["stopped_early"]) == (3, False)
    assert "stopped: " not in capsys.readouterr().out


def test_patience_needs_evaluations(tiny_config, tmp_path):
    config = tiny_config(patience=3, **{"evals.val.every": "0 steps"})
    with pytest.raises(UserError, match="patience is 3 but evals.val.every is '0 steps'"):
        train.train(config, tmp_path / "run")


def test_a_resumed_run_with_augmentation_subset_and_patience_is_bit_identical(
    tiny_config, tmp_path
):
    config = tiny_config(**EVERYTHING | {"duration": "6 steps", "patience": 4})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.train(config, whole)
    for saved in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            train_until(config, stopped, step=3)  # its third
        assert max(checkpoint_steps(stopped)) == saved
    train.train(config, stopped)
    assert_same_run(whole, stopped, 6)


def test_the_best_is_that_of_the_highest_accuracy_and_the_first_of_equal_ones():
    progress = Progress()
    found = [progress.record(step, {"accuracy": x}) for step, x in enumerate((0.2, 0.1, 0.3, 0.3))]
    assert found == [True, False, True, False]
    assert progress.best == {"step": 2, "accuracy": 0.3}
    assert progress.evaluation == {"step": 3, "accuracy": 0.3}
    assert progress.evaluations_since_best == 1


def test_without_an_accuracy_the_best_has_the_lowest_loss():
    assert is_better({"loss": 1.0}, {})
    assert is_better({"loss": 1.0}, {"loss": 2.0})
    assert not is_better({"loss": 2.0}, {"loss": 2.0})


@pytest.mark.parametrize(("patience", "expected"), [(0, False), (2, True), (3, True), (4, False)])
def test_patience_is_a_number_of_evaluations_without_a_better_one(patience, expected):
    progress = Progress(evaluations_since_best=3)
    assert progress.is_out_of_patience(patience) == expected


def test_progress_is_saved_as_it_was_before_it_was_a_class():
    saved = {"window": {"loss": 3.0, "count": 2}, "evaluation": {"step": 4, "accuracy": 0.5}}
    saved |= {"best": {"step": 2, "accuracy": 0.75}, "evaluations_since_best": 1, "seconds": 7.5}
    assert dataclasses.asdict(Progress(**saved)) == saved | {"owed": []}
    # Before patience and the clock there were the first three.
    oldest = {key: saved[key] for key in ("window", "evaluation", "best")}
    assert Progress(**oldest) == Progress(**saved | {"evaluations_since_best": 0, "seconds": 0.0})
