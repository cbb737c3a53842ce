"""`vit-jax train --data PATH --init WEIGHTS`: what it chooses, says, and repeats."""

import dataclasses
import json
import re
import shlex
import sys
import types

import jax
import numpy as np
import pytest

from vit_jax import command, config_files, main, own_images, train
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params, load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.config import check_config, read_config, to_dict
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.models import describe, model_config, prediction_defaults
from vit_jax.recipes import TABLE_4, get_config, own
from vit_jax.recipes.own import Facts

from .sources import png

NAMES = ("daisy", "iris", "rose")


@pytest.fixture
def photos(tmp_path):
    """Two images to train on and one to evaluate on, of each of three classes."""
    noise = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "test") for name in NAMES):
        directory = tmp_path / "my photos" / split / name
        directory.mkdir(parents=True)
        for index in range(2 if split == "train" else 1):
            pixels = noise.integers(0, 256, (8, 8, 3), np.uint8)
            (directory / f"{index}.png").write_bytes(png(pixels))
    return tmp_path / "my photos"


@pytest.fixture
def weights(tmp_path):
    """Of a model without a name of its own, for images of 8 pixels."""
    model = prediction_defaults("vit") | {
        "architecture": "vit", "patch_size": 4, "hidden_size": 16, "num_layers": 1,
        "mlp_dim": 32, "num_heads": 2, "num_classes": 4, "representation_size": 0, "gelu": "erf",
    }  # fmt: skip
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: noise.standard_normal(x.shape).astype(np.float32), abstract_params(model, 8)
    )
    names = ("rose", "tulip", "iris", "daisy")
    pretrained = Pretrained(params, model, evaluation("bit", 8), names, "softmax", "")
    save_pretrained(pretrained, tmp_path / "w.npz", "official")
    return tmp_path / "w.npz"


def choose(photos, weights, tmp_path, *flags):
    parser = command.Parser(prog="train")
    return own_images.choose(str(photos), str(weights), flags, str(tmp_path / "run"), parser)


def facts(num_images=720, name="ViT-Ti/16", **changes):
    model = describe({**prediction_defaults("vit"), **model_config(name), "num_classes": 0})
    found = Facts(num_images, 224, model, on_cpu=True, devices=1, memory=8 << 30)
    return found._replace(**changes)


def values(found, **options):
    choices = own.choices(found, own.batch_size(found), **options)
    return {key: value for key, value, _ in choices}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--config.batch_size=4", "--config.schedule.base_lr=0.02", "--config.augment=light1"),
        ("--config.duration=3 steps", "--config.dataset.random_flip=false", "--config.seed=7"),
        ("--config.schedule.drops=(0.5,0.75)", "--config.evals.more.type=classification"),
    ],
)
def test_the_command_that_it_prints_makes_the_same_config(photos, weights, tmp_path, flags):
    chosen = choose(photos, weights, tmp_path, *flags)
    check_config(chosen.loaded.config)
    program, train_, *words = shlex.split(chosen.lines[-1])
    assert (program, train_, words[0]) == ("vit-jax", "train", "--config")
    again = config_files.load(words[1], words[2:])
    assert to_dict(again.config) == to_dict(chosen.loaded.config)
    for flag in flags:
        key, _, value = flag.removeprefix("--config.").partition("=")
        found = again.config[key] if "." not in key else None
        assert found is None or str(found) == value
        assert chosen.loaded.sources[key] == "command line"


def test_what_is_chosen_is_that_of_the_weights_and_said_with_its_reason(photos, weights, tmp_path):
    chosen = choose(photos, weights, tmp_path)
    config = chosen.loaded.config
    model = {"patch_size": 4, "hidden_size": 16, "num_layers": 1, "mlp_dim": 32, "num_heads": 2}
    assert model.items() <= config.model.to_dict().items()
    assert (config.dataset.image_size, config.keep_head, config.batch_size) == (8, "auto", 8)
    text = "\n".join(chosen.lines)
    assert "chosen for 6 training images of 3 classes" in text
    for key, value in (("batch_size", 8), ("duration", "200 steps"), ("model.dtype", "float32")):
        assert re.search(rf"^  {key} {value}  +\S", text, re.M)
    explained = config_files.explain(chosen.loaded)
    assert re.search(r"^config.duration = '200 steps' +# 10 epochs, from 200 to", explained, re.M)


def test_the_channels_of_the_weights_are_chosen_and_said(photos, weights, tmp_path):
    gray = load_pretrained(weights)
    kernel = gray.params["embedding"]["kernel"]
    gray.params["embedding"]["kernel"] = kernel[:, :, :1]
    view = gray.preprocessing.with_channels(1)
    save_pretrained(dataclasses.replace(gray, preprocessing=view), tmp_path / "g.npz", "official")
    chosen = choose(photos, tmp_path / "g.npz", tmp_path)
    assert chosen.loaded.config.dataset.channels == 1
    assert re.match("  dataset.channels 1  +as the weights have it", chosen.lines[1])
    assert "dataset.channels" not in "".join(choose(photos, weights, tmp_path).lines)


def test_the_same_command_goes_on_with_what_was_chosen_first(
    photos, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "_finish", lambda *_: {})
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # The command's stays.
    flags = ["--data", str(photos), "--init", str(weights), "--workdir", str(tmp_path / "run")]
    assert main.main([*flags, "--config.seed=3"]) == 0
    output = capsys.readouterr().out
    assert "the head is kept: 3 of the 4 classes" in output
    begun = read_config(str(tmp_path / "run/config.json"))
    # More images would have had more steps, and the weights may be gone.
    for index in range(2, 40):
        (photos / f"train/iris/{index}.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    weights.unlink()
    again = choose(photos, weights, tmp_path, "--config.seed=3")
    assert to_dict(again.loaded.config) == to_dict(begun)
    assert "run began with" in again.lines[0]
    monkeypatch.chdir(photos.parent)
    for path in (f"{photos}/", "my photos", "../" + photos.parent.name + "/my photos//"):
        assert choose(path, weights, tmp_path).loaded.config.dataset.name == f"folder:{photos}"
    # Other weights are another run.
    with pytest.raises(UserError, match="does not exist"):
        choose(photos, tmp_path / "other.npz", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "B_16"], "--init goes with --data; with --config it is --config.init_from=W"),
        (["--data", "x", "--config", "b16"], "--data chooses a config, and --config names one"),
        (["--data", "/nowhere", "--init", "B_16"], "/nowhere"),
        (["--data", "{photos}"], "--init is missing, the weights to begin with: for example"),
        (["--data", "{photos}", "--init", "/no/a.npz"], "/no/a.npz does not exist: give"),
        (
            ["--data", "{photos}", "--init", "{weights}", "--config.init_from=B_16"],
            "--config.init_from and --config.dataset.name are what --init and --data say",
        ),
        (["--data", "{photos}", "--init", "{weights}", "--config.seeds=1"], "mean config.seed?"),
        *[
            (["--data", "{photos}", "--init", "{weights}", f"--config.{key}={value}"],
             f"config.{key} is {value}: it must")
            for key, value in (("batch_size", "0"), ("batch_size", "-4"), ("dataset.holdout", 7.0))
        ],
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_written(photos, weights, tmp_path, flags, message):
    flags = [flag.format(photos=photos, weights=weights) for flag in flags]
    with pytest.raises(UserError, match=re.escape(message)):
        main.main([*flags, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there_is_told_before_the_weights_are_read(tmp_path):
    (tmp_path / "w.npz").write_text("no weights")
    flags = [f"--config.init_from={tmp_path / 'w.npz'}", "--workdir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="folder '/nowhere/photos' does not exist"):
        main.main(["--config", "b16:finetune,folder:/nowhere/photos", *flags])


@pytest.mark.parametrize(
    ("data", "workdir"),
    [("/data/my flowers/", "runs/my-flowers"), ("a/../b.csv", "runs/b"), ("/", "runs/own")],
)
def test_the_default_workdir_is_named_after_the_images(data, workdir):
    assert own_images.default_workdir(data) == workdir


def test_the_recipe_on_its_own_is_table_4_that_keeps_the_head():
    expected = to_dict(get_config("ViT-B/16", "finetune,folder:/data"))
    assert to_dict(get_config("ViT-B/16", "own,folder:/data")) == expected | {"keep_head": "auto"}


def test_an_accelerator_has_table_4_with_the_steps_of_bit_hyperrule():
    row = TABLE_4["oxford_flowers102"]
    found = values(facts(2040, "ViT-B/16", on_cpu=False, memory=0))
    assert found["duration"] == f"{row.steps} steps"
    assert found["schedule.warmup"] == f"{row.warmup_steps} steps"
    assert (found["batch_size"], found["dataset.image_size"]) == (512, 384)
    assert found["schedule.base_lr"] == 0.03
    # Section 3.3 of 1912.11370: below 20,000, below 500,000, and above.
    for images, steps in ((19_999, 500), (20_000, 10_000), (499_999, 10_000), (500_000, 20_000)):
        assert values(facts(images, on_cpu=False))["duration"] == f"{steps} steps"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"batch_size": 32, "duration": "225 steps", "schedule.warmup": "22 steps"}),
        ({"num_images": 5}, {"batch_size": 8, "duration": "200 steps"}),
        ({"num_images": 100_000}, {"duration": "2000 steps", "schedule.base_lr": 0.01}),
        ({"image_size": 384}, {"dataset.image_size": 224}),
        ({"num_images": 100, "on_cpu": False}, {"batch_size": 64, "schedule.base_lr": 0.01}),
        ({"on_cpu": False, "image_size": 518}, {"dataset.image_size": 518}),
        ({"image_size": "160x480"}, {"dataset.image_size": "160x480"}),
        ({"on_cpu": False, "image_size": 32}, {"dataset.image_size": 32}),
        ({"on_cpu": False, "name": "ViT-H/14"}, {"dataset.image_size": 378}),
        ({"devices": 3}, {"batch_size": 33}),
        # B/16 at 224 keeps 7.5 MB of a layer and image in 16 bits.
        ({"name": "ViT-B/16", "memory": 4 << 30}, {"accumulate_steps": 4}),
        ({"name": "ViT-B/16", "memory": 400 << 30}, {"accumulate_steps": None}),
    ],
)
def test_what_depends_on_images_weights_and_machine(changes, expected):
    found = values(facts(**changes))
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("capability", "dtype"), [("7.0", "float32"), ("7.5", "float32"), ("8.0", None), ("12.0", None),
                              ("gfx90a", None), (None, None)]
)  # fmt: skip
def test_a_gpu_without_bfloat16_computes_in_float32(capability, dtype):
    device = types.SimpleNamespace(compute_capability=capability) if capability else object()
    has_bfloat16 = own_images._has_bfloat16(device)
    assert has_bfloat16 == (dtype is None)
    found = values(facts(on_cpu=False, has_bfloat16=has_bfloat16))
    assert found.get("model.dtype") == dtype


def test_memory_is_that_of_what_the_user_has_said():
    # ViT-B/16 at 384 pixels keeps 35 MB of a layer and image in 16 bits: 122 images fit.
    found = facts(2040, "ViT-B/16", on_cpu=False, memory=80 << 30)
    parts = {
        (size, dtype): values(found, image_size=size, dtype=dtype).get("accumulate_steps", 1)
        for size in (None, 384, 192, "192x384")
        for dtype in (None, "float32")
    }
    assert parts[None, None] == parts[384, None] == 8
    assert parts[384, "float32"] == 16
    assert (parts[192, None], parts["192x384", None]) == (1, 2)


def test_the_choices_for_any_circumstances_pass_the_check():
    for images in (1, 7, 33, 3000, 10**6):
        for on_cpu in (True, False):
            found = facts(images, on_cpu=on_cpu, devices=4)
            config = get_config("ViT-Ti/16", "own,folder:/data")
            config.update_from_flattened_dict({**values(found), "init_from": "w.npz"})
            check_config(config)
            parts = config.get("accumulate_steps")
            assert config.batch_size % (found.devices * parts) == 0


def test_steps_of_the_users_have_a_warmup_and_intervals_that_fit():
    for steps in (1, 3, 1000):
        found = values(facts(), steps=steps)
        assert "duration" not in found
        assert int(found["schedule.warmup"].split()[0]) < steps
        assert 1 <= int(found["evals.val.every"].split()[0]) <= steps
    assert json.dumps(found)
