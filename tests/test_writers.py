import functools
import json
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_jax import writers


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint_and_what_is_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    no_lines = '5\n[]\n{"a": 1}\n'
    cut_off = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo'
    path.write_text(no_lines + cut_off)
    writer = writers.JsonlWriter(path, last_step=1)
    writer.write_scalars(2, {"loss": 2.5})
    writer.close()
    assert lines(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


@pytest.mark.parametrize(("owes", "kept"), [(False, [1, 2, 2]), (True, [1, 2])])
def test_a_run_that_evaluates_again_drops_what_the_evaluation_wrote(tmp_path, owes, kept):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonlWriter(path, last_step=0)
    writer.write_scalars(1, {"eval_accuracy": 0.5})
    writer.write_scalars(2, {"loss": 2.0, "learning_rate": 0.1})
    writer.write_scalars(2, {"eval_accuracy": 0.6})
    writer.close()
    writers.JsonlWriter(path, last_step=2, owes_evaluation=owes).close()
    assert [line["step"] for line in lines(path)] == kept


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = writers.JsonlWriter(tmp_path / "metrics.jsonl", last_step=0)
    writer.write_scalars(1, {"loss": 0.1})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}]


def test_tensorboard_reads_the_scalars(tmp_path):
    writer = writers.EventWriter(tmp_path, 1)
    for step in (1, 10**6):
        writer.write_scalars(step, {"loss": 0.1 * step, "accuracy": step / 4})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "accuracy"}
    assert [(x.step, x.value) for x in events.Scalars("accuracy")] == [(1, 0.25), (10**6, 250_000)]
    assert events.Scalars("loss")[0].value == pytest.approx(0.1)
    assert abs(events.Scalars("loss")[0].wall_time - time.time()) < 600


def read_events(directory):
    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize(("first_step", "kept"), [(3, [1, 2]), (2, [1])])
def test_what_a_resumed_run_writes_again_is_in_tensorboard_once(
    tmp_path, first_step, kept, monkeypatch
):
    for first, steps in ((1, range(1, 5)), (first_step, range(first_step, 6))):
        # TensorBoard reads files in the order of their names, which have the second.
        monkeypatch.setattr(writers.time, "time", functools.partial(float, first))
        writer = writers.EventWriter(tmp_path, first)
        for step in steps:
            writer.write_scalars(step, {"train/loss": float(step)})
        writer.close()
    assert len(list(tmp_path.iterdir())) == 2
    expected = [(step, float(step)) for step in [*kept, *range(first_step, 6)]]
    assert read_events(tmp_path) == {"train/loss": expected}


@pytest.mark.parametrize(
    ("scalars", "expected"),
    [
        ({"loss": 1, "learning_rate": 2}, {"train/loss": 1, "train/learning_rate": 2}),
        ({"eval_accuracy": 1, "eval_loss": 2}, {"eval/accuracy": 1, "eval/loss": 2}),
        ({"fewshot/cifar100/10shot": 1}, {"eval/fewshot/cifar100/10shot": 1}),
        # An evaluator that is called train, of images of the training split.
        ({"train/loss": 1}, {"eval/train/loss": 1}),
    ],
)
def test_a_tag_says_whether_it_is_of_training_or_of_an_evaluator(scalars, expected):
    assert writers.tags(scalars) == expected
