import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from vit_jax import metrics, predict, recipes, train
from vit_jax.checkpoints import integrity
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params, load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.config import ADDED_KEYS, check_config, migrate, to_dict
from vit_jax.data import classes, datasets, pipeline
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.models import create_model, prediction_defaults
from vit_jax.recipes import get_config
from vit_jax.sharding import state_sharding


def read_metrics(workdir):
    """metrics.jsonl without what the clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    timed = ("images_per_second", "device_days")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def read_costs(workdir):
    """The lines of metrics.jsonl that account for time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "device_days" in record]


def read_losses(workdir):
    return [r["loss"] for r in read_metrics(workdir) if "loss" in r]


def read_arrays(workdir, step):
    """Every array of a checkpoint, by its name."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(workdir / "checkpoints" / str(step) / "state")
    state["rng"] = jax.random.key_data(state["rng"])
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(first, second, step):
    expected, found = read_arrays(first, step), read_arrays(second, step)
    assert any("opt_state" in name for name in expected)
    assert any("ema_params" in name for name in expected)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name
    best, same_best = ([path.name for path in (run / "best").iterdir()] for run in (first, second))
    assert best == same_best
    assert read_metrics(first) == read_metrics(second)
    assert (first / "metrics.json").read_text() == (second / "metrics.json").read_text()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "finished"


@pytest.fixture
def finished(tiny_config, workdir):
    """A run of six steps, done once for all tests that only look at it."""
    if not workdir.exists():
        train.train(tiny_config(), workdir)
    return workdir


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
    original = metrics.Stopwatch
    monkeypatch.setattr(
        metrics, "Stopwatch", lambda earlier: starts.append(earlier) or original(earlier + 1000)
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


def test_a_finished_run_says_so(finished, tiny_config, capsys):
    before = (finished / "metrics.jsonl").read_text()
    final = train.train(tiny_config(), finished)
    assert "holds a finished run: nothing to do" in capsys.readouterr().out
    assert final == json.loads((finished / "metrics.json").read_text())
    assert (finished / "metrics.jsonl").read_text() == before


def test_fewshot_accuracy_is_measured_while_the_run_goes(finished, tiny_config, tmp_path, capsys):
    config = tiny_config(
        **{
            "fewshot.dataset": "digits",
            "fewshot.data_dir": tiny_config().dataset.data_dir,
            "fewshot.shots": "1,10",
            "fewshot.every": "3 steps",
        }
    )
    train.train(config, tmp_path / "run")
    names = {"fewshot/digits/1shot", "fewshot/digits/10shot"}
    found = [r for r in read_metrics(tmp_path / "run") if names <= r.keys()]
    assert [r["step"] for r in found] == [3, 6]
    for record in found:
        assert record.keys() == names | {"step"}
        assert 0.15 < record["fewshot/digits/1shot"] < record["fewshot/digits/10shot"] <= 1
    assert "step 3/6  few-shot accuracy on digits: 1-shot 0." in capsys.readouterr().out
    # It changes nothing else.
    others = [r for r in read_metrics(tmp_path / "run") if r not in found]
    assert others == read_metrics(finished)


def test_a_wrong_fewshot_data_set_is_refused_before_the_first_step(tiny_config, tmp_path):
    config = tiny_config(**{"fewshot.dataset": "flowers", "fewshot.data_dir": str(tmp_path)})
    with pytest.raises(UserError, match="data set 'flowers' is not known to TFDS"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_config_is_refused_with_what_differs(finished, tiny_config):
    config = tiny_config(**{"schedule.base_lr": 0.5, "model.num_layers": 3, "log_every": "3 steps"})
    with pytest.raises(UserError) as error:
        train.train(config, finished)
    assert "schedule.base_lr: 0.01 in the checkpoint, 0.5 now" in str(error.value)
    assert "model.num_layers: 1 in the checkpoint, 3 now" in str(error.value)
    assert "log_every" not in str(error.value)


@pytest.mark.parametrize("key", ADDED_KEYS)
def test_a_run_from_before_a_key_goes_on_with_what_it_did_then(tiny_config, tmp_path, key):
    saved = to_dict(tiny_config(augment="light1"))
    section, _, name = key.rpartition(".")
    del (saved[section] if section else saved)[name]
    saved = migrate(saved)
    config = tiny_config(**{"augment": "light1", key: ADDED_KEYS[key]})
    train._refuse_another_run(config, tmp_path, saved)
    config.update_from_flattened_dict({key: "another"})
    with pytest.raises(UserError, match=f"{key}: {ADDED_KEYS[key]} in the checkpoint, another now"):
        train._refuse_another_run(config, tmp_path, saved)


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


def test_a_run_of_when_numbers_were_sorted_as_text_goes_on_with_its_labels(
    tiny_config, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    for number in range(12):
        directory = tmp_path / "data" / "train" / str(number)
        directory.mkdir(parents=True)
        for i in range(4):
            pixels = np.clip(20 * number + rng.integers(0, 20, (8, 8, 3)), 0, 255)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{i}.png")
    config = tiny_config(
        **{"dataset.name": f"folder:{tmp_path / 'data'}", "dataset.eval_split": "train"}
    )
    with monkeypatch.context() as patch:
        patch.setattr(classes, "in_order", lambda names: tuple(sorted(names)))
        train.train(config, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            train_until(config, tmp_path / "stopped", step=3)
    train.train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 6)
    names = load_pretrained(str(tmp_path / "stopped")).class_names
    assert names == tuple(sorted(map(str, range(12))))
    # One that begins today has them in the order of their values.
    train.train(config, tmp_path / "new")
    names = load_pretrained(str(tmp_path / "new")).class_names
    assert names == tuple(map(str, range(12)))

    (tmp_path / "data/train/11").rename(tmp_path / "data/train/12")
    for run in ("stopped", "new"):
        (tmp_path / run / "metrics.json").unlink()
        with pytest.raises(UserError, match=f"{run} holds a run whose 12 classes are not the 12 "):
            train.train(config, tmp_path / run)


def test_a_run_that_ended_before_its_metrics_json_writes_it(finished, tiny_config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.json").unlink()
    train.train(tiny_config(), run)
    assert_same_run(finished, run, 6)


def test_config_json_runs_the_same_again(finished, tmp_path, run):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(finished / "config.json", again)
    main = [sys.executable, "-m", "vit_jax.main", "--config", str(again / "config.json")]
    code, output = run(main)
    assert code == 0, output
    assert f"workdir: {again}" in output
    assert_same_run(finished, again, 6)


def test_config_json_describes_the_run(finished, tiny_config):
    assert json.loads((finished / "config.json").read_text()) == to_dict(tiny_config())


def read_by_running(runs, monkeypatch):
    """Trains configs; returns the keys that each reads, by attribute, as dotted names.

    The check and the copy to JSON read every key, whatever becomes of it: they do not count. Nor
    does what takes a section as a whole, of which tests/test_config.py shows that it uses it all.
    """
    original, read = ConfigDict.__getattr__, set()
    for config, workdir in runs:
        plain = to_dict(config)
        names = {id(config): ""} | {
            id(part): f"{key}." for key, part in config.items() if isinstance(part, ConfigDict)
        }

        def recording(self, key, names=names):
            read.add(names.get(id(self), "unknown.") + key)
            return original(self, key)

        with monkeypatch.context() as patch:
            patch.setattr(train, "check_config", lambda config: None)
            patch.setattr(train, "to_dict", lambda config, plain=plain: plain)
            patch.setattr(ConfigDict, "__getattr__", recording)
            train.train(config, workdir)
    return read


def test_every_config_key_is_read(tiny_config, masked_config, tmp_path, monkeypatch):
    def short(make, **overrides):
        steps = {"duration": "1 step", "eval_every": "1 step", "schedule.warmup": "0 steps"}
        return make(**steps, **overrides)

    everything = {"augment": "light2", "dataset.subset": "50%", "patience": 1}
    everything |= {"fewshot.dataset": "digits", "fewshot.data_dir": tiny_config().dataset.data_dir}
    tuned = short(tiny_config, init_from=str(tmp_path / "pretrain"))
    tuned.optimizer = recipes.finetune("ViT-B/16", "cifar10").optimizer
    configs = {
        "pretrain": short(tiny_config, **everything),
        "finetune": tuned,
        "masked": short(masked_config),
    }
    for config in configs.values():
        check_config(config)
        # Nothing reads these: the test must see it.
        config.surplus = config.dataset.surplus = 1
    read = read_by_running(
        [(config, tmp_path / name) for name, config in configs.items()], monkeypatch
    )
    sections = {key for key, part in configs["masked"].items() if isinstance(part, ConfigDict)}
    whole = {"model", "optimizer", "schedule"}
    keys = {f"{name}.{key}" for name in sections - whole for key in configs["masked"][name]}
    keys |= set(configs["masked"]) - sections | whole
    assert keys - read == {"surplus", "dataset.surplus"}


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    original = train.train_step

    def poisoned(state, batch, **options):
        state, metrics = original(state, batch, **options)
        return state, metrics | {"loss": jax.numpy.where(state.step == 5, jax.numpy.nan, 1.0)}

    monkeypatch.setattr(train, "train_step", poisoned)
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


def train_until(config, workdir, step):
    """Trains and is interrupted by Ctrl-C before the update of a step."""
    original, calls = train.to_devices, []

    def interrupted(batches, mesh):
        for batch in original(batches, mesh):
            if "mask" not in batch:
                calls.append(None)
            if len(calls) == step:
                raise KeyboardInterrupt
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "to_devices", interrupted)
        train.train(config, workdir)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"batch_size": 30, "accumulate_steps": 4},
            "batch_size 30 does not divide evenly over 1 dev",
        ),
        ({"batch_size": 0}, "config.batch_size is 0: it must be at least 1"),
        ({"model.num_classes": 7}, "model.num_classes is 7 but digits has 10 classes"),
        (
            {"dataset.image_size": 10},
            "image_size 10 is not a multiple of patch_size 4: use 8 or 12",
        ),
        ({"schedule.warmup": "6 steps"}, "schedule.warmup is 6 steps but the run has 6"),
        ({"loss": "hinge"}, "loss 'hinge' is unknown"),
        ({"sharding": "zero"}, "sharding 'zero' is unknown: use replicated or fsdp"),
        ({"dataset.name": "no_such_data"}, "data set 'no_such_data' is not known to TFDS"),
        ({"dataset.name": "folder:/nowhere"}, "folder '/nowhere' has no train/"),
        ({"init_from": "/nowhere/model.npz"}, "/nowhere/model.npz does not exist"),
        ({"duration": "5 hours"}, "duration '5 hours' is not understood"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_leaves_no_checkpoint(
    tiny_config, tmp_path, overrides, message
):
    with pytest.raises(UserError) as error:
        train.train(tiny_config(**overrides), tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run/checkpoints").glob("[0-9]*"))


def test_a_workdir_that_cannot_be_written_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run is not writable .*choose another --workdir"):
        train.train(tiny_config(), tmp_path / "file/run")


def test_finetuning_from_a_run_replaces_its_head(tiny_config, tmp_path, finished, capsys):
    config = tiny_config(
        init_from=str(finished),
        duration="1 step",
        **{"dataset.image_size": 16, "model.representation_size": 0, "schedule.warmup": "0 steps"},
    )
    train.train(config, tmp_path / "run")
    output = capsys.readouterr().out
    for action in ("loaded", "resized", "dropped", "new"):
        assert action in output
    assert read_losses(tmp_path / "run")[0] == pytest.approx(math.log(10), rel=1e-5)


TINY_SIZES = {
    "patch_size": 4, "hidden_size": 16, "num_layers": 1, "mlp_dim": 32, "num_heads": 2
}  # fmt: skip


@pytest.fixture
def foreign_weights(tmp_path):
    """Weights of a model that differs from Google's in all that travels with them."""
    model = {"architecture": "vit", "num_classes": 3, **TINY_SIZES, "gelu": "erf"}
    model |= {"classifier": "gap", "layer_norm_epsilon": 1e-3}
    shapes = abstract_params(model, 8)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: noise.standard_normal(x.shape).astype(np.float32), shapes)
    model = prediction_defaults("vit") | model
    pretrained = Pretrained(params, model, evaluation("bit", 8), None, "softmax", "")
    save_pretrained(pretrained, tmp_path / "timm", "timm")
    return tmp_path / "timm"


def finetune_config(data_dir, init_from, **overrides):
    config = get_config("ViT-Ti/4", "finetune,digits")
    fixed = {f"model.{key}": value for key, value in TINY_SIZES.items()}
    fixed |= {"dataset.data_dir": data_dir, "dataset.image_size": 8, "dataset.protocol": "pad"}
    fixed |= {"batch_size": 32, "duration": "2 steps", "model.dtype": "float32"}
    fixed |= {"schedule.warmup": "1 step", "init_from": str(init_from)}
    config.update_from_flattened_dict(fixed | overrides)
    return config


def test_finetuning_takes_what_travels_with_the_weights(
    data_dir, tmp_path, foreign_weights, capsys
):
    config = finetune_config(data_dir, foreign_weights, checkpoint_every="1 step")
    with pytest.raises(KeyboardInterrupt):
        train_until(config, tmp_path / "run", step=2)
    expected = {"classifier": "gap", "gelu": "erf", "layer_norm_epsilon": 1e-3}
    expected |= {"position_embedding": "learned", "position_placement": "stem"}
    listed = ", ".join(f"{key} {value}" for key, value in expected.items())
    assert f"has it: {listed}\n" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert expected.items() <= saved.items()
    assert config.model.gelu is None  # The caller's stays as it was.
    # The first step has a rate of 0: the features are those of the weights, by their own model.
    first, weights = load_pretrained(tmp_path / "run"), load_pretrained(foreign_weights)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    features = [
        create_model(each.model, num_classes=0).apply({"params": each.params}, images)
        for each in (first, weights)
    ]
    np.testing.assert_allclose(*features, rtol=1e-5, atol=1e-5)
    # What was taken is in the checkpoint, so that the weights are not needed to go on.
    shutil.rmtree(foreign_weights)
    train.train(config, tmp_path / "run")
    assert "continuing from step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.gelu": "tanh"}, "model.gelu is tanh but .* was trained with erf: set --config.mo"),
        ({"model.layer_norm_epsilon": 1e-6}, "set --config.model.layer_norm_epsilon=0.001"),
        ({"model.position_embedding": "none"}, "none but .*: set --config.model.position_embedd"),
        ({"model.hidden_size": 32}, "model.hidden_size is 32 but .* was trained with 16: set"),
        ({"model.representation_size": 8}, "do not fit the model .* pre_logits/bias is missing"),
        ({"init_from": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_data_set_is_opened(
    data_dir, tmp_path, foreign_weights, monkeypatch, overrides, message
):
    monkeypatch.delattr(datasets, "open_dataset")
    config = finetune_config(data_dir, **({"init_from": foreign_weights} | overrides))
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path / "run")


def test_finetuning_without_weights_has_the_models_defaults(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_start", lambda *_: (None, None))
    monkeypatch.setattr(train, "_loop", lambda *_: {})
    train.train(finetune_config(data_dir, ""), tmp_path / "run")
    saved = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert prediction_defaults("vit").items() <= saved.items()


@pytest.fixture
def masked_config(tiny_config):
    """Six steps of masked patch prediction, of 2 x 2 pixels each."""

    def make(**overrides):
        fixed = {"objective": "masked_patches", "model.representation_size": 0}
        return tiny_config(**fixed, **{"model.patch_size": 2, **overrides})

    return make


@pytest.fixture(scope="module")
def masked_workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "masked"


@pytest.fixture
def masked_run(masked_config, masked_workdir):
    if not masked_workdir.exists():
        train.train(masked_config(), masked_workdir)
    return masked_workdir


def test_masked_patch_prediction_leaves_what_classification_does(masked_run):
    records = read_metrics(masked_run)
    # The head starts at zero, so that every one of the 512 colors has the same probability.
    assert records[0]["loss"] == pytest.approx(math.log(512), rel=1e-5)
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "exaflops"} < records[0].keys()
    assert [r["step"] for r in records if "eval_accuracy" in r] == [4, 6]
    final = json.loads((masked_run / "metrics.json").read_text())
    assert final["examples"] == 355
    assert final["best"]["accuracy"] >= final["accuracy"]
    # 16 patches and the class token; the head predicts 512 colors of half of them.
    layer = 17 * 16 * (4 * 16 + 2 * 32) + 2 * 17**2 * 16
    multiply_adds = 16 * (3 * 2**2) * 16 + layer + 8 * 16 * 512
    assert records[0]["exaflops"] == pytest.approx(6 * multiply_adds * 32 / 1e18, rel=1e-9)


def test_masked_patch_prediction_resumes_with_the_same_bits(masked_run, masked_config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_until(masked_config(), tmp_path / "run", step=5)
    assert checkpoint_steps(tmp_path / "run")
    train.train(masked_config(), tmp_path / "run")
    assert_same_run(masked_run, tmp_path / "run", 6)


def test_parts_of_the_batch_are_corrupted_each_on_its_own(masked_run, masked_config, tmp_path):
    config = masked_config(accumulate_steps=2, sharding="fsdp")
    train.train(config, tmp_path / "run")
    found, whole = read_losses(tmp_path / "run"), read_losses(masked_run)
    assert found[0] == pytest.approx(math.log(512), rel=1e-5)
    assert found[-1] == pytest.approx(whole[-1], rel=0.1)
    assert found[-1] != whole[-1]


def test_finetuning_from_masked_patch_prediction(masked_run, tiny_config, tmp_path, capsys):
    trunk = {"model.patch_size": 2, "model.representation_size": 0, "schedule.warmup": "0 steps"}
    config = tiny_config(init_from=str(masked_run), duration="1 step", **trunk)
    train.train(config, tmp_path / "run")
    output = capsys.readouterr().out
    rows = re.findall(r"^(loaded|resized|dropped|new) +\(.*\) +(\S+)", output, re.MULTILINE)
    actions = {name: action for action, name in rows}
    assert actions.pop("head/kernel") == actions.pop("head/bias") == "new"
    for name in ("mask_embedding", "patch_head/kernel", "patch_head/bias"):
        assert actions.pop(name) == "dropped"
    assert set(actions.values()) == {"loaded"}
    assert {"cls", "embedding/kernel", "Transformer/encoder_norm/scale"} < actions.keys()
    assert read_losses(tmp_path / "run")[0] == pytest.approx(math.log(10), rel=1e-5)


def test_masked_patch_prediction_knows_no_classes(masked_run):
    pretrained = load_pretrained(masked_run)
    assert pretrained.class_names is None
    assert pretrained.masked.keys() == {"mask_embedding", "patch_head"}
    assert not pretrained.params.keys() & pretrained.masked.keys()
    with pytest.raises(UserError, match="has no head, so it knows no classes: fine-tune it"):
        next(predict.classify(pretrained, ["image.png"], 1))


def test_pixels_have_no_accuracy_and_the_best_has_the_lowest_loss(masked_config, tmp_path, capsys):
    config = masked_config(eval_every="1 step", **{"masking.target": "pixels"})
    final = train.train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "accuracy" not in output and "evaluated on 355 images of test: loss" in output
    losses = {r["step"]: r["eval_loss"] for r in read_metrics(tmp_path / "run") if "eval_loss" in r}
    best = min(losses, key=losses.get)
    assert final["best"]["step"] == best
    assert [p.name for p in (tmp_path / "run/best").glob("[0-9]*")] == [str(best)]


def test_masked_patch_prediction_learns_more_than_how_often_colors_are(masked_config, tmp_path):
    config = masked_config(
        duration="150 steps",
        batch_size=64,
        log_every="50 steps",
        eval_every="150 steps",
        checkpoint_every="150 steps",
        **{"dataset.random_crop": False, "model.hidden_size": 32, "ema_decay": 0.0},
    )
    final = train.train(config, tmp_path / "run")
    # The best that can be done without looking, on the test images, is the entropy of the targets.
    _, source = datasets.open_dataset("digits", data_dir=config.dataset.data_dir)
    (batch,) = pipeline.eval_batches(source, batch_size=355, preprocessing=evaluation("pad", 8))
    means = batch["image"][..., 0].reshape(355, 4, 2, 4, 2).mean((2, 4))  # The digits are gray.
    _, counts = np.unique(np.minimum(np.floor((means + 1) * 4), 7), return_counts=True)
    shares = counts / counts.sum()
    assert final["loss"] < -0.9 * np.sum(shares * np.log(shares))


def checkpoint_steps(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_never_was(
    tiny_config, tmp_path, command, start, run
):
    config = tiny_config(
        duration="400 steps",
        log_every="3 steps",
        eval_every="16 steps",
        checkpoint_every="10 steps",
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


def progress(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def steps_done(log):
    """How many steps this process has logged since it started or went on."""
    steps = [int(step) for step in re.findall(r"^step (\d+)/", log.read_text(), re.MULTILINE)]
    return steps[-1] - steps[0] if steps else 0


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tiny_config, tmp_path, command, start, run):
    config = tiny_config(duration="60 steps", checkpoint_every="1000 steps", log_every="7 steps")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(command(config, whole))[0] == 0
    process = start(command(config, stopped))
    while progress(stopped) < 7:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saved step" in output
    assert "Traceback" not in output
    assert run(command(config, stopped))[0] == 0
    assert_same_run(whole, stopped, 60)


WIDE = {"model.hidden_size": 64, "model.mlp_dim": 256, "model.dropout_rate": 0.1}


def count_split_parameters(config):
    model = create_model(config.model, num_classes=10)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    sharding = state_sharding(params, AbstractMesh((8,), ("data",)), config.sharding)
    return sum("data" in s.spec for s in jax.tree.leaves(sharding))


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tiny_config, masked_config, tmp_path, command, run):
    mixed = {"augment": "medium2", **WIDE}
    runs = {
        "one": (tiny_config(**WIDE), 1),
        "eight": (tiny_config(**WIDE), 8),
        "fsdp": (tiny_config(sharding="fsdp", accumulate_steps=2, **WIDE), 8),
        "parts": (tiny_config(accumulate_steps=2, **WIDE), 1),
        "masked": (masked_config(**WIDE), 1),
        "masked_fsdp": (masked_config(sharding="fsdp", **WIDE), 8),
        "mixed": (tiny_config(**mixed), 1),
        "mixed eight": (tiny_config(**mixed), 8),
    }
    losses = {}
    for name, (config, devices) in runs.items():
        code, output = run(command(config, tmp_path / name), devices)
        assert code == 0, output
        assert f"on {devices} cpu device(s)" in output
        losses[name] = read_losses(tmp_path / name)
        assert len(losses[name]) == 6
        assert json.loads((tmp_path / name / "metrics.json").read_text())["examples"] == 355
    assert count_split_parameters(runs["fsdp"][0]) == 2  # The kernels of the MLP.
    np.testing.assert_allclose(losses["eight"], losses["one"], atol=1e-5)
    np.testing.assert_allclose(losses["masked_fsdp"], losses["masked"], atol=1e-5)
    np.testing.assert_allclose(losses["mixed eight"], losses["mixed"], atol=1e-5)
    # Parts draw their own dropout, so that these two compare with each other.
    np.testing.assert_allclose(losses["fsdp"], losses["parts"], atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_moves_between_numbers_of_devices(tiny_config, tmp_path, command, run):
    first = tiny_config(**WIDE)
    assert run(command(first, tmp_path / "one"))[0] == 0
    moved = tmp_path / "moved"
    with pytest.raises(KeyboardInterrupt):
        train_until(tiny_config(**WIDE), moved, step=5)
    code, output = run(command(tiny_config(sharding="fsdp", **WIDE), moved), 8)
    assert code == 0, output
    assert "continuing from step 4" in output
    np.testing.assert_allclose(read_losses(moved), read_losses(tmp_path / "one"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_two_processes_give_the_losses_of_one(tiny_config, tmp_path, command, start, run, sharding):
    first = tiny_config(duration="3 steps", **WIDE)
    assert run(command(first, tmp_path / "first"))[0] == 0
    config = tiny_config(init_from=str(tmp_path / "first"), sharding=sharding, **WIDE)
    config.fewshot.update({"dataset": "digits", "data_dir": config.dataset.data_dir, "shots": "5"})
    assert run(command(config, tmp_path / "one"))[0] == 0
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = ("--coordinator", address, "--num_processes", "2", "--process_id")
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    processes = [
        start(command(config, tmp_path / "two", *flags, str(i)), 2, stdout=log.open("w"))
        for i, log in enumerate(logs)
    ]
    assert [p.wait(300) for p in processes] == [0, 0], [log.read_text() for log in logs]
    assert "on 4 cpu device(s)" in logs[0].read_text()
    assert "step 1/6" not in logs[1].read_text()
    losses = [read_losses(tmp_path / name) for name in ("one", "two")]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
    final = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert final[0]["accuracy"] == final[1]["accuracy"]
    few = [read_metrics(tmp_path / name)[-1]["fewshot/digits/5shot"] for name in ("one", "two")]
    # The features differ by rounding: one image of 355 may be taken for another class.
    assert few[0] == pytest.approx(few[1], abs=2 / 355)


EVERYTHING = {
    "augment": "medium2",
    "dataset.subset": "40%",
    "eval_every": "1 step",
    "patience": 2,
    "duration": "30 steps",
}


def scripted(accuracies):
    """Stands for `evaluate`: gives these accuracies, one after the other."""
    values = iter(accuracies)
    return lambda *_: {"examples": 355, "accuracy": next(values), "loss": 1.0}


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


def test_a_subset_is_what_epochs_are_of(tiny_config, tmp_path, capsys):
    # 577 of 1,442 images are 18 batches of 32; evaluation is on all 355.
    config = tiny_config(
        duration="0.12 epochs", **{"dataset.subset": "40%", "schedule.warmup": "0 steps"}
    )
    final = train.train(config, tmp_path / "run")
    assert "577 training images, 2 steps of 32" in capsys.readouterr().out
    assert (final["step"], final["examples"]) == (2, 355)
    assert "stopped_early" not in final


def test_more_than_the_training_images_are_refused(tiny_config, tmp_path):
    config = tiny_config(**{"dataset.subset": "2000"})
    with pytest.raises(UserError, match="'2000' is 2,000 of the 1,442 images of train: it must"):
        train.train(config, tmp_path / "run")


def test_a_run_stops_when_its_patience_is_over(tiny_config, tmp_path, monkeypatch, capsys):
    config = tiny_config(**EVERYTHING)
    config.fewshot.update({"dataset": "digits", "data_dir": config.dataset.data_dir, "shots": "1"})
    run = tmp_path / "run"
    # Equal is not better; a better one gives new patience.
    accuracies = [0.2, 0.1, 0.3, 0.3, 0.25, 0.9]
    monkeypatch.setattr(train, "evaluate", scripted(accuracies))
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
    monkeypatch.setattr(train, "evaluate", scripted([0.5, 0.4, 0.3, 0.2]))
    with pytest.raises(KeyboardInterrupt):
        train_until(config, run, step=4)
    assert max(checkpoint_steps(run)) == 2
    # Two of the three remain after step 2.
    monkeypatch.setattr(train, "evaluate", scripted([0.3, 0.2]))
    final = train.train(config, run)
    assert (final["step"], final["best"]["step"], final["stopped_early"]) == (4, 1, True)
    # Killed between its last checkpoint and metrics.json.
    (run / "metrics.json").unlink()
    assert train.train(config, run) == final


def test_the_last_evaluation_does_not_stop_a_run_early(tiny_config, tmp_path, monkeypatch, capsys):
    config = tiny_config(**EVERYTHING | {"duration": "3 steps", "schedule.warmup": "1 step"})
    monkeypatch.setattr(train, "evaluate", scripted([0.5, 0.4, 0.3]))
    final = train.train(config, tmp_path / "run")
    assert (final["step"], final["stopped_early"]) == (3, False)
    assert "stopped: " not in capsys.readouterr().out


def test_patience_needs_evaluations(tiny_config, tmp_path):
    config = tiny_config(patience=3, eval_every="0 steps")
    with pytest.raises(UserError, match="patience is 3 but eval_every is '0 steps'"):
        train.train(config, tmp_path / "run")


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
    logits = model.apply({"params": params}, batch["image"])
    accuracy = float(np.mean(np.argmax(logits, -1) == batch["label"]))
    final = json.loads((finished / "metrics.json").read_text())
    assert final["accuracy"] == pytest.approx(accuracy, abs=1e-6)
