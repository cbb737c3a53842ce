"""Runs on images of several labels, and runs that balance their classes."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn import metrics

from vit_jax import evaluate, predict, train
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.config import check_config
from vit_jax.data import datasets
from vit_jax.data.preprocess import eval_view
from vit_jax.errors import UserError
from vit_jax.inference import VisionModel

from .runs import assert_same_run, read_metrics, train_until
from .sources import InMemory, png

NAMES = ("even", "small", "round", "zero", "never")


def several(source):
    """Digits with labels of what they are: even, below five, round, zero; the last is never one."""
    examples = []
    for example in source:
        digit = example["label"]
        truths = (digit % 2 == 0, digit < 5, digit in (0, 3, 6, 8, 9), digit == 0, False)
        examples.append(example | {"label": np.array(truths, np.int64)})
    return dataclasses.replace(
        source, class_names=NAMES, examples=InMemory(examples), multi_label=True
    )


@pytest.fixture
def attributes(monkeypatch):
    """Makes the digits a data set of several labels, to train on and to evaluate on."""
    train_source, test_source = map(several, datasets.open_dataset("digits"))
    opened = lambda *_, **__: (train_source, test_source)  # noqa: E731
    monkeypatch.setattr(datasets, "open_dataset", opened)
    monkeypatch.setattr(datasets, "open_evaluation", lambda *_, **__: test_source)
    return test_source


@pytest.fixture
def config(tiny_config):
    """Six steps on several labels, mixed, weighted and in two parts."""
    return tiny_config(
        loss="sigmoid", augment="mixup(0.2)", class_weights="balanced", accumulate_steps=2,
        **{"evals.val.every": "2 steps"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "several"


@pytest.fixture
def trained(attributes, config, workdir):
    """A run of the config, done once, and its test images."""
    if not workdir.exists():
        train.train(config, workdir)
    return workdir, attributes


def test_a_run_on_several_labels_is_decided_by_map_and_resumed(trained, config, tmp_path, capsys):
    workdir, _ = trained
    final = json.loads((workdir / "metrics.json").read_text())
    assert final.keys() == {"step", "examples", "mAP", "f1_macro", "f1_micro", "loss", "best"}
    scores = {r["step"]: r["eval_mAP"] for r in read_metrics(workdir) if "eval_mAP" in r}
    assert set(scores) == {2, 4, 6}
    assert final["best"]["step"] == max(scores, key=scores.get)
    with pytest.raises(KeyboardInterrupt):
        train_until(config, tmp_path / "again", step=4)
    train.train(config, tmp_path / "again")
    assert_same_run(workdir, tmp_path / "again", 6)
    output = capsys.readouterr().out
    assert "evaluated on 355 images of test: mAP 0." in output
    assert f"best: mAP {final['best']['mAP']:.4f} at step" in output


@pytest.fixture
def weights(trained, tmp_path):
    """The run's weights with a head that is sure of itself."""
    pretrained = load_pretrained(str(trained[0]))
    assert pretrained.multi_label
    kernel = pretrained.params["head"]["kernel"]
    random = np.random.default_rng(0).normal(0, 3, kernel.shape).astype(np.float32)
    head = {"kernel": random, "bias": np.zeros(5, np.float32)}
    params = pretrained.params | {"head": head}
    path = tmp_path / "weights.npz"
    save_pretrained(dataclasses.replace(pretrained, params=params), path, "official")
    return path, trained[1]


def probabilities(path, source):
    model = VisionModel(load_pretrained(str(path)))
    images = np.stack([eval_view(example["image"], model.preprocessing) for example in source])
    return model, 1 / (1 + np.exp(-model.logits(images).astype(np.float64)))


def test_the_command_scores_a_saved_model_as_scikit_learn_does(weights, tmp_path, capsys):
    path, source = weights
    flags = ["--checkpoint", str(path), "--dataset", "list:digits.csv"]
    result, folder = tmp_path / "result.json", tmp_path / "report"
    evaluate.main([*flags, "--per_class", "--json", str(result), "--report", str(folder)])
    found = json.loads(result.read_text())
    _, p = probabilities(path, source)
    labels = np.stack([example["label"] for example in source])
    of_classes = [metrics.average_precision_score(labels[:, i], p[:, i]) for i in range(4)]
    assert found["mAP"] == pytest.approx(np.mean(of_classes), abs=1e-3)
    assert found["f1_micro"] == pytest.approx(metrics.f1_score(labels, p > 0.5, average="micro"))
    rows = found["per_class"]
    assert [row["name"] for row in rows] == list(NAMES)
    assert [row["average_precision"] for row in rows[:4]] == pytest.approx(of_classes, abs=1e-3)
    assert rows[4]["average_precision"] is None and rows[4]["examples"] == 0
    recall = metrics.recall_score(labels, p > 0.5, average=None, zero_division=0)
    assert [row["recall"] for row in rows[:4]] == pytest.approx(recall[:4])
    assert {x.name for x in folder.iterdir()} == {"report.html", "worst.png", "per_class.csv"}
    assert " AP  precision     recall         F1     images" in capsys.readouterr().out
    for flag in ("--fewshot=1", f"--confusion={tmp_path / 'c.csv'}"):
        with pytest.raises(UserError, match="several labels an image, which are no single class"):
            evaluate.main([*flags, flag])


def test_every_class_above_a_half_is_predicted(weights, tmp_path, capsys):
    path, source = weights
    model, p = probabilities(path, source)
    assert model.pretrained.multi_label
    (tmp_path / "photos").mkdir()
    chosen = {  # One with several classes, one with none.
        "several": int(np.argmax((p > 0.5).sum(1))),
        "few": int(np.argmin(p.max(1))),
    }
    for name, index in chosen.items():
        (tmp_path / f"photos/{name}.png").write_bytes(source[index]["image"])
    (tmp_path / "photos/dark.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    predict.main(["--checkpoint", str(path), "--json", str(tmp_path / "photos")])
    found = {}
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        found[row["file"].rsplit("/", 1)[1]] = row["predictions"]
    for name, index in chosen.items():
        expected = sorted(((x, n) for x, n in zip(p[index], NAMES, strict=True) if x > 0.5))
        predicted = [(x["probability"], x["label"]) for x in found[f"{name}.png"]]
        assert [n for _, n in predicted] == [n for _, n in reversed(expected)]
    assert len(found["several.png"]) > 1
    # As many as are asked for.
    predict.main(["--checkpoint", str(path), "--topk=4", str(tmp_path / "photos/few.png")])
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert len(model.predict(str(tmp_path / "photos"))[-1]) == len(found["several.png"])
    assert len(model.predict(str(tmp_path / "photos"), topk=3)[0]) == 3


@pytest.mark.parametrize(
    ("name", "format"), [("x.npz", "official"), ("x.safetensors", "timm"), ("x", "huggingface")]
)
def test_weights_in_any_format_know_that_labels_are_several(trained, tmp_path, name, format):
    pretrained = load_pretrained(str(trained[0]))
    # The run's pre-training head has a hidden layer, which the formats have no place for.
    if format != "official":
        pretrained.params.pop("pre_logits")
        model = pretrained.model | {"representation_size": 0}
        pretrained = dataclasses.replace(pretrained, model=model)
    for multi_label in (True, False):
        saved = dataclasses.replace(pretrained, multi_label=multi_label)
        path = tmp_path / str(multi_label)
        path.mkdir()
        save_pretrained(saved, path / name, format)
        found = load_pretrained(str(path / name))
        assert (found.loss, found.multi_label) == ("sigmoid", multi_label)
    if format == "huggingface":  # What Transformers saves is all that there is.
        (tmp_path / "True" / name / "vit_jax.json").unlink()
        assert load_pretrained(str(tmp_path / "True" / name)).multi_label


@pytest.mark.usefixtures("attributes")
def test_several_labels_are_refused_where_one_is_needed(tiny_config, tmp_path):
    for overrides, message in (
        ({}, "loss is 'softmax' but digits has several labels an image, .*config.loss=sigmoid$"),
        (
            {"distillation.teacher": str(tmp_path)},
            "config.loss=sigmoid, and leave config.distillation.teacher out$",
        ),
        ({"loss": "sigmoid", "dataset.sampling": "balanced"}, "an image of digits has several la"),
        (
            {"loss": "sigmoid", "evals.fewshot.dataset": "digits"},
            "config.evals.fewshot: digits has several labels an image, and few-shot",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train.train(tiny_config(**overrides), tmp_path / "run")


def test_a_model_of_one_label_is_not_scored_on_several(finished, attributes):
    del attributes  # After the run, which has one label an image.
    with pytest.raises(UserError, match=r"the model was trained for one \(loss 'softmax'\)"):
        evaluate.main(["--checkpoint", str(finished), "--dataset", "list:digits.csv"])


def test_a_run_of_balanced_classes_is_another_and_resumes_bit_by_bit(
    finished, tiny_config, tmp_path
):
    config = tiny_config(**{"dataset.sampling": "balanced"})
    train.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until(config, tmp_path / "stopped", step=3)
    train.train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 6)
    assert read_metrics(tmp_path / "whole") != read_metrics(finished)
    for way in ({}, {"class_weights": "balanced"}):
        with pytest.raises(UserError, match="holds a run of another config"):
            train.train(tiny_config(**way), tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"class_weights": "even"}, "config.class_weights 'even' is unknown: use balanced, '' for"),
        ({"dataset.sampling": "x"}, "config.dataset.sampling 'x' is unknown: use balanced, '' for"),
        (
            {"class_weights": "balanced", "dataset.sampling": "balanced"},
            "would balance the classes twice: set one of them to ''",
        ),
        (
            {"objective": "masked_patches", "class_weights": "balanced",
             "model.representation_size": 0},
            "config.class_weights is balanced, but objective masked_patches has no classes: add "
            "--config.class_weights=''",
        ),
    ],
)  # fmt: skip
def test_a_wrong_way_to_balance_is_refused_before_data_are_opened(tiny_config, overrides, message):
    with pytest.raises(UserError) as error:
        check_config(tiny_config(**overrides))
    assert message in str(error.value)
