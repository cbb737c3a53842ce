import json
import re
import sys

import numpy as np
import pytest

from experiments import vtab
from vit_jax.data.vtab import TASKS
from vit_jax.errors import UserError
from vit_jax.recipes import get_config

from .. import prepared


def test_the_means_are_over_the_tasks_that_ran():
    accuracies = {
        "cifar100": [0.80, 0.90],
        "svhn": [0.60, 0.80],
        "dmlab": [None, None],
        "kitti_distance": [0.5, 0.4],
    }
    lines = [line.strip("| ").split(" | ") for line in vtab.table(accuracies).splitlines()]
    rows = {tuple(line[:2]): line[2:] for line in lines}
    natural = [np.mean([0.8, 0.6]), np.mean([0.9, 0.8])]
    assert rows["mean of 2", "natural"] == [
        f"{100 * np.mean(natural):.2f} ± {100 * np.std(natural, ddof=1):.2f}",
        f"{(85.5 + 88.9) / 2:.1f}",
        f"{(81.9 + 87.4) / 2:.1f}",
        f"{(84.1 + 80.9) / 2:.1f}",
    ]
    overall = [np.mean([0.8, 0.6, 0.5]), np.mean([0.9, 0.8, 0.4])]
    assert rows["mean of 3", "all"][0] == (
        f"{100 * np.mean(overall):.2f} ± {100 * np.std(overall, ddof=1):.2f}"
    )
    assert rows["mean of 1", "structured"][1:] == ["84.5", "82.2", "79.9"]
    assert rows["dmlab", "structured"][0] == "failed"
    assert not any(group == "specialized" for _, group in rows)
    assert "Only 3 of the 19 tasks have run" in vtab.summary(accuracies)
    assert "Only" not in vtab.summary(dict.fromkeys(TASKS, [0.5]))


@pytest.mark.parametrize("name", ["vtab", "sweep"])
def test_help_names_the_command_that_was_typed(run, name):
    code, output = run([sys.executable, "-m", f"experiments.{name}", "--help"])
    assert code == 0
    assert output.startswith(f"usage: python -m experiments.{name} [-h] [--config ")
    assert "--seeds N" in output and "vit_jax.sweep" not in output


def tiny(task, data_dir, **overrides):
    config = get_config("ViT-Ti/8", f"finetune,{task}")
    config.update_from_flattened_dict(
        {
            "init_from": "",
            "batch_size": 32,
            "duration": "60 steps",
            "log_every": "20 steps",
            "dataset.data_dir": str(data_dir),
            "dataset.image_size": 32,
            "model.hidden_size": 32,
            "model.num_layers": 2,
            "model.mlp_dim": 64,
            "model.num_heads": 2,
            "model.dtype": "float32",
            "schedule.warmup": "10 steps",
            "schedule.base_lr": 0.1,
            **overrides,
        }
    )
    return config


@pytest.mark.slow
def test_two_tasks_from_data_to_table_and_a_missing_one_named(program, tmp_path, read_metrics):
    """dSprites, rendered as its authors did, and CLEVR's format with flat discs and squares."""
    noise = np.random.default_rng(0)
    prepared.write("dsprites:2.*.*", tmp_path, {"train": prepared.dsprites(2000, noise)})
    scenes = {"train": prepared.clevr(2000, noise), "validation": prepared.clevr(150, noise)}
    prepared.write("clevr:3.*.*", tmp_path, scenes)
    workdir = tmp_path / "vtab"
    flags = [f"--workdir={workdir}", "--tasks=dsprites_location,svhn,clevr_count"]
    code, output = program("experiments.vtab", tiny("vtab", tmp_path), *flags)
    assert code == 1, output
    (missing,) = [line for line in output.splitlines() if "failed:" in line]
    assert "data set 'vtab:svhn' is not prepared in data_dir" in missing
    assert "download_and_prepare()" in missing

    location = read_metrics(workdir / "dsprites_location-seed0")
    count = read_metrics(workdir / "clevr_count-seed0")
    assert (location["examples"], count["examples"]) == (200, 150)
    assert location["accuracy"] > 0.15  # A guess among 16 bins is right once in 16.
    assert count["accuracy"] > 0.25  # Among eight counts, once in eight.
    assert (workdir / "clevr_count-seed0.log").read_text().count("1,000 training images") == 1
    for found in (location, count):
        assert f" | {100 * found['accuracy']:.2f} | " in output
    assert "| svhn | natural | failed | 88.9 | 87.4 | 80.9 |" in output
    mean = 100 * np.mean([location["accuracy"], count["accuracy"]])
    assert f"| mean of 2 | all | {mean:.2f} |" in output
    assert "Only 2 of the 19 tasks have run" in output
    saved = json.loads((workdir / "vtab.json").read_text())["accuracies"]
    assert saved["svhn"] == [None] and saved["clevr_count"] == [count["accuracy"]]

    config = json.loads((workdir / "clevr_count-seed0.json").read_text())["dataset"]
    assert (config["random_crop"], config["random_flip"]) == (False, True)


@pytest.mark.parametrize(
    ("task", "flag", "message"),
    [
        ("cifar10", [], "is of data set 'cifar10': give the setting of all tasks"),
        ("vtab", ["--tasks=svhn,dtdd"], "did you mean vtab:dtd?"),
        ("vtab", ["--tasks=svhn,svhn"], "is not a list of tasks, each once"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, task, flag, message):
    config = tmp_path / "config.json"
    config.write_text(tiny(task, tmp_path).to_json())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        vtab.main(["--config", str(config), *flag, f"--workdir={tmp_path / 'w'}"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()
