import dataclasses
import json
import math

import numpy as np
import pytest

from experiments.runner import scales
from experiments.runner.experiment import Experiment, Measurement, Run, Task
from experiments.runner.outcomes import Outcomes, request
from experiments.runner.results import Reader
from experiments.runner.setting import Setting
from vit_jax.config import complete_evals, to_dict
from vit_jax.files import write_json

SETTING = Setting(scale=scales.SMOKE, seeds=3)
EXPERIMENT = Experiment("table0", "Table 0", lambda setting: [], rows=("task",))


@pytest.fixture
def outcomes(tmp_path):
    return Outcomes(tmp_path)


@pytest.fixture
def make(tiny_config, outcomes):
    """A run, finished with the lines of metrics.jsonl if any are given."""

    def make_run(name, *lines, best=0, **changes):
        run = Run(name, complete_evals(tiny_config(**changes)))
        if lines:
            folder = outcomes.workdir(run)
            folder.mkdir()
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
            write_json(folder / "config.json", to_dict(run.config))
            write_json(folder / "metrics.json", {"accuracy": 0.5, "best": {"step": best}})
        return run

    return make_run


@pytest.fixture
def read(outcomes):
    def read_results(*measurements):
        return Reader(outcomes).results(EXPERIMENT, SETTING, measurements)

    return read_results


def line(step, accuracy, **more):
    return {"step": step, "eval_accuracy": accuracy, **more}


def test_the_last_value_counts_or_that_of_the_best_step(make, read):
    run = make("a", line(2, 0.7), line(4, 0.9), line(6, 0.8), best=4)
    last, best = (Measurement({}, [run], at_best=x) for x in (False, True))
    assert [x.values for x in read(last, best).found] == [(0.8,), (0.9,)]


def test_mean_and_sd_are_numpys_over_the_seeds_that_there_are(make, read):
    values = [0.91, 0.94, 0.85]
    runs = [make(f"seed{i}", line(1, x)) for i, x in enumerate(values)]
    missing = make("seed3")
    (result,) = read(Measurement({}, [*runs, missing])).found
    assert result.values == (*values, None)
    assert result.mean == pytest.approx(np.mean(values))
    assert result.sd == pytest.approx(np.std(values, ddof=1))
    assert result.problems == ("seed3 has not run",)
    (single,) = read(Measurement({}, runs[:1])).found
    assert (single.mean, single.sd) == (pytest.approx(0.91), None)
    (none,) = read(Measurement({}, [missing])).found
    assert (none.mean, none.sd) == (None, None)


@pytest.mark.parametrize(
    ("lines", "metric", "text"),
    [
        (
            [line(1, 0.5)],
            "real/accuracy",
            "no metric 'real/accuracy': did you mean 'eval_accuracy'?",
        ),
        ([line(1, 0.5, loss=1.0)], "fewshot", "no metric 'fewshot': it has eval_accuracy, loss"),
        ([line(1, math.nan)], "eval_accuracy", "no number 'eval_accuracy'"),
        ([line(1, None)], "eval_accuracy", "no number 'eval_accuracy'"),
        ([["not", "a record"]], "eval_accuracy", "cannot be read"),
    ],
)
def test_a_number_that_is_not_there_is_a_problem_of_its_run(make, read, lines, metric, text):
    results = read(Measurement({}, [make("a", *lines)], metric), Measurement({}, [make("b")]))
    assert results.found[0].values == (None,)
    assert len(results.problems) == 2
    assert results.problems[0].startswith("a: failed: " if "no " in text else "a: ")
    assert text in results.problems[0]


def test_a_failed_run_has_its_reason(make, read, outcomes):
    run = make("a")
    outcomes.fail(run, "killed by SIGKILL")
    assert read(Measurement({}, [run])).problems == ["a failed: killed by SIGKILL"]


def test_a_task_has_its_scalars_and_folder(make, read, outcomes):
    of = make("run", line(1, 0.5))
    task = Task("speed", "module:function", {"model": "ViT-B/16"}, (of,))
    outcomes.workdir(task).mkdir()
    write_json(outcomes.workdir(task) / "task.json", request(task) | {"seconds": 1.5})
    write_json(outcomes.workdir(task) / "metrics.json", {"images_per_second": 88.0})
    results = read(Measurement({}, [task], "images_per_second"))
    assert results.found[0].values == (88.0,)
    assert results.folders == {x.name: outcomes.folder / x.name for x in (task, of)}
    other = dataclasses.replace(task, arguments={"model": "ViT-L/16"})
    assert read(Measurement({}, [other], "images_per_second")).found[0].values == (None,)


def test_results_are_chosen_by_their_labels(make, read):
    run = make("a", line(1, 0.5))
    labels = [{"task": t, "model": m} for t in ("pets", "cifar10") for m in ("B", "L")]
    results = read(*(Measurement(x, [run]) for x in labels))
    assert [x.measurement.labels for x in results.where(task="cifar10").found] == labels[2:]
    assert list(results.groups("task")) == ["pets", "cifar10"]
    assert [x.measurement.labels for x in results.groups("model")["L"].found] == labels[1::2]
    assert results.where(task="dtd").found == ()


def test_results_jsonl_has_a_record_for_each_measurement_and_seed(make, outcomes, tmp_path):
    costs = {"device_days": 2 / 86400}
    runs = [make(f"seed{i}", line(6, 0.5, **costs), seed=i) for i in (3, 4)]
    measurements = [Measurement({"task": "pets"}, [*runs, make("none", seed=5)], paper=93.4)]
    reader = Reader(outcomes)
    experiment = dataclasses.replace(EXPERIMENT, reference="published later")
    results = reader.results(experiment, SETTING, measurements)
    reader.write(results, tmp_path / "results.jsonl")
    records = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    shas = [record.pop("config_sha") for record in records]
    assert len({*shas}) == 3
    assert shas[2] is None
    same = {"experiment": "table0", "scale": "smoke", "labels": {"task": "pets"}, "paper": 93.4}
    same |= {"metric": "eval_accuracy", "reference": "published later"}
    done = {"value": 0.5, "problem": "", "steps": 6, "seconds": pytest.approx(2.0)}
    lost = {"value": None, "problem": "none has not run", "steps": None, "seconds": None}
    assert records == [
        same | done | {"seed": 3, "run": "seed3"},
        same | done | {"seed": 4, "run": "seed4"},
        same | lost | {"seed": 5, "run": "none"},
    ]
