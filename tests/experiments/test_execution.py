import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.runner import execution, graph
from experiments.runner.experiment import Measurement, Run, Task
from experiments.runner.outcomes import Outcomes
from vit_jax.config import complete_evals
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]

# The real worker, but for what it does: it notes what it began, and an accuracy that falls with the
# distance of the learning rate from 0.01. A rate of 0.5 is refused, 0.6 kills its process, 0.7
# waits for a SIGTERM; other runs take a moment.
WORKER = """
import json, os, pathlib, signal, sys, time
from experiments.runner import worker
from vit_jax import command
from vit_jax.errors import UserError

def run(job):
    workdir = pathlib.Path(job["workdir"])
    config = job.get("config")
    if config and (workdir / "metrics.json").exists():
        return
    with open(workdir.parent / "begun.jsonl", "a") as file:
        file.write(json.dumps({"name": workdir.name, "process": os.getpid(), **job}) + "\\n")
    if config is None:
        worker._do_task(job, workdir)
        return
    rate = config["schedule"]["base_lr"]
    if rate == 0.5:
        raise UserError("the loss is not finite")
    if rate == 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
    if rate == 0.7:
        def stop(*_):
            (workdir.parent / "saved").touch()
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        (workdir.parent / "waiting").touch()
        time.sleep(60)
    time.sleep(0.05)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config))
    accuracy = round(0.9 - 10 * abs(rate - 0.01), 6)
    (workdir / "metrics.json").write_text(json.dumps({"accuracy": accuracy}))

worker._prepare = lambda: None
worker._run = run
command.run(worker.main)
"""

# What a task calls.
ANALYSIS = """
def count_files(workdir, runs, suffix):
    (workdir / "array.txt").write_text("1 2 3")
    return {"files": sum(len([*run.glob(f"*{suffix}")]) for run in runs), "runs": len(runs)}

def count_marks(workdir, runs, own=0):
    folder = workdir.parent
    return {"finished": len([*folder.glob("run*/metrics.json"), *folder.glob("a/metrics.json")])}
"""


@pytest.fixture
def outcomes(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    (tmp_path / "analysis.py").write_text(ANALYSIS)
    monkeypatch.setattr(execution, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(execution, "_POLL_SECONDS", 0.05)
    return Outcomes(tmp_path / "runs")


@pytest.fixture
def make(tiny_config):
    def make_run(name, rate=0.01, init_from=None, rates=(), **changes):
        config = complete_evals(tiny_config(**{"schedule.base_lr": rate, **changes}))
        return Run(name, config, init_from, tuple(rates))

    return make_run


@pytest.fixture
def sweep(make):
    """A pre-training, a held-out run for each of some rates, and final runs."""

    def make_sweep(name="", rates=(0.008, 0.012, 0.03), seeds=2, pretraining_rate=0.01):
        start = make(f"{name}pretrain", pretraining_rate)
        tried = [make(f"{name}held-out-{rate}", rate, start) for rate in rates]
        return [
            make(f"{name}final-{seed}", 0.001, start, tried, seed=seed) for seed in range(seeds)
        ]

    return make_sweep


def execute(outcomes, *sources, workers=1, runs_per_process=100, shard=(0, 1)):
    return execution.execute(
        [Measurement({}, sources)],
        outcomes,
        workers=workers,
        runs_per_process=runs_per_process,
        shard=shard,
    )


def begun(outcomes):
    """What workers began, in order; forgets it."""
    path = outcomes.folder / "begun.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return records


def names(records):
    return [record["name"] for record in records]


def test_final_runs_take_the_best_rate_of_held_out_runs_and_the_weights_of_pretraining(
    outcomes, sweep, capsys
):
    finals = sweep()
    assert execute(outcomes, *finals) == execution.Outcome([], [])
    records = begun(outcomes)
    held_out = ["held-out-0.008", "held-out-0.012", "held-out-0.03"]
    assert names(records) == ["pretrain", *held_out, "final-0", "final-1"]
    weights = str(outcomes.folder / "pretrain")
    assert [x["config"]["init_from"] for x in records] == ["", *[weights] * 5]
    # 0.008 and 0.012 are as good: the lower of equals.
    assert [x["config"]["schedule"]["base_lr"] for x in records[-2:]] == [0.008, 0.008]
    printed = capsys.readouterr().out
    assert "final-1: eval_accuracy 0.8800" in printed
    assert printed.startswith("all: 6 runs, 0 finished, 1 at a time\n[1/6] pretrain: eval_acc")
    assert execute(outcomes, *finals) == execution.Outcome([], [])
    assert begun(outcomes) == []
    execute(outcomes, *finals, *sweep(seeds=3), workers=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:][0] == "all: 7 runs, 6 finished, 2 at a time"
    assert lines[-1].startswith("[7/7] final-2: ")


def test_several_at_once_keep_the_order_of_needs(outcomes, sweep):
    finals = sweep()
    execute(outcomes, *finals, workers=3)
    records = begun(outcomes)
    assert len({record["process"] for record in records}) == 3
    assert names(records)[0] == "pretrain"
    assert {*names(records)[-2:]} == {"final-0", "final-1"}
    assert len(records) == 6


def test_what_shares_its_programs_is_not_compiled_at_the_same_time(outcomes, make):
    outcomes.folder.mkdir()
    seeds = [make(f"seed{seed}", seed=seed, init_from=make("first")) for seed in (0, 1)]
    jobs = graph.collect([Measurement({}, [*seeds, make("second")])])
    board = execution.Board(jobs, ["seed0", "seed1", "second"], {*jobs}, outcomes)
    first = board.next_due([])
    assert first.name == "first"
    second = board.next_due([first])
    assert second.name == "second"
    assert board.next_due([first, second]) is None
    board.settle(first, {"state": "finished"})
    seed = board.next_due([second])
    assert (seed.name, board.next_due([second, seed]).name) == ("seed0", "seed1")


def test_what_only_unfinished_runs_need_is_not_run_for_finished_ones(outcomes, sweep):
    finals = sweep()
    execute(outcomes, *finals)
    for name in ("pretrain", "held-out-0.008"):
        (outcomes.folder / name / "metrics.json").unlink()
    begun(outcomes)
    assert execute(outcomes, *finals) == execution.Outcome([], [])
    assert begun(outcomes) == []


def test_a_moved_folder_goes_on(outcomes, sweep, tmp_path):
    finals = sweep()
    execute(outcomes, finals[0])
    moved = Outcomes(tmp_path / "moved")
    outcomes.folder.rename(moved.folder)
    begun(moved)
    assert execute(moved, *finals) == execution.Outcome([], [])
    assert names(begun(moved)) == ["final-1"]


def test_a_process_is_replaced_after_its_runs(outcomes, make):
    execute(outcomes, *(make(f"run{i}") for i in range(5)), runs_per_process=2)
    processes = [record["process"] for record in begun(outcomes)]
    assert [processes.count(x) for x in dict.fromkeys(processes)] == [2, 2, 1]


def test_a_held_out_run_that_fails_is_left_out(outcomes, sweep):
    outcome = execute(outcomes, *sweep(rates=(0.5, 0.02, 0.03), seeds=1))
    assert outcome.failed == ["held-out-0.5"]
    assert begun(outcomes)[-1]["config"]["schedule"]["base_lr"] == 0.02


@pytest.mark.parametrize(
    ("sources", "lost"),
    [
        ({"rates": (0.5,)}, "held-out-0.5"),
        ({"pretraining_rate": 0.5}, "pretrain"),
        ({"pretraining_rate": 0.6}, "pretrain"),
    ],
)
def test_what_needs_a_failed_run_has_failed_with_its_reason(outcomes, sweep, make, sources, lost):
    final = sweep(seeds=1, **sources)[0]
    outcome = execute(outcomes, final, make("other"))
    assert {"final-0", lost} <= {*outcome.failed}
    assert "other" not in outcome.failed
    assert names(begun(outcomes))[-1] == "other"
    reason = "killed by SIGKILL" if sources.get("pretraining_rate") == 0.6 else "is not finite"
    assert reason in outcomes.failure(final)
    assert outcomes.problem(final).startswith(f"final-0 failed: {lost} failed: ")


def test_damaged_files_fail_what_needs_them_and_no_more(outcomes, sweep, make):
    (final,) = sweep(seeds=1)
    execute(outcomes, *final.rates)
    (outcomes.folder / "held-out-0.008" / "config.json").write_text("{")
    assert execute(outcomes, final).failed == ["held-out-0.008"]
    assert begun(outcomes)[-1]["config"]["schedule"]["base_lr"] == 0.012
    (outcomes.folder / "held-out-0.03" / "metrics.json").write_text("{")
    (outcomes.folder / "final-0" / "metrics.json").unlink()
    assert execute(outcomes, final, make("other")).failed == ["held-out-0.008", "final-0"]
    assert "metrics.json cannot be read" in outcomes.failure(final)


def test_a_killed_worker_is_a_failed_run_that_is_tried_again(outcomes, make, capsys):
    runs = [make("a"), make("b", 0.6), make("c")]
    assert execute(outcomes, *runs).failed == ["b"]
    assert "b: failed: killed by SIGKILL, see " in capsys.readouterr().out
    assert names(begun(outcomes)) == ["a", "b", "c"]
    execute(outcomes, *runs)
    assert names(begun(outcomes)) == ["b"]


def test_a_worker_that_ends_before_it_begins_is_a_failed_run(outcomes, make, monkeypatch):
    monkeypatch.setattr(execution, "WORKER", (sys.executable, "-c", "import sys; sys.exit(3)"))
    assert execute(outcomes, make("a"), make("b")).failed == ["a", "b"]
    assert "exit code 3" in outcomes.failure(make("a"))


def test_a_run_is_said_to_be_stopped_unless_a_worker_is_at_it(outcomes, make):
    run = make("a")
    assert outcomes.problem(run) == "a has not run"
    outcomes.folder.mkdir()
    with outcomes.log(run).open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert outcomes.problem(run) == "a runs"
    assert outcomes.problem(run) == "a was stopped"


def test_what_has_not_begun_again_has_still_failed(outcomes, make):
    assert execute(outcomes, make("z", 0.5), make("b", 0.5)).failed == ["z", "b"]
    thread = threading.Thread(target=lambda: interrupt_at(outcomes.folder / "waiting"))
    thread.start()
    with pytest.raises(SystemExit):
        execute(outcomes, make("z", 0.7), make("b", 0.5))
    thread.join()
    assert outcomes.problem(make("z")) == "z was stopped"
    assert outcomes.problem(make("b")) == "b failed: the loss is not finite"


def interrupt_at(path):
    wait_for(path)
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_failed_before_is_waited_for_as_long_as_another_shard_may_try_it_again(
    outcomes, make, monkeypatch, capsys
):
    outcomes.folder.mkdir()
    start = make("start")
    jobs = graph.collect([Measurement({}, [make("final", init_from=start)])])
    monkeypatch.setattr(execution, "_POLL_SECONDS", 0.0)

    def board():
        return execution.Board(jobs, ["final"], {"final"}, outcomes)

    outcomes.fail(start, "the node was lost")
    os.utime(outcomes.error(start), (1e9, 1e9))
    waiting = board()
    assert waiting.next_due([]) is None
    assert waiting.has_work()
    assert "start, which another shard has to do again within 2 hours" in capsys.readouterr().out
    outcomes.fail(start, "again")
    assert waiting.next_due([]) is None
    assert waiting.failed() == ["start", "final"]
    os.utime(outcomes.error(start), (1e9, 1e9))
    late = board()
    assert late.elsewhere() == []
    late._begin -= 3 * 3600
    assert late.next_due([]) is None
    assert late.failed() == ["start", "final"]


def test_a_config_that_cannot_run_fails_before_what_it_needs_runs(outcomes, make):
    start = make("start")
    wrong = make("wrong", init_from=start)
    wrong.config.dataset.batch = 3
    outcome = execute(outcomes, wrong)
    assert outcome.failed == ["wrong"]
    assert "batch" in outcomes.failure(wrong)


def test_a_finished_run_of_another_config_is_not_taken_for_this_one(outcomes, make):
    execute(outcomes, make("a", seed=3))
    begun(outcomes)
    assert execute(outcomes, make("a", seed=4)).failed == ["a"]
    assert "seed: 3" in outcomes.problem(make("a", seed=4))
    assert execute(outcomes, make("a", seed=3, log_every="3 steps")).failed == []
    assert begun(outcomes) == []


def test_what_starts_from_a_run_of_another_config_is_not_finished(outcomes, sweep):
    def all_of(rate):
        finals = sweep(pretraining_rate=rate, seeds=1)
        return [*finals, Task("count", "analysis:count_marks", of=tuple(finals))]

    assert execute(outcomes, *all_of(0.01)).failed == []
    begun(outcomes)
    changed = all_of(0.02)
    assert {"pretrain", "final-0", "count"} <= {*execute(outcomes, *changed).failed}
    assert begun(outcomes) == []
    for job in changed:
        assert "pretrain holds a run of another config" in outcomes.problem(job)
        assert "schedule.base_lr: 0.01" in outcomes.problem(job)
    assert execute(outcomes, *all_of(0.01)).failed == []


def test_where_data_lies_and_how_a_step_is_divided_make_no_other_run(outcomes, make):
    execute(outcomes, make("a"))
    begun(outcomes)
    moved = {
        f"{section}.data_dir": "/moved" for section in ("dataset", "evals.val", "evals.fewshot")
    }
    same = {"accumulate_steps": 2, "sharding": "fsdp", "model.remat": "everything"}
    assert execute(outcomes, make("a", **moved, **same)).failed == []
    assert execute(outcomes, make("a", **{"evals.fewshot.dataset": "cifar10"})).failed == ["a"]
    problem = outcomes.problem(make("a", **{"evals.fewshot.dataset": "cifar10"}))
    assert problem.index("--output") < problem.index("change these back") < problem.index("remove")
    assert begun(outcomes) == []


def test_a_section_that_an_experiment_replaces_may_lack_what_has_a_default(outcomes, make):
    run = make("a")
    del run.config.optimizer["lr_multipliers"]
    execute(outcomes, run)
    assert outcomes.is_finished(run) and outcomes.is_finished(make("a"))


def test_what_goes_on_divides_its_batches_as_before(outcomes, make):
    before, now = make("a"), make("a", accumulate_steps=4)
    folder = outcomes.workdir(before)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(before.config.to_json())
    assert outcomes.complete(now).accumulate_steps == 4
    (folder / "checkpoints" / "100").mkdir(parents=True)
    assert outcomes.complete(now).accumulate_steps == 1


def test_a_task_computes_on_finished_runs_and_again_if_it_is_another(outcomes, make):
    of = (make("a"), make("b"))

    def task(suffix):
        return Task("count", "analysis:count_files", {"suffix": suffix}, of)

    for suffix, files in ((".json", 4), ("config.json", 2)):
        assert execute(outcomes, task(suffix)).failed == []
        metrics = json.loads((outcomes.folder / "count" / "metrics.json").read_text())
        assert metrics == {"files": files, "runs": 2}
        assert names(begun(outcomes))[-1] == "count"
    assert execute(outcomes, task("config.json")).failed == []
    assert begun(outcomes) == []
    assert (outcomes.folder / "count" / "array.txt").exists()


def test_a_task_that_measures_a_speed_runs_last_and_alone(outcomes, make):
    task = Task("alone", "analysis:count_marks", of=(make("a"),), alone=True)
    more = Task("more", "analysis:count_marks", {"own": 1}, alone=True)
    runs = [make(f"run{i}") for i in range(4)]
    assert execute(outcomes, task, more, *runs, workers=3).failed == []
    assert {*names(begun(outcomes))[-2:]} == {"alone", "more"}
    for name in ("alone", "more"):
        metrics = json.loads((outcomes.folder / name / "metrics.json").read_text())
        assert metrics["finished"] == 5


def test_what_a_task_does_not_survive_is_told_in_a_line(outcomes):
    outcome = execute(outcomes, Task("wrong", "analysis:count_files", {"of": 3}))
    assert outcome.failed == ["wrong"]
    assert outcomes.failure(Task("wrong", "")).startswith("TypeError: count_files() got an unexp")
    assert "Traceback" in (outcomes.folder / "wrong.log").read_text()


def in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("shards", [((0, 2), (1, 2)), ((0, 1), (0, 1))])
def test_two_commands_at_once_do_not_step_on_each_other(outcomes, sweep, shards):
    finals = [*sweep("a-"), *sweep("b-", seeds=4), *sweep("c-", seeds=1)]
    found = {}

    def command(number, shard):
        found[number] = execute(outcomes, *finals, workers=2, shard=shard)

    in_threads(*(lambda i=i, x=x: command(i, x) for i, x in enumerate(shards)))
    assert not any(outcome.failed for outcome in found.values())
    assert any(outcome.elsewhere == [] for outcome in found.values())
    ran = names(begun(outcomes))
    assert len(ran) == len({*ran}) == 19
    assert not any(map(outcomes.problem, finals))


def test_a_shard_waits_for_what_another_does_first(outcomes, sweep, capsys):
    finals = sweep(seeds=12)
    first = graph.part(graph.collect([Measurement({}, finals)]), 0, 2)
    assert "pretrain" in first and "final-11" not in first
    found = {}

    def later():
        time.sleep(0.5)
        found[0] = execute(outcomes, *finals, shard=(0, 2))

    in_threads(later, lambda: found.update({1: execute(outcomes, *finals, shard=(1, 2))}))
    assert "waiting for pretrain" in capsys.readouterr().out
    assert found[1].failed == []
    assert not any(map(outcomes.problem, finals))


def test_parts_are_every_job_once_and_chains_lie_together(sweep):
    finals = [run for name in "abcdefgh" for run in sweep(f"{name}-")]
    jobs = graph.collect([Measurement({}, finals)])
    parts = [graph.part(jobs, index, 4) for index in range(4)]
    assert sorted(sum(parts, [])) == sorted(jobs)
    assert [{name[0] for name in part} for part in parts] == [{*"ab"}, {*"cd"}, {*"ef"}, {*"gh"}]
    alone = graph.collect([Measurement({}, sweep("x-", seeds=1) + sweep("y-", seeds=1))])
    many = [graph.part(alone, index, 10) for index in range(10)]
    assert sorted(sum(many, [])) == sorted(alone)
    swept = {f"x-held-out-{rate}" for rate in (0.008, 0.012, 0.03)} | {"x-final-0"}
    assert any(swept <= {*part} for part in many)


def test_two_of_one_name_that_differ_are_told_in_a_line(make, sweep):
    same = [Measurement({}, sweep()), Measurement({}, sweep())]
    assert len(graph.collect(same)) == 6
    with pytest.raises(UserError, match=r"named a \(config.seed is 1 or 2\): give .* a variant"):
        graph.collect([Measurement({}, [make("a", seed=1)]), Measurement({}, [make("a", seed=2)])])
    with pytest.raises(UserError, match="needs"):
        graph.collect([Measurement({}, [make("a"), make("a", init_from=make("b"))])])
    with pytest.raises(UserError, match="one is a Run, the other a Task"):
        graph.collect([Measurement({}, [make("a"), Task("a", "x:y")])])


def wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_lets_runs_save_and_goes_no_further(outcomes, make, number, end, capsys):
    def send():
        wait_for(outcomes.folder / "waiting")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(end) as caught:
        execute(outcomes, make("a", 0.7), make("b"))
    thread.join()
    assert getattr(caught.value, "code", 143) == 143
    assert (outcomes.folder / "saved").exists()
    assert names(begun(outcomes)) == ["a"]
    assert "the same command continues" in capsys.readouterr().out


# A command of its own, that is killed: its worker must not go on alone, nor lose what it has.
KILLED = """
import pathlib, sys
from experiments.runner import execution
from experiments.runner.experiment import Measurement, Run
from experiments.runner.outcomes import Outcomes
from vit_jax.config import read_config
folder, config, *execution.WORKER = sys.argv[1:]
run = Run("killed", read_config(config))
execution.execute([Measurement({}, [run])], Outcomes(pathlib.Path(folder)), workers=1,
                  runs_per_process=9)
"""


@pytest.mark.slow
def test_a_killed_command_loses_at_most_one_evaluation_interval(tmp_path, tiny_config, monkeypatch):
    interval = 100
    every = {x: f"{interval} steps" for x in ("evals.val.every", "checkpoint_every", "log_every")}
    config = tiny_config(**every, duration="1000000 steps")
    path, runs = tmp_path / "config.json", tmp_path / "runs"
    path.write_text(config.to_json())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", KILLED, str(runs), str(path), *execution.WORKER]
    log, workdir = runs / "killed.log", runs / "killed"
    first = subprocess.Popen(command)
    wait_for(workdir / "checkpoints" / f"{interval}", 120)
    first.kill()
    first.wait()
    wait_for_line(log, "SIGTERM: saved step")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    reached = max(json.loads(line)["step"] for line in lines)
    saved = max(int(x.name) for x in (workdir / "checkpoints").iterdir() if x.name.isdigit())
    assert saved >= reached >= interval
    with subprocess.Popen(command) as again:
        wait_for_line(log, f"continuing from step {saved}")
        again.terminate()
    assert again.returncode == 143
    assert (workdir / "checkpoints").exists()
    assert not (workdir / "metrics.json").exists()


def wait_for_line(path, text, seconds=60):
    deadline = time.monotonic() + seconds
    while text not in path.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert text in path.read_text()
