import json
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax import command, sweep
from vit_jax.config import check_config
from vit_jax.errors import UserError


def test_the_best_rate_on_held_out_images_trains_on_all_of_train(stand_in, tiny_config, tmp_path):
    result = sweep.sweep(tiny_config(seed=4), [0.001, 0.01, 0.03], 3, tmp_path)
    assert result["learning_rate"] == 0.01
    names = [f"held-out-lr{rate}" for rate in (0.001, 0.01, 0.03)]
    names += [f"final-lr0.01-seed{seed}" for seed in (4, 5, 6)]
    assert stand_in(tmp_path) == names
    for name in names:
        config = json.loads((tmp_path / f"{name}.json").read_text())
        assert config["dataset"]["development"] == name.startswith("held-out")
        assert f"{config['schedule']['base_lr']:g}" in name
        assert config["seed"] == int(name[-1]) if name.startswith("final") else 4
    # The stand-in gives 0.8 and 0.01 for each seed; 0.1 less where it is held out.
    assert result["held_out"] == pytest.approx({0.001: 0.65, 0.01: 0.74, 0.03: 0.54})
    assert result["final"] == pytest.approx({4: 0.84, 5: 0.85, 6: 0.86})
    assert result["mean"] == pytest.approx(np.mean([0.84, 0.85, 0.86]))
    assert result["sd"] == pytest.approx(np.std([0.84, 0.85, 0.86], ddof=1))
    assert (result["examples"], result["failed"]) == (77, 0)


def test_a_recipe_that_names_its_split_keeps_it_for_the_final_runs(stand_in, tiny_config, tmp_path):
    config = tiny_config(**{"dataset.train_split": "train[:98%]", "dataset.eval_split": "test"})
    check_config(config)
    sweep.sweep(config, [0.001, 0.01], 1, tmp_path)
    splits = {}
    for name in stand_in(tmp_path):
        found = ConfigDict(json.loads((tmp_path / f"{name}.json").read_text()))
        check_config(found)
        splits[name] = (found.dataset.train_split, found.dataset.eval_split)
    held_out = dict.fromkeys(["held-out-lr0.001", "held-out-lr0.01"], ("", ""))
    assert splits == held_out | {"final-lr0.01-seed0": ("train[:98%]", "test")}


def test_again_it_runs_nothing_and_says_the_same(stand_in, tiny_config, tmp_path):
    first = sweep.sweep(tiny_config(), [0.001, 0.01], 2, tmp_path)
    assert len(stand_in(tmp_path)) == 4
    (tmp_path / "final-lr0.01-seed1" / "metrics.json").unlink()
    assert sweep.sweep(tiny_config(), [0.001, 0.01], 2, tmp_path) == first
    assert stand_in(tmp_path) == ["final-lr0.01-seed1"]


@pytest.mark.usefixtures("stand_in")
def test_the_lowest_of_equally_good_rates_is_chosen(tiny_config, tmp_path):
    result = sweep.sweep(tiny_config(), [0.0078125, 0.0121875], 1, tmp_path)
    assert result["held_out"][0.0078125] == result["held_out"][0.0121875]
    assert result["learning_rate"] == 0.0078125


def test_of_a_single_rate_nothing_is_held_out(stand_in, tiny_config, tmp_path):
    result = sweep.sweep(tiny_config(), [0.03], 1, tmp_path)
    assert stand_in(tmp_path) == ["final-lr0.03-seed0"]
    assert (result["mean"], result["sd"]) == (pytest.approx(0.6), None)
    assert sweep.table(result).splitlines()[2:] == ["| 0.03 |  | 60.00 | 60.00 |"]


@pytest.mark.usefixtures("stand_in")
def test_a_failed_rate_is_left_out_and_said(tiny_config, tmp_path):
    result = sweep.sweep(tiny_config(), [0.01, 0.5], 2, tmp_path)
    assert (result["learning_rate"], result["failed"]) == (0.01, 1)
    assert "| 0.5 | failed |" in sweep.table(result)
    nothing = sweep.sweep(tiny_config(), [0.5, 0.6], 2, tmp_path)
    assert (nothing["learning_rate"], nothing["failed"], nothing["final"]) == (None, 2, {})
    assert "every held-out run failed" in sweep.summary(nothing)
    assert sweep.table(nothing).count("failed") == 2


@pytest.mark.usefixtures("stand_in")
def test_the_table_has_a_row_for_each_rate(tiny_config, tmp_path):
    result = sweep.sweep(tiny_config(), [0.001, 0.01], 3, tmp_path)
    header, _, low, best = sweep.table(result).splitlines()
    assert header == "| learning rate | held out | seed 0 | seed 1 | seed 2 | mean ± sd |"
    assert low == "| 0.001 | 61.00 |  |  |  |  |"
    assert best == "| 0.01 | **70.00** | 80.00 | 81.00 | 82.00 | 81.00 ± 1.00 |"
    assert "sample standard deviation (n - 1) of 3 of 3 seeds" in sweep.summary(result)
    assert "on 77 images" in sweep.summary(result)


@pytest.mark.parametrize(
    ("dataset", "rates"),
    [
        ("cifar10", [0.001, 0.003, 0.01, 0.03]),
        ("imagenet2012", [0.003, 0.01, 0.03, 0.06]),
        ("vtab:svhn", [0.01]),
        ("folder:/flowers", [0.001, 0.003, 0.01, 0.03]),
    ],
)
def test_the_rates_are_those_of_table_4(dataset, rates):
    assert sweep.learning_rates(None, dataset) == rates
    assert sweep.learning_rates(["0.1", "2e-3"], dataset) == [0.002, 0.1]


@pytest.mark.parametrize(
    "given",
    [["0"], ["-1"], ["x"], ["0.1", "1e-1"], ["0.1", "0.10000001"], [""], ["nan"], ["1e999"]],
)
def test_a_rate_that_is_none_is_one_line(given):
    with pytest.raises(UserError, match="are not positive numbers, each once"):
        sweep.learning_rates(given, "cifar10")


@pytest.mark.slow
def test_a_real_sweep_on_the_digits(program, tiny_config, tmp_path, read_metrics):
    workdir = tmp_path / "sweep"
    never = {"evals.val.every": "0 steps", "checkpoint_every": "0 steps", "log_every": "0 steps"}
    config = tiny_config(duration="300 steps", **never)
    flags = ["--learning_rates=0.02,1e-6", "--seeds=1", f"--workdir={workdir}"]
    code, output = program("vit_jax.sweep", config, *flags)
    assert code == 0, output
    result = json.loads((workdir / "sweep.json").read_text())
    assert result["learning_rate"] == 0.02
    held_out = {rate: read_metrics(workdir / f"held-out-lr{rate}") for rate in ("0.02", "1e-06")}
    final = read_metrics(workdir / "final-lr0.02-seed0")
    assert result["held_out"] == {rate: found["accuracy"] for rate, found in held_out.items()}
    assert result["final"] == {"0": final["accuracy"]}
    # A tenth of the 1,442 images of train, then all 355 of test.
    assert {found["examples"] for found in held_out.values()} == {144}
    assert final["examples"] == 355
    accuracies = [f"{100 * found['accuracy']:.2f}" for found in [*held_out.values(), final]]
    assert all(accuracy in output for accuracy in accuracies)

    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/*")}
    code, again = program("vit_jax.sweep", config, *flags)
    assert code == 0
    assert again.splitlines()[-6:] == output.splitlines()[-6:]
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("*/*")} == before


def test_a_mistake_is_one_line_and_exit_code_2(tiny_config, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(tiny_config().to_json())
    flags = ["--config", str(tmp_path / "config.json"), "--learning_rates=0", "--workdir=x"]
    monkeypatch.setattr(sys, "argv", ["sweep", *flags])
    with pytest.raises(SystemExit) as end:
        command.run(sweep.main)
    output = "".join(capsys.readouterr())
    assert (end.value.code, output.count("\n")) == (2, 1)
    assert output.startswith("error: --learning_rates 0 are not positive numbers")
