import json
import math
import os
import pathlib
import random
import re
import shutil
import sys
import time

import jax
import numpy as np
import pytest

from vit_jax import main, program, reporting, train
from vit_jax.checkpoints import integrity
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.config import read_config, to_dict
from vit_jax.config_migration import ADDED_KEYS, migrate
from vit_jax.data import datasets, pipeline
from vit_jax.data.pipeline import INPUT_VERSION
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.models import create_model

from .runs import (
    assert_same_run,
    read_arrays,
    read_costs,
    read_losses,
    read_metrics,
    train_until,
)

# Written by the code of before config.evals.
BEFORE_EVALS = pathlib.Path(__file__).with_name("config_of_before_evals.json")


def test_a_run_leaves_what_it_says(finished):
    records = read_metrics(finished)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "eval_accuracy" in r] == [4, 6]
    assert records[0]["learning_rate"] == 0
    assert records[2]["learning_rate"] == pytest.approx(1e-2)
    final = json.loads((finished / "metrics.json").read_text())
    assert final["step"] == 6
    assert final["examples"] == 355
    assert final["best"]["accuracy"] >= final["accuracy"]
    # keep_checkpoints is 2: the last two of steps 2, 4 and 6.
    steps = {path.name for path in (finished / "checkpoints").iterdir() if path.is_dir()}
    assert steps == {"4", "6"}
    assert len(list((finished / "best").iterdir())) == 1
    assert list(finished.glob("events.out.tfevents.*"))


def test_a_run_keeps_account_of_what_it_has_cost(finished):
    records = read_costs(finished)
    # 4 patches of 4 x 4 and the class token, width 16, one layer; the head's 16 and 10 outputs.
    layer = 5 * 16 * (4 * 16 + 2 * 32) + 2 * 5**2 * 16
    multiply_adds = 4 * (3 * 4**2) * 16 + layer + 16 * 16 + 16 * 10
    for record in records:
        images = 32 * record["step"]
        assert record["exaflops"] == pytest.approx(6 * multiply_adds * images / 1e18, rel=1e-9)
    # One device: the days are those that the steps took.
    seconds = np.cumsum([32 / r["images_per_second"] for r in records])
    days = [r["device_days"] for r in records]
    np.testing.assert_allclose(days, seconds / 86_400, atol=0.2 / 86_400)


def test_the_time_of_a_resumed_run_counts_from_its_beginning(
    finished, tiny_config, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints/6")
    (run / "metrics.json").unlink()
    before = {r["step"]: r["device_days"] * 86_400 for r in read_costs(run)}
    starts = []
    original = reporting.Stopwatch
    monkeypatch.setattr(
        reporting, "Stopwatch", lambda earlier: starts.append(earlier) or original(earlier + 1000)
    )
    train.train(tiny_config(), run)
    after = {r["step"]: r["device_days"] * 86_400 for r in read_costs(run)}
    saved = integrity.read_document(run / "checkpoints/4")["metadata"]["progress"]["seconds"]
    assert starts == [saved]
    assert before[4] <= saved < before[4] + 60
    assert after[4] == before[4]
    assert before[4] + 1000 < after[5] < after[6] < before[4] + 1060


def test_the_first_loss_is_that_of_guessing(finished):
    # The head starts at zero, so that every class has the same probability.
    assert read_losses(finished)[0] == pytest.approx(math.log(10), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_takes_long_is_announced(dtype, tiny_config, tmp_path, monkeypatch, capsys):
    said = []

    def compile_train_step(*_):
        said.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "compile_train_step", compile_train_step)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_config(**{"model.dtype": dtype}), tmp_path / "run")
    (text,) = said
    assert text.splitlines()[-1] == "compiling the training step"
    assert ("a CPU is slow in bfloat16" in text) == (dtype == "bfloat16")


def test_a_finished_run_says_so(finished, tiny_config, capsys):
    before = (finished / "metrics.jsonl").read_text()
    final = train.train(tiny_config(), finished)
    assert "holds a finished run: nothing to do" in capsys.readouterr().out
    assert final == json.loads((finished / "metrics.json").read_text())
    assert (finished / "metrics.jsonl").read_text() == before


def test_another_config_is_refused_with_what_differs(finished, tiny_config):
    config = tiny_config(**{"schedule.base_lr": 0.5, "model.num_layers": 3, "log_every": "3 steps"})
    with pytest.raises(UserError) as error:
        train.train(config, finished)
    assert "schedule.base_lr: 0.01 in the checkpoint, 0.5 now" in str(error.value)
    assert "model.num_layers: 1 in the checkpoint, 3 now" in str(error.value)
    assert "log_every" not in str(error.value)


@pytest.mark.parametrize("version", [None, 1, INPUT_VERSION + 1])
def test_a_run_that_began_with_another_order_of_images_is_refused(
    finished, tiny_config, tmp_path, monkeypatch, version
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.json").unlink()
    saved = train.latest_metadata(run)
    assert saved["input"] == INPUT_VERSION
    saved = {key: x for key, x in (saved | {"input": version}).items() if x is not None}
    monkeypatch.setattr(train, "latest_metadata", lambda _: saved)
    with pytest.raises(UserError, match="another version, which reads the images in another order"):
        train.train(tiny_config(), run)


def test_what_is_not_understood_is_no_other_config(finished, tiny_config):
    with pytest.raises(UserError, match="config.duration: duration '12 epchs' is not understood"):
        train.train(tiny_config(duration="12 epchs"), finished)


@pytest.mark.parametrize("key", sorted(set(ADDED_KEYS) - train.RESUMABLE_CHANGES))
def test_a_run_from_before_a_key_goes_on_with_what_it_did_then(tiny_config, tmp_path, key):
    saved = to_dict(tiny_config(augment="light1"))
    section, _, name = key.rpartition(".")
    del (saved[section] if section else saved)[name]
    saved = migrate(saved)
    config = tiny_config(**{"augment": "light1", key: ADDED_KEYS[key]})
    train._refuse_another_run(config, tmp_path, saved)
    other = {str: "another", float: 0.25, int: 7}.get(type(ADDED_KEYS[key]), [0.5])
    config.update_from_flattened_dict({key: other})
    line = f"{key}: {ADDED_KEYS[key]} in the checkpoint, {other} now"
    with pytest.raises(UserError, match=re.escape(line)):
        train._refuse_another_run(config, tmp_path, saved)


def test_a_run_whose_config_replaces_sections_as_before_is_the_same_run(finished, tiny_config):
    config = tiny_config()
    for section in ("optimizer", "schedule"):
        added = {key.partition(".")[2] for key in ADDED_KEYS if key.startswith(section)}
        config[section] = {k: x for k, x in config[section].items() if k not in added}
    assert "lr_multipliers" not in config.optimizer and "drops" not in config.schedule
    assert train.train(config, finished) == train.train(tiny_config(), finished)


def test_a_run_of_before_evals_goes_on_with_the_same_bits(data_dir, tmp_path, monkeypatch):
    before = json.loads(BEFORE_EVALS.read_text())
    before["dataset"]["data_dir"] = before["fewshot"]["data_dir"] = data_dir
    (tmp_path / "config.json").write_text(json.dumps(before))
    config = read_config(str(tmp_path / "config.json"))
    train.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "to_dict", lambda _: before)
        train_until(config, tmp_path / "stopped", step=6)
    saved = integrity.read_document(tmp_path / "stopped/checkpoints/4")["metadata"]
    assert saved["config"] == before
    train.train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 6)


def test_another_config_is_refused_by_the_checkpoint_itself(finished, tiny_config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").unlink()
    (run / "metrics.json").unlink()
    with pytest.raises(UserError, match="seed: 0 in the checkpoint, 1 now"):
        train.train(tiny_config(seed=1), run)


def test_a_run_of_before_a_config_key_goes_on_where_nothing_hangs_on_the_key(
    tiny_config, tmp_path, monkeypatch
):
    """`augment_contrast` came when runs had long been made, with the contrast of PIL."""

    def without(config):
        return {key: x for key, x in to_dict(config).items() if key != "augment_contrast"}

    for name, augment in (("plain", "none"), ("augmented", "light1")):
        config = tiny_config(duration="1 step", augment=augment, **{"schedule.warmup": "0 steps"})
        monkeypatch.setattr(train, "to_dict", without)
        train.train(config, tmp_path / name)
        monkeypatch.undo()
        if name == "augmented":
            refusal = "augment_contrast: pil in the checkpoint, augreg now"
            with pytest.raises(UserError, match=refusal):
                train.train(config, tmp_path / name)
            config.augment_contrast = "pil"
        assert train.train(config, tmp_path / name)["step"] == 1


def test_a_run_that_ended_before_its_metrics_json_writes_it(finished, tiny_config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.json").unlink()
    train.train(tiny_config(), run)
    assert_same_run(finished, run, 6)


def test_config_json_runs_the_same_again(finished, tmp_path, capsys):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(finished / "config.json", again)
    assert main.main(["--config", str(again / "config.json")]) == 0
    assert f"workdir: {again}" in capsys.readouterr().out
    assert_same_run(finished, again, 6)


@pytest.mark.slow
def test_config_json_runs_the_same_again_in_another_process(finished, tmp_path, run, monkeypatch):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(finished / "config.json", again)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    code, output = run([sys.executable, "-m", "vit_jax.main", "--config", f"{again}/config.json"])
    assert code == 0, output
    assert_same_run(finished, again, 6)


def test_config_json_describes_the_run(finished, tiny_config):
    assert json.loads((finished / "config.json").read_text()) == to_dict(tiny_config())


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    original = program.train_step

    def poisoned(state, batch, **options):
        state, metrics = original(state, batch, **options)
        return state, metrics | {"loss": jax.numpy.where(state.step == 5, jax.numpy.nan, 1.0)}

    monkeypatch.setattr(program, "train_step", poisoned)
    with pytest.raises(UserError, match="loss is nan at step 5: stopped; step 4 is the last saved"):
        train.train(tiny_config(), tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoints/4").is_dir()
    assert not (tmp_path / "run/checkpoints/6").exists()
    # What went wrong can be mended and the run goes on from there.
    assert train.train(tiny_config(), tmp_path / "run")["step"] == 6


def test_a_damaged_checkpoint_is_passed_over(tiny_config, tmp_path, finished, capsys):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_until(tiny_config(), run, step=5)
    biggest = max(
        (run / "checkpoints/4").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    biggest.write_bytes(biggest.read_bytes()[:10])
    capsys.readouterr()
    train.train(tiny_config(), run)
    output = capsys.readouterr().out
    assert "checkpoint 4 is damaged" in output
    assert "continuing from step 2" in output
    assert_same_run(finished, run, 6)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_never_was(
    tiny_config, tmp_path, command, start, run
):
    config = tiny_config(
        duration="400 steps",
        log_every="3 steps",
        checkpoint_every="10 steps",
        **{"evals.val.every": "16 steps"},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = run(command(config, whole))
    assert code == 0, output
    seed = int(os.environ.get("KILL_SEED", time.time_ns()))
    print(f"KILL_SEED={seed} in the environment repeats the moments of these kills")
    chance = random.Random(seed)
    for kill in range(6):
        log = tmp_path / f"{kill}.log"
        process = start(command(config, killed), stdout=log.open("w"))
        target = chance.randint(3, 25)
        while process.poll() is None:
            saving = list((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
            if steps_done(log) >= target and (kill != 3 or saving):
                break
            time.sleep(0.0005 if kill == 3 else chance.uniform(0, 0.05))
        assert process.poll() is None, log.read_text()
        process.kill()
        process.wait()
        if kill == 3:
            assert list((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    code, output = run(command(config, killed))
    assert code == 0, output
    assert "continuing from step" in output
    assert_same_run(whole, killed, 400)


def steps_done(log):
    """How many steps this process has logged since it started or went on."""
    steps = [int(step) for step in re.findall(r"^step (\d+)/", log.read_text(), re.MULTILINE)]
    return steps[-1] - steps[0] if steps else 0


def test_evaluation_and_checkpoints_use_the_average(finished, tiny_config):
    """`finetune,DATA,512` turns averaging on, as tiny_config does."""
    arrays = read_arrays(finished, 6)
    kernels = {n: v for n, v in arrays.items() if n.endswith("['head']['kernel']")}
    (plain,) = (v for n, v in kernels.items() if n.startswith("['params']"))
    (average,) = (v for n, v in kernels.items() if n.startswith("['ema_params']"))
    assert (plain != average).any()
    loaded = load_pretrained(str(finished)).params["head"]["kernel"]
    np.testing.assert_array_equal(loaded, average)
    config = tiny_config()
    _, source = datasets.open_dataset("digits", data_dir=config.dataset.data_dir)
    model = create_model(config.model, num_classes=10)
    preprocessing = evaluation(config.dataset.protocol, config.dataset.image_size)
    (batch,) = pipeline.eval_batches(source, batch_size=355, preprocessing=preprocessing)
    params = load_pretrained(str(finished)).params
    logits = jax.jit(model.apply)({"params": params}, batch["image"])
    accuracy = float(np.mean(np.argmax(logits, -1) == batch["label"]))
    final = json.loads((finished / "metrics.json").read_text())
    assert final["accuracy"] == pytest.approx(accuracy, abs=1e-6)
