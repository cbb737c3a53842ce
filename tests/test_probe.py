"""The command, from images to a model that every other command reads."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

import vit_jax
from vit_jax import evaluate, probe
from vit_jax.checkpoints.conversion import convert
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data import datasets, digits
from vit_jax.errors import UserError

from .test_evaluate import save_random, write_folder
from .test_train_labels import NAMES, several


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights whose head knows other classes, and is not used."""
    path = tmp_path_factory.mktemp("weights") / "random.npz"
    save_random(path, "abc", num_classes=3)
    return path


def pixels(split):
    """The digits as they are fed, and their labels."""
    images, labels = digits.load()
    indices = [int(name.split()[1]) for name in digits.DigitsDataset().source(split).ids()]
    return np.repeat(images[indices, ..., None], 3, -1), labels[indices]


def run(*arguments):
    return probe.main(["--data=digits", *map(str, arguments)])


def probed(weights, output, *arguments):
    assert run(f"--init={weights}", f"--output={output}", *arguments) == 0
    return json.loads((output / "probe.json").read_text())


def test_the_model_is_scikit_learns_regression_on_its_own_features(tmp_path, weights, capsys):
    result = probed(weights, tmp_path / "runs" / "probe", "--C=0.05")
    trunk, found = vit_jax.load(weights), vit_jax.load(tmp_path / "runs" / "probe")
    (images, labels), (test_images, test_labels) = pixels("train"), pixels("test")
    features, test_features = trunk.features(images), trunk.features(test_images)
    mean, std = features.mean(0), features.std(0)
    expected = LogisticRegression(C=0.05, tol=1e-8, max_iter=5000)
    expected.fit((features - mean) / std, labels)
    scores = expected.decision_function((test_features - mean) / std)
    logits = found.logits(test_images)
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), scores, atol=1e-2)
    assert found.class_names == tuple("0123456789")
    accuracy = np.mean(logits.argmax(1) == test_labels)
    assert result["test"]["accuracy"] == pytest.approx(accuracy, abs=1e-7)
    assert 0.3 < accuracy < 1
    assert result["images"] == {"train": 1442, "test": 355}

    printed = capsys.readouterr().out
    assert f"{accuracy:.4f} of the images to score" in printed
    assert "1,797 x 16 in float32: 0.1 MB" in printed
    evaluate.main([f"--checkpoint={tmp_path}/runs/probe", "--dataset=digits"])
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    convert(load_pretrained(tmp_path / "runs" / "probe"), str(tmp_path / "hf"), "huggingface")


def test_features_are_kept_and_not_computed_again(tmp_path, weights, monkeypatch, capsys):
    features = tmp_path / "features.npz"
    options = [f"--features={features}", "--mirror", "--C=0.01"]
    first = probed(weights, tmp_path / "a", *options)
    with np.load(features) as arrays:
        given = arrays["train/features"].reshape(1442, 2, 16)
    trunk, (images, _) = vit_jax.load(weights), pixels("train")
    for view, seen in enumerate((images, images[:, :, ::-1])):
        np.testing.assert_allclose(given[:, view], trunk.features(seen), atol=1e-4)

    monkeypatch.setattr(probe, "_compute", None)
    second = probed(weights, tmp_path / "b", *options)
    assert "features  read from" in capsys.readouterr().out
    assert second | {"seconds": 0} == first | {"seconds": 0}

    other = save_other(weights, tmp_path / "other.npz")
    mistakes = [
        ([f"--init={other}", *options], "of other weights: name another file"),
        ([f"--init={weights}", *options[::2]], "of other images: name another"),
        ([f"--init={weights}", *options, "--split=test[:50%]"], "of other images: name another"),
        ([f"--init={weights}", *options, "--image_size=12"], "of other weights and preprocessing"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(UserError, match=message):
            run(*arguments)


def save_other(weights, path):
    pretrained = load_pretrained(weights)
    params = {**pretrained.params, "cls": pretrained.params["cls"] * 1.0001}
    save_pretrained(dataclasses.replace(pretrained, params=params), path, "official")
    return path


def test_what_the_probe_learned_from_is_not_scored_later(tmp_path, weights, capsys):
    write_folder(tmp_path / "data", {"a": 5, "b": 5})
    arguments = [f"--data={tmp_path}/data", f"--init={weights}", f"--output={tmp_path}/probe"]
    (tmp_path / "data/a/bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="bad.png"):
        probe.main([*arguments, "--C=1"])
    capsys.readouterr()
    probe.main([*arguments, "--C=1", "--broken=skip"])
    printed = capsys.readouterr().out
    assert "it has no splits, so 8 images are to train on and 2 are held out" in printed
    assert "bad.png" in printed
    assert "chosen" not in printed  # C was given.
    result = json.loads((tmp_path / "probe/probe.json").read_text())
    evaluate.main(
        [f"--checkpoint={tmp_path}/probe", f"--dataset=folder:{tmp_path}/data", "--broken=skip"]
    )
    printed = capsys.readouterr().out
    assert "the images that the run held out are scored, 2" in printed
    assert f"{result['test']['accuracy']:.4f}" in printed


def test_what_is_interrupted_leaves_nothing(tmp_path, weights, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(f"--init={weights}", f"--output={tmp_path}/probe", "--C=0.01")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--C=0"], "--C: '0' is not a number above 0"),
        (["--C=nan"], "--C: 'nan' is not a number above 0"),
        (["--features=a.csv"], "--features a.csv is not a file that ends in .npz"),
        (["--features=no/where.npz"], "is not in a folder that exists"),
        (["--output=."], "--output . exists already: remove it"),
        (["--split=nothing"], "split 'nothing' of data set 'digits' cannot be read"),
    ],
)
def test_a_mistake_is_one_line(weights, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run(f"--init={weights}", *arguments)
    assert "\n" not in str(error.value)


def test_of_several_labels_each_is_scikit_learns_regression_on_its_own(
    tmp_path, weights, monkeypatch, capsys
):
    sources = [several(x) for x in datasets.open_dataset("digits")]
    monkeypatch.setattr(datasets, "open_dataset", lambda *_, **__: sources)
    result = probed(weights, tmp_path / "probe", "--C=0.05", "--mirror")
    trunk, found = vit_jax.load(weights), vit_jax.load(tmp_path / "probe")
    (images, labels), (test_images, test_labels) = (
        (pixels(split)[0], np.stack([x["label"] for x in source.examples[:]]))
        for split, source in zip(("train", "test"), sources, strict=True)
    )
    features = trunk.features(np.concatenate([images, images[:, :, ::-1], test_images]))
    features, test_features = np.split(features, [2 * len(images)])
    logits, labels = found.logits(test_images), np.tile(labels, (2, 1))
    mean, std = features.mean(0), features.std(0)
    x = (test_features - mean) / std
    for index in range(4):  # The last class has no image.
        expected = LogisticRegression(C=0.05, tol=1e-8, max_iter=5000)
        expected.fit((features - mean) / std, labels[:, index])
        np.testing.assert_allclose(logits[:, index], expected.decision_function(x), atol=1e-2)
    assert logits[:, 4].max() < -5
    scores = [metrics.average_precision_score(test_labels[:, i], logits[:, i]) for i in range(4)]
    assert result["test"]["mAP"] == pytest.approx(np.mean(scores), abs=1e-6)
    exact = metrics.accuracy_score(test_labels, logits > 0)
    assert result["test"]["accuracy"] == pytest.approx(exact, abs=1e-7)
    assert f"{np.mean(scores):.4f} of the images to score" in capsys.readouterr().out
    loaded = load_pretrained(tmp_path / "probe")
    assert (loaded.loss, loaded.multi_label, loaded.class_names) == ("sigmoid", True, NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ("0",)}, "digits has one class, so there is nothing to tell apart"),
    ],
)
def test_data_that_a_probe_cannot_learn_is_one_line(weights, monkeypatch, change, message):
    sources = [dataclasses.replace(x, **change) for x in datasets.open_dataset("digits")]
    monkeypatch.setattr(datasets, "open_dataset", lambda *args, **options: sources)
    with pytest.raises(UserError, match=message):
        run(f"--init={weights}")
