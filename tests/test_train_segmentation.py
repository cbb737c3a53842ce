"""Runs of segmentation on drawn shapes, where the right answer is known."""

import json
import re
import socket

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import jaccard_score

from experiments import segmentation as shapes
from vit_jax import evaluate, predict, segment, train
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.config import check_config
from vit_jax.errors import UserError
from vit_jax.mixing import erase
from vit_jax.steps import pixels_to_inputs

from .runs import WIDE, assert_same_run, checkpoint_steps, read_losses, read_metrics, train_until

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write_folder(path, {"train": 96, "test": 24}, SIDE, colored=True)
    return path


@pytest.fixture
def segmentation_config(tiny_config, folder):
    """Six steps on the shapes, with a bit of everything that a run of digits has."""

    def make(**overrides):
        fixed = {
            "objective": "segmentation",
            "dataset.name": f"folder:{folder}",
            "dataset.image_size": SIDE,
            "dataset.random_flip": True,
            "batch_size": 16,
            "model.representation_size": 0,
        }
        return tiny_config(**{**fixed, **overrides})

    return make


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "segmentation"


@pytest.fixture
def segmented(segmentation_config, workdir):
    """A run that has learned the colors of the shapes."""
    if not workdir.exists():
        config = segmentation_config(
            duration="300 steps",
            log_every="100 steps",
            checkpoint_every="300 steps",
            ema_decay=0.0,
            **{
                "evals.val.every": "300 steps",
                "model.hidden_size": 32,
                "model.dropout_rate": 0.0,
                "optimizer.weight_decay": 0.0,
                "schedule.warmup": "10 steps",
            },
        )
        check_config(config)
        train.train(config, workdir)
    return workdir


def masks_of(folder, split="test"):
    paths = sorted((folder / split / "masks").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_it_comes_close_to_what_logits_of_patches_can_do(segmented, folder):
    shares, fitted = shapes.ceilings(masks_of(folder), 4)
    assert 0.8 < shares < fitted < 1
    final = json.loads((segmented / "metrics.json").read_text())
    assert final["mIoU"] > 0.9 * shares
    assert final["pixel_accuracy"] > 0.95
    assert final["best"]["mIoU"] >= final["mIoU"]
    records = read_metrics(segmented)
    assert {"loss", "accuracy", "grad_norm", "learning_rate"} < records[0].keys()
    assert {"eval_mIoU", "eval_pixel_accuracy", "eval_loss"} < records[-1].keys()


def test_the_commands_measure_what_scikit_learn_does(segmented, folder, tmp_path, capsys):
    result, output = tmp_path / "result.json", tmp_path / "masks"
    flags = ["--checkpoint", str(segmented), "--dataset", f"folder:{folder}", "--split", "test"]
    report = ["--json", str(result), "--per_class", "--report", str(tmp_path / "report")]
    assert evaluate.main([*flags, *report, "--confusion", str(tmp_path / "pixels.npz")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mIoU +0\.\d{4}$", printed, re.M)
    assert re.search(r"^pixel accuracy +0\.\d{4}$", printed, re.M)
    assert re.search(r"^triangle +0\.\d{4} +\d+$", printed, re.M)
    images = str(folder / "test" / "images")
    assert segment.main(["--checkpoint", str(segmented), images, "--output", str(output)]) == 0
    paths = sorted(output.glob("*.png"))
    assert len(paths) == 24 == len(list(output.glob("*.overlay.jpg")))
    assert {Image.open(path).mode for path in paths} == {"P"}
    predicted = np.stack([np.asarray(Image.open(path)) for path in paths])
    expected = jaccard_score(masks_of(folder).ravel(), predicted.ravel(), average=None)
    found = json.loads(result.read_text())
    np.testing.assert_allclose([row["iou"] for row in found["per_class"]], expected, rtol=2e-3)
    assert found["mIoU"] == pytest.approx(expected.mean(), rel=2e-3)
    confusion = np.load(tmp_path / "pixels.npz")["confusion"]
    assert confusion.sum() == 24 * SIDE * SIDE
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"masks.png", "per_class.csv"}


@pytest.mark.slow
def test_it_resumes_with_the_same_bits(segmentation_config, tmp_path):
    train.train(segmentation_config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until(segmentation_config(), tmp_path / "run", step=5)
    assert checkpoint_steps(tmp_path / "run")
    train.train(segmentation_config(), tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_gradients_may_be_accumulated(segmentation_config, tmp_path):
    parts = segmentation_config(accumulate_steps=2, **{"model.dropout_rate": 0.0})
    whole = segmentation_config(**{"model.dropout_rate": 0.0})
    train.train(parts, tmp_path / "parts")
    train.train(whole, tmp_path / "alike")
    found, expected = (read_losses(tmp_path / x) for x in ("parts", "alike"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_devices_and_processes_give_the_losses_of_one(
    segmentation_config, tmp_path, command, run, start
):
    config = segmentation_config(augment="erase(0.5)", **WIDE)
    split = segmentation_config(augment="erase(0.5)", sharding="fsdp", **WIDE)
    assert run(command(config, tmp_path / "one"))[0] == 0
    code, output = run(command(split, tmp_path / "four"), 4)
    assert code == 0 and "on 4 cpu device(s)" in output, output
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = ("--coordinator", address, "--num_processes", "2", "--process_id")
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    processes = [
        start(command(split, tmp_path / "two", *flags, str(i)), 2, stdout=log.open("w"))
        for i, log in enumerate(logs)
    ]
    assert [p.wait(300) for p in processes] == [0, 0], [log.read_text() for log in logs]
    expected = read_losses(tmp_path / "one")
    final = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert final["examples"] == 24  # The last batch of 16 is padded.
    for name in ("four", "two"):
        np.testing.assert_allclose(read_losses(tmp_path / name), expected, atol=1e-5)
        found = json.loads((tmp_path / name / "metrics.json").read_text())
        assert found["mIoU"] == pytest.approx(final["mIoU"], abs=1e-3)
        assert found["examples"] == 24


def test_erasing_takes_pixels_of_images_and_leaves_their_masks():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8),
        "label": rng.integers(0, 4, (8, 16, 16)).astype(np.uint8),
    }
    erased = erase(jax.random.key(0), batch, 1.0)
    np.testing.assert_array_equal(erased["label"], batch["label"])
    difference = np.abs(erased["image"] - pixels_to_inputs(batch["image"]))
    changed = (np.asarray(difference) > 1e-5).any(-1).mean((1, 2))
    assert (changed > 0).all() and changed.max() < 0.5


def test_it_begins_with_the_weights_of_classification_and_they_with_its(
    finished, segmentation_config, tiny_config, tmp_path, capsys
):
    def actions():
        rows = re.findall(
            r"^(loaded|resized|dropped|new) +\(.*\) +(\S+)", capsys.readouterr().out, re.M
        )
        return {name: action for action, name in rows}

    train.train(segmentation_config(init_from=str(finished)), tmp_path / "run")
    found = actions()
    assert found.pop("segmentation_head/kernel") == found.pop("segmentation_head/bias") == "new"
    assert {name for name, action in found.items() if action == "dropped"} == {
        "head/bias",
        "head/kernel",
        "pre_logits/bias",
        "pre_logits/kernel",
    }
    assert found["Transformer/encoder_norm/scale"] == "loaded"
    assert read_losses(tmp_path / "run")[0] == pytest.approx(np.log(4), rel=1e-5)
    change = {"model.representation_size": 0, "dataset.image_size": 16}
    train.train(tiny_config(init_from=str(tmp_path / "run"), **change), tmp_path / "back")
    found = actions()
    assert found["segmentation_head/kernel"] == "dropped" and found["head/kernel"] == "new"


def test_it_knows_no_classes_of_images(segmented):
    pretrained = load_pretrained(segmented)
    assert pretrained.class_names is None and pretrained.model["num_classes"] == 0
    assert pretrained.segmentation.class_names == shapes.CLASSES
    assert "segmentation_head" not in pretrained.params
    with pytest.raises(UserError, match="predicts the classes of pixels, none of whole images"):
        next(predict.classify(pretrained, ["image.png"], 1))


def test_other_commands_say_what_they_want(segmented, finished, folder, tmp_path):
    flags = ["--dataset", f"folder:{folder}", "--split", "test"]
    with pytest.raises(UserError, match="leave --fewshot and --among out"):
        evaluate.main(["--checkpoint", str(segmented), *flags, "--fewshot", "1"])
    output = ["--output", str(tmp_path / "masks")]
    images = str(folder / "test" / "images")
    with pytest.raises(UserError, match="tells no pixels apart: train it with --config segmentat"):
        segment.main(["--checkpoint", str(finished), images, *output])
    twice = [images, str(folder / "train" / "images")]
    with pytest.raises(UserError, match="have masks of one name: segment them into folders"):
        segment.main(["--checkpoint", str(segmented), *twice, *output])
    (folder / "classes.txt").rename(tmp_path / "classes.txt")
    try:
        with pytest.raises(UserError, match="class 0 of folder:.* is '0', and .* has 'background'"):
            evaluate.main(["--checkpoint", str(segmented), *flags])
    finally:
        (tmp_path / "classes.txt").rename(folder / "classes.txt")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("augment", "light1", "objective segmentation moves and mixes no masks with it"),
        ("augment", "mixup(0.2)", "objective segmentation moves and mixes no masks with it"),
        ("loss", "sigmoid", "add --config.loss=softmax|set --config.loss=softmax"),
        ("keep_head", "auto", "set --config.keep_head=never"),
        ("label_smoothing", 0.1, "add --config.label_smoothing=0"),
        ("class_weights", "balanced", "add --config.class_weights=''"),
        ("dataset.sampling", "balanced", "add --config.dataset.sampling=''"),
        ("model.representation_size", 16, "add --config.model.representation_size=0"),
        ("distillation.teacher", "runs/a", "a teacher's classes are learned with classification"),
    ],
)
def test_what_it_would_not_read_is_refused(segmentation_config, key, value, message):
    check_config(segmentation_config(augment="erase(0.25)"))
    with pytest.raises(UserError, match=message):
        check_config(segmentation_config(**{key: value}))


def test_lora_changes_the_trunk_and_trains_the_decoder(finished, segmentation_config, tmp_path):
    config = segmentation_config(init_from=str(finished), **{"lora.rank": 2, "ema_decay": 0.0})
    check_config(config)
    final = train.train(config, tmp_path / "run")
    assert final["loss"] < np.log(4)
    pretrained = load_pretrained(tmp_path / "run")
    assert pretrained.segmentation.params["kernel"].any()
    assert "lora" not in pretrained.params
