"""Runs of masked patch prediction."""

import json
import math
import re

import numpy as np
import pytest

from vit_jax import predict, train
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.data import datasets, pipeline
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError

from .runs import assert_same_run, checkpoint_steps, read_losses, read_metrics, train_until


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


@pytest.mark.slow
def test_pixels_have_no_accuracy_and_the_best_has_the_lowest_loss(masked_config, tmp_path, capsys):
    config = masked_config(**{"evals.val.every": "1 step", "masking.target": "pixels"})
    final = train.train(config, tmp_path / "run")
    output = capsys.readouterr().out.replace(str(tmp_path), "")
    assert "accuracy" not in output and "evaluated on 355 images of test: loss" in output
    losses = {r["step"]: r["eval_loss"] for r in read_metrics(tmp_path / "run") if "eval_loss" in r}
    best = min(losses, key=losses.get)
    assert final["best"]["step"] == best
    assert [p.name for p in (tmp_path / "run/best").glob("[0-9]*")] == [str(best)]


@pytest.mark.slow
def test_masked_patch_prediction_learns_more_than_how_often_colors_are(masked_config, tmp_path):
    config = masked_config(
        duration="150 steps",
        batch_size=64,
        log_every="50 steps",
        checkpoint_every="150 steps",
        **{
            "evals.val.every": "150 steps",
            "dataset.random_crop": False,
            "model.hidden_size": 32,
            "ema_decay": 0.0,
        },
    )
    final = train.train(config, tmp_path / "run")
    # The best that can be done without looking, on the test images, is the entropy of the targets.
    _, source = datasets.open_dataset("digits", data_dir=config.dataset.data_dir)
    (batch,) = pipeline.eval_batches(source, batch_size=355, preprocessing=evaluation("pad", 8))
    means = batch["image"][..., 0].reshape(355, 4, 2, 4, 2).mean((2, 4))  # The digits are gray.
    _, counts = np.unique(np.minimum(np.floor((means + 1) * 4), 7), return_counts=True)
    shares = counts / counts.sum()
    assert final["loss"] < -0.9 * np.sum(shares * np.log(shares))
