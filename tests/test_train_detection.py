"""Runs of detection on drawn shapes, where the right answer is known."""

import importlib.util
import json
import re
import socket

import numpy as np
import pytest

from experiments import detection as shapes
from vit_jax import detect, evaluate, predict, train
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.config import check_config
from vit_jax.data.datasets import open_evaluation
from vit_jax.errors import UserError
from vit_jax.evaluation.detection import truth

from .runs import WIDE, assert_same_run, checkpoint_steps, read_losses, read_metrics, train_until

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
)
SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write_folder(path, {"train": 96, "test": 24}, SIDE, colored=True)
    return path


@pytest.fixture
def detection_config(tiny_config, folder):
    """Six steps on the shapes, with a bit of everything that a run of digits has."""

    def make(**overrides):
        fixed = {
            "objective": "detection",
            "dataset.name": f"folder:{folder}",
            "dataset.image_size": SIDE,
            "dataset.protocol": "letterbox",
            "dataset.random_flip": True,
            "batch_size": 16,
            "detection.width": 16,
            "detection.layers": 1,
            "detection.upsample": 2,
            "detection.most_boxes": 5,
            "model.representation_size": 0,
        }
        return tiny_config(**{**fixed, **overrides})

    return make


@pytest.fixture
def trained(detection_config, tmp_path_factory):
    """A run of six steps, whatever it has learned."""
    workdir = tmp_path_factory.getbasetemp() / "detection" / "run"
    if not workdir.exists():
        config = detection_config(ema_decay=0.0)
        check_config(config)
        train.train(config, workdir)
    return workdir


def test_it_logs_and_is_judged_by_the_average_precision(trained):
    final = json.loads((trained / "metrics.json").read_text())
    assert {"AP", "AP50", "AP75", "examples"} <= final.keys() and final["examples"] == 24
    assert final["best"]["AP"] >= final["AP"] >= 0
    records = read_metrics(trained)
    assert {"loss", "grad_norm", "learning_rate"} < records[0].keys()
    assert {"eval_AP", "eval_AP50"} < records[-1].keys()
    losses = read_losses(trained)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_it_comes_close_to_what_can_be_found(tmp_path):
    """Stated before: of a ceiling of 1, at least 0.9 at an overlap of a half and 0.6 in all."""
    args = shapes.build_parser("").parse_args(["--small", "--workdir", str(tmp_path)])
    shapes.write_folder(tmp_path / "shapes", {"train": 1000, "test": 100}, colored=True)
    source = open_evaluation(f"folder:{tmp_path / 'shapes'}", split="test", has_boxes=True)
    assert shapes.ceiling(truth(source), (16, 16), shapes.SIDE).scalars()["AP"] > 0.99
    final = train.train(shapes.config_of(args, tmp_path / "shapes"), tmp_path / "run")
    assert final["AP50"] > 0.9 and final["AP"] > 0.6


@pytest.mark.slow
def test_it_resumes_with_the_same_bits(detection_config, tmp_path):
    train.train(detection_config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until(detection_config(), tmp_path / "run", step=5)
    assert checkpoint_steps(tmp_path / "run")
    train.train(detection_config(), tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


@pytest.mark.slow
def test_gradients_may_be_accumulated(detection_config, tmp_path):
    parts = detection_config(accumulate_steps=2, **{"model.dropout_rate": 0.0})
    whole = detection_config(**{"model.dropout_rate": 0.0})
    train.train(parts, tmp_path / "parts")
    train.train(whole, tmp_path / "alike")
    found, expected = (read_losses(tmp_path / x) for x in ("parts", "alike"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_devices_and_processes_give_the_losses_of_one(
    detection_config, tmp_path, command, run, start
):
    config = detection_config(augment="erase(0.5)", **WIDE)
    split = detection_config(augment="erase(0.5)", sharding="fsdp", **WIDE)
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
        np.testing.assert_allclose(read_losses(tmp_path / name), expected, rtol=1e-4)
        found = json.loads((tmp_path / name / "metrics.json").read_text())
        assert found["AP50"] == pytest.approx(final["AP50"], rel=0.1)
        assert found["examples"] == 24


@pytest.mark.slow
def test_it_begins_with_the_weights_of_classification_and_they_with_its(
    finished, detection_config, tiny_config, trained, tmp_path, capsys
):
    def actions():
        rows = re.findall(
            r"^(loaded|resized|dropped|new) +\(.*\) +(\S+)", capsys.readouterr().out, re.M
        )
        return {name: action for action, name in rows}

    train.train(detection_config(init_from=str(finished)), tmp_path / "run")
    found = actions()
    heads = {name: action for name, action in found.items() if name.startswith("detection_head/")}
    assert set(heads.values()) == {"new"} and "detection_head/classes/kernel" in heads
    assert found["head/kernel"] == found["pre_logits/kernel"] == "dropped"
    assert found["Transformer/encoder_norm/scale"] == "loaded"
    change = {"model.representation_size": 0, "dataset.image_size": 16}
    train.train(tiny_config(init_from=str(trained), **change), tmp_path / "back")
    found = actions()
    assert found["detection_head/classes/kernel"] == "dropped" and found["head/kernel"] == "new"


@pytest.mark.slow
def test_lora_changes_the_trunk_and_trains_the_head(finished, detection_config, tmp_path):
    config = detection_config(init_from=str(finished), **{"lora.rank": 2, "ema_decay": 0.0})
    check_config(config)
    train.train(config, tmp_path / "run")
    losses = read_losses(tmp_path / "run")
    assert losses[-1] < losses[0]
    pretrained = load_pretrained(tmp_path / "run")
    assert pretrained.detection.params["classes"]["kernel"].any()
    assert "lora" not in pretrained.params


def test_it_knows_no_classes_of_images(trained):
    pretrained = load_pretrained(trained)
    assert pretrained.class_names is None and pretrained.model["num_classes"] == 0
    assert pretrained.detection.class_names == shapes.CLASSES
    assert pretrained.detection.shape.upsample == 2
    assert "detection_head" not in pretrained.params
    with pytest.raises(UserError, match="predicts the classes of objects, none of whole images"):
        next(predict.classify(pretrained, ["image.png"], 1))


def test_evaluate_measures_what_the_run_does(trained, folder, tmp_path, capsys):
    result = tmp_path / "result.json"
    flags = ["--checkpoint", str(trained), "--dataset", f"folder:{folder}", "--split", "test"]
    report = ["--json", str(result), "--per_class", "--report", str(tmp_path / "report")]
    assert evaluate.main([*flags, *report]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^AP50 +[01]\.\d{4}$", printed, re.M)
    assert re.search(r"^triangle +[01]\.\d{4} +[01]\.\d{4} +\d+$", printed, re.M)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"boxes.png", "per_class.csv"}
    measured = json.loads(result.read_text())
    final = json.loads((trained / "metrics.json").read_text())
    assert 0 < final["AP50"] == pytest.approx(measured["AP50"], rel=0.02)


def test_other_commands_say_what_they_want(trained, finished, folder, tmp_path):
    flags = ["--dataset", f"folder:{folder}", "--split", "test"]
    for more in (["--fewshot", "1"], ["--among", "dataset"]):
        with pytest.raises(UserError, match="leave --fewshot, --confusion and --among out"):
            evaluate.main(["--checkpoint", str(trained), *flags, *more])
    words = [str(folder / "test"), "--output", str(tmp_path / "found")]
    with pytest.raises(UserError, match="finds no objects: train it with --config detection:"):
        detect.main(["--checkpoint", str(finished), *words])
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("augment", "light1", "objective detection moves and mixes no boxes with it"),
        ("augment", "mixup(0.2)", "objective detection moves and mixes no boxes with it"),
        ("loss", "sigmoid", "set --config.loss=softmax"),
        ("keep_head", "auto", "set --config.keep_head=never"),
        ("label_smoothing", 0.1, "add --config.label_smoothing=0"),
        ("class_weights", "balanced", "add --config.class_weights=''"),
        ("dataset.sampling", "balanced", "add --config.dataset.sampling=''"),
        ("model.representation_size", 16, "add --config.model.representation_size=0"),
        ("distillation.teacher", "runs/a", "a teacher's classes are learned with classification"),
        ("detection.upsample", 3, "config.detection.upsample is 3: it must be 1, 2 or 4"),
        ("detection.width", 0, "config.detection.width is 0: it must be at least 1"),
        ("detection.most_boxes", 0, "config.detection.most_boxes is 0: it must be at least 1"),
    ],
)
def test_what_it_would_not_read_is_refused(detection_config, key, value, message):
    check_config(detection_config(augment="erase(0.25)"))
    with pytest.raises(UserError, match=message):
        check_config(detection_config(**{key: value}))


def test_images_of_more_objects_than_are_learned_are_told_of(detection_config, tmp_path, capsys):
    config = detection_config(duration="1 step", **{"detection.most_boxes": 1})
    config.schedule.warmup = "0 steps"
    train.train(config, tmp_path / "run")
    told = r"\d+ of 96 images have more than 1 objects, up to 3: the largest are learned, all with "
    assert re.search(told + r"--config.detection.most_boxes=3", capsys.readouterr().out)


def test_without_pycocotools_a_run_does_not_begin(detection_config, tmp_path, monkeypatch):
    from vit_jax.evaluation import detection

    monkeypatch.setattr(detection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="config.evals.val: the average precision .*pip install"):
        train.train(detection_config(), tmp_path / "run")
