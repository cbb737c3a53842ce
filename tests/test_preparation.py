import csv
import json
import shutil
from collections import Counter

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from experiments import detection as shapes
from vit_jax import evaluate, recipes, train
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.config import check_config, to_dict
from vit_jax.data import classes
from vit_jax.errors import UserError

from .runs import assert_same_run, train_until


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


@pytest.mark.slow
def test_every_config_key_is_read(tiny_config, masked_config, tmp_path, monkeypatch):
    def short(make, **overrides):
        steps = {"duration": "1 step", "evals.val.every": "1 step", "schedule.warmup": "0 steps"}
        return make(**steps, **overrides)

    everything = {"augment": "light2", "dataset.subset": "50%", "patience": 1}
    everything |= {"evals.fewshot.dataset": "digits"}
    everything |= {"evals.fewshot.data_dir": tiny_config().dataset.data_dir}
    weights = str(tmp_path / "pretrain")
    tuned = short(tiny_config, init_from=weights, **{"distillation.teacher": weights})
    tuned.optimizer = recipes.finetune("ViT-B/16", "cifar10").optimizer
    shapes.write_folder(tmp_path / "shapes", {"train": 64, "test": 8}, 32, colored=True)
    boxes = {"objective": "detection", "dataset.name": f"folder:{tmp_path / 'shapes'}"}
    boxes |= {"dataset.image_size": 32, "detection.width": 8, "model.representation_size": 0}
    configs = {
        "pretrain": short(tiny_config, **everything),
        "finetune": tuned,
        "masked": short(masked_config),
        "detection": short(tiny_config, **boxes),
    }
    for config in configs.values():
        check_config(config)
        # Nothing reads these: the test must see it.
        config.surplus = config.dataset.surplus = 1
    read = read_by_running(
        [(config, tmp_path / name) for name, config in configs.items()], monkeypatch
    )
    sections = {key for key, part in configs["masked"].items() if isinstance(part, ConfigDict)}
    whole = {"evals", "model", "optimizer", "schedule"}
    keys = {f"{name}.{key}" for name in sections - whole for key in configs["masked"][name]}
    keys |= set(configs["masked"]) - sections | whole
    assert keys - read == {"surplus", "dataset.surplus"}


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
        ({"sharding": "zero"}, "sharding 'zero' is unknown: use replicated, fsdp, or"),
        ({"dataset.name": "no_such_data"}, "data set 'no_such_data' is not known to TFDS"),
        ({"dataset.name": "folder:/nowhere"}, "folder '/nowhere' does not exist: name one with"),
        ({"init_from": "/nowhere/model.npz"}, "/nowhere/model.npz does not exist"),
        ({"duration": "5 hours"}, "duration '5 hours' is not understood"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_leaves_no_folder(
    tiny_config, tmp_path, overrides, message
):
    with pytest.raises(UserError) as error:
        train.train(tiny_config(**overrides), tmp_path / "runs/mine")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_subset_is_what_epochs_are_of(tiny_config, tmp_path, capsys):
    # 577 of 1,442 images are 18 batches of 32; evaluation is on all 355.
    config = tiny_config(
        duration="0.12 epochs", **{"dataset.subset": "40%", "schedule.warmup": "0 steps"}
    )
    final = train.train(config, tmp_path / "run")
    assert "577 training images, 2 steps of 32" in capsys.readouterr().out
    assert (final["step"], final["examples"]) == (2, 355)
    assert "stopped_early" not in final


def make_images(folder, **counts):
    """PNGs of 8 x 8 pixels, so many of each class, whose classes differ a little."""
    rng = np.random.default_rng(0)
    for value, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(40 * value + rng.integers(0, 99, (8, 8, 3)), 0, 255)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def test_a_run_on_a_folder_of_classes_keeps_to_the_split_that_it_wrote(
    tiny_config, tmp_path, capsys
):
    data, stopped = tmp_path / "data", tmp_path / "stopped"
    make_images(data, iris=10, lily=10, rose=20)
    config = tiny_config(**{"dataset.name": f"folder:{data}", "dataset.holdout": 0.4})
    train.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until(config, stopped, step=3)
    with (stopped / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = {row["path"] for row in rows if row["split"] == "validation"}
    assert Counter(path.split("/")[0] for path in held_out) == {"iris": 4, "lily": 4, "rose": 8}
    assert len(rows) == 40 and all(row["path"].startswith(f"{row['class']}/") for row in rows)

    PIL.Image.new("RGB", (8, 8)).save(data / "iris" / "new.png")
    train.train(config, stopped)
    told = capsys.readouterr().out
    assert "it has no splits, so 24 images are to train on and 16 are held out" in told
    assert "1 left out that the run began without" in told
    assert_same_run(tmp_path / "whole", stopped, 6)

    found = tmp_path / "found.json"
    command = ["--checkpoint", str(stopped), "--dataset", f"folder:{data}", "--json", str(found)]
    assert evaluate.main(command) == 0
    assert "the images that the run held out are scored, 16" in capsys.readouterr().out
    final = json.loads((stopped / "metrics.json").read_text())
    scored = json.loads(found.read_text())
    assert scored["examples"] == final["examples"] == 16
    assert scored["accuracy"] == final["accuracy"]
    assert scored["loss"] == pytest.approx(final["loss"], rel=1e-5)

    (stopped / "metrics.json").unlink()
    (data / min(held_out)).unlink()
    with pytest.raises(UserError, match=f"split.csv are gone .{min(held_out)}.: restore them"):
        train.train(config, stopped)
    data.rename(tmp_path / "images")
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "images", data / split)
    with pytest.raises(UserError, match="the run divided .* itself, which has splits of its own"):
        train.train(config, stopped)
    shutil.rmtree(data)
    (tmp_path / "images").rename(data)
    (stopped / "split.csv").unlink()
    with pytest.raises(UserError, match=r"split.csv cannot be read: .*No such file"):
        train.train(config, stopped)


@pytest.mark.parametrize(
    ("counts", "overrides", "message"),
    [
        ({"rose": 4}, {}, "has one class alone, 'rose'"),
        ({"rose": 4, "iris": 4}, {"model.num_classes": 1}, "model.num_classes is 1 but folder:"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_leaves_no_workdir(
    tiny_config, tmp_path, counts, overrides, message
):
    make_images(tmp_path / "data", **counts)
    config = tiny_config(**{"dataset.name": f"folder:{tmp_path / 'data'}"}, **overrides)
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path / "runs/mine")
    assert not (tmp_path / "runs").exists()


def test_more_than_the_training_images_are_refused(tiny_config, tmp_path):
    config = tiny_config(**{"dataset.subset": "2000"})
    with pytest.raises(UserError, match="'2000' is 2,000 of the 1,442 images of train: it must"):
        train.train(config, tmp_path / "run")


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
