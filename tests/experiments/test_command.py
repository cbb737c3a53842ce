import json
import subprocess
import sys

import pytest

from experiments.runner import command, cost, execution, graph
from experiments.runner.experiment import Experiment, Measurement, Run
from vit_jax.config import complete_evals, to_dict
from vit_jax.errors import UserError
from vit_jax.files import write_json

PROG = "python -m experiments.table0"


@pytest.fixture
def experiment(tiny_config):
    """Of two runs, one on the user's data set."""

    def measure(setting):
        names = {"a": "digits", "b": setting.datasets.get("jft", "digits")}
        return [
            Measurement({"task": task}, [Run(task, complete_evals(tiny_config(seed=seed)))])
            for seed, task in enumerate(names)
        ]

    return Experiment("table0", "Table 0: <nothing>", measure, rows=("task",))


def finish(outcomes, run, accuracy=0.5):
    folder = outcomes.workdir(run)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval_accuracy": accuracy}))
    write_json(folder / "config.json", to_dict(run.config))
    write_json(folder / "metrics.json", {"accuracy": accuracy})


@pytest.fixture
def executed(monkeypatch):
    """Has runs be finished at once but "b", which fails; returns how they were asked for."""
    calls = []

    def execute(measurements, outcomes, **options):
        jobs = graph.collect(measurements)
        calls.append({"jobs": list(jobs), **options})
        for name, job in jobs.items():
            if name == "b":
                outcomes.fail(job, "out of memory")
            elif not outcomes.is_finished(job):
                finish(outcomes, job)
        return execution.Outcome(["b"], [])

    monkeypatch.setattr(execution, "execute", execute)
    return calls


def main(experiment, tmp_path, *flags):
    argv = ["--scale", "smoke", "--output", str(tmp_path), *flags]
    return command.main([experiment], PROG, experiment.title, argv)


def test_a_failed_run_is_named_and_the_rest_is_rendered(experiment, executed, tmp_path, capsys):
    assert main(experiment, tmp_path, "--jobs", "3", "--shard", "1/4") == 1
    assert executed[0]["workers"] == 3
    assert executed[0]["shard"] == (1, 4)
    folder = tmp_path / "smoke" / "table0"
    records = [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]
    assert [record["value"] for record in records] == [0.5, None]
    table = (folder / "table.md").read_text()
    assert "50.0" in table and "out of memory" in table
    assert (folder / "table.csv").exists()
    printed = capsys.readouterr().out
    assert table.strip() in printed
    assert "runs missing: 1" in printed
    page = (tmp_path / "smoke" / "table0.html").read_text()
    assert "Table 0: &lt;nothing&gt;" in page and "out of memory" in page
    assert (tmp_path / "smoke" / "index.html").exists()


def test_render_runs_nothing(experiment, executed, tmp_path):
    assert main(experiment, tmp_path, "--render") == 1
    assert executed == []
    assert "not run" in (tmp_path / "smoke" / "table0" / "table.md").read_text()


def test_only_a_part_is_run_and_the_page_says_so(experiment, executed, tmp_path):
    assert main(experiment, tmp_path, "--only", "task=a") == 0
    assert executed[0]["jobs"] == ["a"]
    page = (tmp_path / "smoke" / "table0.html").read_text()
    assert "only task a." in page and "--only task=a<" in page
    main(experiment, tmp_path, "--only", "task=a,b")
    assert executed[1]["jobs"] == ["a", "b"]


def test_a_part_has_one_of_the_values_of_every_label():
    labels = [{"model": "B", "task": "x"}, {"model": "L", "task": "y"}, {"model": "H"}]
    found = {"table0": [Measurement(each, []) for each in labels], "figure0": []}
    chosen = command._choose(found, {"model": ("B", "H")})
    assert [x.labels["model"] for x in chosen["table0"]] == ["B", "H"] and len(chosen) == 1
    with pytest.raises(UserError, match="--only model and task: no number has all of them"):
        command._choose(found, {"model": ("B",), "task": ("y",)})


@pytest.mark.usefixtures("executed")
def test_a_picture_that_cannot_be_drawn_costs_no_page(experiment, tmp_path, capsys):
    def draw(results):
        raise ZeroDivisionError(f"no mean of {results.found[1].mean}")

    drawn = Experiment("table0", "Table 0", experiment.measure, ("task",), draw=draw)
    assert main(drawn, tmp_path) == 1
    assert "table0: no picture: ZeroDivisionError: no mean of None" in capsys.readouterr().out
    assert (tmp_path / "smoke" / "table0.html").exists()


def test_the_last_shard_renders(experiment, monkeypatch, tmp_path, capsys):
    outcome = execution.Outcome([], ["a", "b"])
    monkeypatch.setattr(execution, "execute", lambda *args, **options: outcome)
    assert main(experiment, tmp_path, "--shard", "0/2") == 0
    assert "2 are left to others" in capsys.readouterr().out
    assert not (tmp_path / "smoke" / "table0").exists()


def test_a_shard_whose_runs_failed_ends_with_1(experiment, monkeypatch, tmp_path, capsys):
    outcome = execution.Outcome(["a"], ["b"])
    monkeypatch.setattr(execution, "execute", lambda *args, **options: outcome)
    assert main(experiment, tmp_path, "--shard", "0/2") == 1
    assert "1 failed; 1 are left to others" in capsys.readouterr().out


def test_jft_is_asked_for_before_anything_runs(executed, tmp_path):
    def measure(setting):
        return [Measurement({"task": "a"}, [setting.pretrain("ViT-B/16", "jft")])]

    experiment = Experiment("table0", "Table 0", measure, rows=("task",))
    for more in ([], ["--slurm", str(tmp_path / "job.sh")]):
        with pytest.raises(UserError, match="--jft imagenet21k"):
            command.main([experiment], PROG, "", ["--scale", "paper", *more])
    assert executed == [] and not (tmp_path / "job.sh").exists()


@pytest.mark.parametrize(
    ("labels", "changes", "text"),
    [
        ([{"tusk": "a"}], {}, "no label 'task', .* did you mean 'tusk'"),
        ([{"task": "a"}] * 2, {}, "table0: 2 measurements have the labels"),
        ([{"task": "a"}], {"model.dropout": 0.1}, "dropout"),
        ([{"task": "a"}], {"model.num_heads": 5}, "num_heads"),
        ([{"task": "a"}], {"accumulate_steps": 3}, "4096 cannot be divided by 3"),
    ],
)
@pytest.mark.parametrize("flag", ["--dry_run", "--slurm=job.sh"])
def test_what_could_not_run_is_told_in_a_line(tmp_path, monkeypatch, labels, changes, text, flag):
    def measure(setting):
        run = setting.pretrain("ViT-B/16", "imagenet2012", variant="x", changes=changes)
        return [Measurement(each, [run]) for each in labels]

    experiment = Experiment("table0", "Table 0", measure, rows=("task",))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text):
        command.main([experiment], PROG, "", ["--scale", "paper", flag])
    assert not [*tmp_path.iterdir()]


def test_two_runs_of_one_name_are_told_in_a_line(tmp_path):
    def measure(setting):
        changes = {"model.classifier": "gap"}
        runs = [setting.pretrain("ViT-B/16", "imagenet2012", changes=x) for x in ({}, changes)]
        return [Measurement({"task": str(i)}, [run]) for i, run in enumerate(runs)]

    experiment = Experiment("table0", "Table 0", measure, rows=("task",))
    for flag in ([], ["--dry_run"], ["--slurm", str(tmp_path / "job.sh")]):
        with pytest.raises(UserError, match=r"classifier.*a variant"):
            main(experiment, tmp_path, *flag)


def test_dry_run_asks_for_the_cost_and_runs_nothing(
    experiment, executed, monkeypatch, tmp_path, capsys
):
    asked = []

    def report(measurements, setting, device="H100", mfu=0.4):
        asked.extend([list(measurements), setting.datasets, setting.images, device, mfu])
        return "so many"

    monkeypatch.setattr(cost, "report", report)
    flags = ["--dry_run", "--jft", "folder:/x", "--jft_images", "9", "--mfu", "0.3"]
    assert main(experiment, tmp_path, *flags) == 0
    assert asked == [["table0"], {"jft": "folder:/x"}, {"jft": 9}, "H100", 0.3]
    assert capsys.readouterr().out == "so many\n"
    assert executed == []


def test_slurm_writes_a_script_of_all_parts(experiment, executed, tmp_path):
    script = tmp_path / "job sh"
    flags = ["--slurm", str(script), "--shards", "5", "--seeds=2", "--data_dir", "/a b"]
    flags += ["--gpus", "8", "--sharding", "fsdp"]
    assert main(experiment, tmp_path, *flags) == 0
    assert executed == []
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "#SBATCH --array=0-4\n" in text
    assert "#SBATCH --gpus-per-task=8\n" in text
    *_, line = text.splitlines()
    echo = line.replace(f"exec {sys.executable}", "printf '%s\\n'")
    printed = subprocess.run(
        ["bash", "-c", echo], env={"SLURM_ARRAY_TASK_ID": "3"}, capture_output=True, text=True
    ).stdout.splitlines()
    output = ["--output", str(tmp_path), "--seeds=2", "--data_dir", "/a b", "--sharding", "fsdp"]
    wanted = ["-m", "experiments.table0", "--scale", "smoke", *output, "--shard", "3/5"]
    assert printed == wanted
    command.build_parser(PROG, "").parse_args(printed[2:])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--shard", "4/4"], "'4/4' is not I/N"),
        (["--shard", "1"], "'1' is not I/N"),
        (["--seeds", "0"], "'0' is not a whole number"),
        (["--shards", "3"], "give --slurm FILE"),
        (["--scal", "smoke"], "did you mean --scale"),
        (["--gpus", "2"], "give --slurm FILE"),
        (["--slurm", "x", "--dry_run"], "one of them at a time"),
        (["--remat", "all"], "'?all'? is not one of nothing, dots"),
        (["--sharding", "model"], "'model' is unknown"),
        (["--only", "task"], "'task' is not LABEL=VALUE"),
        (["--only", "task=c"], "task=c is of no number: use a, b"),
        (["--only", "model=a"], "model=a is of no number: labels are task"),
        (["--accumulate_steps", "0"], "'0' is not a whole number"),
    ],
)
def test_a_wrong_flag_is_one_line(experiment, tmp_path, flags, text):
    with pytest.raises(UserError, match=text):
        main(experiment, tmp_path, *flags)


def test_flags_are_taken_off_with_their_values():
    argv = ["--slurm", "x", "--scale", "smoke", "--shards=3", "--jobs", "2", "--slurm=y"]
    assert command._without(argv, ("--slurm", "--shards")) == ["--scale", "smoke", "--jobs", "2"]


def test_all_finds_every_experiment_by_its_module():
    from experiments import all as every

    found = [experiment.name for experiment in every.find()]
    assert len(found) == len({*found})
    tables = [name for name in found if name.startswith("table")]
    assert tables == found[: len(tables)] == sorted(tables)


def test_help_imports_no_jax():
    code = (
        "import sys; from experiments.runner import command\n"
        "try: command.build_parser('x', 'y').parse_args(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('jax', 'flax', 'matplotlib') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "--shard I/N" in printed
    assert printed.endswith("[]\n")
