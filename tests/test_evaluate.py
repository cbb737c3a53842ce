import csv
import functools
import json
import math
import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from sklearn import metrics
from sklearn.datasets import load_digits

from vit_jax import evaluate as evaluate_module
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data import datasets
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluate import (
    evaluate,
    make_apply_fn,
    match_classes,
    measure,
    multilabel_accuracy,
    parse_arguments,
    real_accuracy,
)
from vit_jax.models import create_model
from vit_jax.sharding import make_mesh
from vit_jax.steps import classification, eval_step


@pytest.mark.parametrize("batch_size", [1, 4, 5, 16])
def test_every_image_counts_once_whatever_the_batch_size(batch_size):
    model = create_model(
        {"architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "mlp_dim": 8,
         "num_heads": 2, "num_classes": 3}
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (11, 4, 4, 3)).astype(np.float32)
    labels = rng.integers(0, 3, 11).astype(np.int32)
    params = model.init(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (8, 3))

    def batches():
        for start in range(0, 11, batch_size):
            image, label = images[start : start + batch_size], labels[start : start + batch_size]
            pad = batch_size - len(label)
            yield {
                "image": np.pad(image, ((0, pad), (0, 0), (0, 0), (0, 0))),
                "label": np.pad(label, (0, pad)),
                "mask": np.pad(np.ones(len(label), np.float32), (0, pad)),
            }

    step = jax.jit(functools.partial(eval_step, objective=classification(model, "softmax")))
    result = evaluate(step, params, batches(), make_mesh())
    logits = np.asarray(model.apply({"params": params}, images), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert result["examples"] == 11
    assert result["accuracy"] == np.mean(logits.argmax(-1) == labels)
    assert result["loss"] == pytest.approx(-np.log(p[np.arange(11), labels]).mean(), rel=1e-5)


class Logits(nn.Module):
    """The images are the logits."""

    @nn.compact
    def __call__(self, images):
        return images


def scored(logits, labels, batch_size, function=measure, **options):
    """A function of `evaluate` on given logits, in batches padded with what must not count."""

    def batches():
        for start in range(0, len(labels), batch_size):
            image, label = logits[start : start + batch_size], labels[start : start + batch_size]
            pad = batch_size - len(label)
            yield {
                "image": np.pad(image, ((0, pad), (0, 0)), constant_values=np.nan),
                "label": np.pad(label, ((0, pad),) + ((0, 0),) * (label.ndim - 1)),
                "mask": np.pad(np.ones(len(label), np.float32), (0, pad)),
            }

    mesh = make_mesh()
    return function(make_apply_fn(Logits(), mesh), {}, batches(), mesh, **options)


def random_logits(images=203, classes=9, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 1, images).astype(np.int32)  # The last class is never true.
    logits = rng.normal(0, 2, (images, classes)).astype(np.float32)
    logits[np.arange(images), labels] += 2
    return logits, labels


@pytest.mark.parametrize("batch_size", [1, 7, 29, 203, 256])
def test_measures_agree_with_scikit_learn_at_any_batch_size(batch_size):
    logits, labels = random_logits()
    found = scored(logits, labels, batch_size)
    classes = np.arange(9)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    predicted = p.argmax(1)
    assert found.accuracy == metrics.accuracy_score(labels, predicted)
    assert found.top5_accuracy == metrics.top_k_accuracy_score(labels, logits, k=5, labels=classes)
    assert found.loss == pytest.approx(metrics.log_loss(labels, p, labels=classes), rel=1e-12)
    expected = metrics.confusion_matrix(labels, predicted, labels=classes)
    np.testing.assert_array_equal(found.confusion(), expected)
    shares, images = found.per_class()
    assert images.tolist() == np.bincount(labels, minlength=9).tolist()
    recall = metrics.recall_score(labels, predicted, labels=classes[:-1], average=None)
    np.testing.assert_allclose(shares[:-1], recall, rtol=1e-12)
    assert math.isnan(shares[-1])


def expected_calibration_error(confidence, correct):
    """Guo et al. (2017), Eqs. 1 to 3, word by word."""
    total = 0.0
    for m in range(1, 16):
        members = ((m - 1) / 15 < confidence) & (confidence <= m / 15)
        if members.any():
            gap = correct[members].mean() - confidence[members].mean()
            total += members.sum() / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("batch_size", [7, 256])
def test_calibration_error_is_that_of_its_definition(batch_size):
    logits, labels = random_logits()
    p = np.exp(logits.astype(np.float64))
    confidence = p.max(1) / p.sum(1)
    expected = expected_calibration_error(confidence, logits.argmax(1) == labels)
    found = scored(logits, labels, batch_size)
    assert found.calibration_error == pytest.approx(expected, rel=1e-9)
    assert expected > 0.02


def test_a_bin_of_the_calibration_error_has_its_upper_edge():
    # Certain and wrong, and right at 0.95: both in (14/15, 1], where they are right half the time.
    logits = np.array([[90, -90], [np.log(0.95 / 0.05), 0]], np.float32)
    found = scored(logits, np.array([1, 0], np.int32), 2)
    assert found.calibration_error == pytest.approx((1 + 0.95) / 2 - 0.5, rel=1e-6)


def test_calibration_error_by_hand():
    # Two classes at 0.8, of four images one is right: |1/4 - 4/5|.
    logits = np.tile(np.log([[0.8, 0.2]]), (4, 1)).astype(np.float32)
    found = scored(logits, np.array([0, 1, 1, 1], np.int32), 4)
    assert found.calibration_error == pytest.approx(0.55, rel=1e-6)
    # Quite sure and right: nothing is wrong, and the last bin has room for 1.
    sure = scored(np.array([[90.0, -90.0]], np.float32), np.array([0], np.int32), 4)
    assert sure.calibration_error == pytest.approx(0, abs=1e-12)


def test_loss_and_confidence_of_a_sigmoid_model():
    logits, labels = random_logits()
    found = scored(logits, labels, 50, loss="sigmoid")
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    target = np.eye(9)[labels]
    losses = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-9)
    expected = expected_calibration_error(p.max(1), logits.argmax(1) == labels)
    assert found.calibration_error == pytest.approx(expected, rel=1e-9)


def test_a_sigmoid_model_that_believes_in_no_class():
    found = scored(np.full((3, 4), -1000, np.float32), np.zeros(3, np.int32), 2, loss="sigmoid")
    assert (found.accuracy, found.calibration_error) == (1, 1)


@pytest.mark.parametrize(("place", "top5"), [(3, True), (4, True), (5, False), (8, False)])
def test_of_equal_logits_the_first_classes_are_the_top_five(place, top5):
    found = scored(np.zeros((1, 9), np.float32), np.array([place], np.int32), 1)
    assert found.predicted.tolist() == [0]
    assert found.top5_accuracy == top5


def test_top_five_of_few_classes_is_everything():
    logits, labels = random_logits(classes=4)
    assert scored(logits, labels, 50).top5_accuracy == 1


def test_confusion_is_true_by_predicted():
    found = scored(np.eye(3, dtype=np.float32)[[2, 2, 0]], np.array([0, 0, 1], np.int32), 2)
    assert found.confusion().tolist() == [[0, 0, 2], [1, 0, 0], [0, 0, 0]]


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="logits are not finite"):
        scored(np.array([[np.nan, 0]], np.float32), np.array([0], np.int32), 1)


def test_images_without_a_label_are_refused():
    with pytest.raises(UserError, match="without a label"):
        scored(np.zeros((2, 3), np.float32), np.array([0, -1], np.int32), 2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_real_counts_images_with_a_label_only(batch_size):
    predicted = [0, 1, 2, 3, 0]
    sets = [{0, 3}, {0, 2}, set(), {3}, set()]  # Right, wrong, -, right, -.
    labels = np.array([[c in labels for c in range(4)] for labels in sets], np.int32)
    logits = np.eye(4, dtype=np.float32)[predicted]
    assert scored(logits, labels, batch_size, real_accuracy) == (2 / 3, 3)


def test_real_without_any_label_is_refused():
    with pytest.raises(UserError, match="no image of the split has a label of ReaL"):
        scored(np.eye(3, dtype=np.float32), np.zeros((3, 3), np.int32), 2, real_accuracy)


def test_another_number_of_classes_is_refused():
    with pytest.raises(UserError, match="has 3 classes and the data set 2: fine-tune it first"):
        match_classes(3, None, ("a", "b"))
    with pytest.raises(UserError, match="the checkpoint has no head, so it knows no classes: fine"):
        match_classes(0, None, ("a", "b"))
    numbers = "the data set 2, whose names are numbers and may count others: fine-tune it first"
    with pytest.raises(UserError, match=numbers):
        match_classes(3, ("0", "1", "2"), ("0", "1"))


# To ignore names is advised only where positions may agree, and of numbers with a condition.
@pytest.mark.parametrize(
    ("own", "data", "advice"),
    [
        (("Hund", "Katze"), ("dog", "cat"), "if all mean the same, add --ignore_class_names"),
        (("tench", "goldfish"), ("0", "1"), "if the numbers count the same classes in the same "),
        (("0", "1", "10", "2"), ("a", "b", "c", "d"), "give the classes of the data set the names"),
        (("tench, Tinca", "pike"), ("goldfish", "tench"), "and their positions do not agree: give"),
    ],
)
def test_other_names_are_refused_with_what_is_known_of_them(own, data, advice):
    with pytest.raises(UserError) as error:
        match_classes(len(own), own, data)
    message = str(error.value)
    assert message.startswith(f"class 0 is '{own[0]}' in the checkpoint and '{data[0]}' in the")
    assert advice in message and "\n" not in message
    assert ("--ignore_class_names" in message) == advice.startswith("if ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --checkpoint, --dataset"),
        (["--dataset", "digits"], "required: --checkpoint"),
        (["--nonsense"], "required"),
        (["--checkpoint=c", "--dataset=d", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--checkpoint=c", "--dataset=d", "--batch_size=0"], "--batch_size: '0' is not a whole"),
        (["--checkpoint=c", "--dataset=d", "--fewshot=5,0"], "shots '5,0' are not positive"),
        (["--checkpoint=c", "--dataset=d", "--confusion=x.png"], "neither .npz nor .csv"),
        (
            ["--checkpoint=c", "--dataset=d", "--json=no/where.json"],
            "not a file in a directory that exists",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        parse_arguments(arguments)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model for the digits, and its path."""
    return save_random(tmp_path_factory.mktemp("weights") / "digits.npz", "0123456789")


def save_random(path, class_names, num_classes=10):
    model = {
        "architecture": "vit", "patch_size": 4, "hidden_size": 16, "num_layers": 1, "mlp_dim": 8,
        "num_heads": 2, "num_classes": num_classes, "classifier": "token", "representation_size": 0,
        "gelu": "tanh", "layer_norm_epsilon": 1e-6,
    }  # fmt: skip
    shapes = abstract_params(model, 8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    names = None if class_names is None else tuple(class_names)
    pretrained = Pretrained(params, model, Preprocessing(8), names, "softmax", str(path))
    save_pretrained(pretrained, str(path), "official")
    return pretrained


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    return evaluate_module.main()


def digits_test_set():
    """The images as the model is fed them and their labels, straight from scikit-learn."""
    digits = load_digits()
    test = np.zeros(len(digits.target), bool)
    for digit in range(10):
        test[np.flatnonzero(digits.target == digit)[4::5]] = True
    images = np.round(digits.images[test] * 255 / 16) / 127.5 - 1
    return np.repeat(images[..., None], 3, -1).astype(np.float32), digits.target[test]


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 50), (8, 50)])
def test_the_command_counts_exactly_on_any_number_of_devices(
    checkpoint, data_dir, tmp_path, run, devices, batch_size
):
    files = {name: tmp_path / name for name in ("result.json", "confusion.npz")}
    code, output = run(
        [sys.executable, "-m", "vit_jax.evaluate", "--checkpoint", checkpoint.source]
        + ["--dataset", "digits", "--data_dir", data_dir, "--batch_size", str(batch_size)]
        + ["--json", str(files["result.json"]), "--confusion", str(files["confusion.npz"])],
        devices,
    )
    assert code == 0, output
    images, labels = digits_test_set()
    logits = create_model(checkpoint.model).apply({"params": checkpoint.params}, images)
    predicted = np.asarray(logits).argmax(1)
    result = json.loads(files["result.json"].read_text())
    assert result["examples"] == 355
    assert result["split"] == "test"
    assert result["accuracy"] == np.mean(predicted == labels)
    assert result["top5_accuracy"] == metrics.top_k_accuracy_score(labels, logits, k=5)
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    assert result["loss"] == pytest.approx(metrics.log_loss(labels, p), rel=1e-4)
    with np.load(files["confusion.npz"]) as found:
        np.testing.assert_array_equal(
            found["confusion"], metrics.confusion_matrix(labels, predicted)
        )
        assert found["class_names"].tolist() == list("0123456789")
    # The table says the same and nothing else.
    assert [line.rsplit(maxsplit=1) for line in output.splitlines()] == [
        ["examples", "355"],
        ["accuracy", f"{result['accuracy']:.4f}"],
        ["top5 accuracy", f"{result['top5_accuracy']:.4f}"],
        ["loss", f"{result['loss']:.4f}"],
        ["calibration error", f"{result['calibration_error']:.4f}"],
    ]


def test_per_class_accuracy_confusion_and_few_shots(
    checkpoint, data_dir, tmp_path, monkeypatch, capsys
):
    paths = [str(tmp_path / name) for name in ("result.json", "confusion.csv")]
    run_main(
        monkeypatch, "--checkpoint", checkpoint.source, "--dataset", "digits", "--per_class",
        "--data_dir", data_dir, "--fewshot", "1,10", "--json", paths[0], "--confusion", paths[1],
    )  # fmt: skip
    result = json.loads(pathlib.Path(paths[0]).read_text())
    header, *rows = csv.reader(pathlib.Path(paths[1]).read_text().splitlines())
    assert header[1:] == [row[0] for row in rows] == list("0123456789")
    matrix = np.array([row[1:] for row in rows], int)
    for row, counts, digit in zip(result["per_class"], matrix, range(10), strict=True):
        assert (row["name"], row["examples"]) == (str(digit), counts.sum())
        assert row["accuracy"] == counts[digit] / counts.sum()
    assert result["accuracy"] == matrix.trace() / 355
    few = result["fewshot"]
    assert few.keys() == {"1", "10"}
    # Even random features tell digits apart, the better the more there are to learn from.
    assert 0.2 < few["1"]["accuracy"] < few["10"]["accuracy"] < 1
    assert few["10"]["accuracy"] == pytest.approx(np.mean(few["10"]["seeds"]))
    assert len(few["10"]["seeds"]) == 3
    assert "10-shot accuracy" in capsys.readouterr().out


def test_a_head_for_other_classes_is_refused_but_few_shots_need_none(
    data_dir, tmp_path, monkeypatch, capsys
):
    path = str(tmp_path / "other.npz")
    save_random(path, None, num_classes=7)
    arguments = ["--checkpoint", path, "--dataset", "digits", "--data_dir", data_dir]
    with pytest.raises(UserError, match="has 7 classes and the data set 10"):
        run_main(monkeypatch, *arguments)
    run_main(monkeypatch, *arguments, "--fewshot", "1")
    lines = capsys.readouterr().out.splitlines()
    assert "has 7 classes and the data set 10" in lines[0]
    assert lines[1].startswith("1-shot accuracy")


def test_a_head_of_zeros_scores_nothing(data_dir, tmp_path, monkeypatch):
    pretrained = save_random(tmp_path / "trained.npz", None)
    pretrained.params["head"] = jax.tree.map(np.zeros_like, pretrained.params["head"])
    save_pretrained(pretrained, str(tmp_path / "trunk.npz"), "official")
    arguments = ["--checkpoint", str(tmp_path / "trunk.npz"), "--dataset", "digits"]
    with pytest.raises(UserError, match="trunk.npz has a head of zeros, as before training"):
        run_main(monkeypatch, *arguments, "--data_dir", data_dir)


def test_class_names_in_another_order_are_matched_by_name(data_dir, tmp_path, monkeypatch, capsys):
    names = "5678901234"
    path = str(tmp_path / "other.npz")
    pretrained = save_random(path, names)
    images, digits = digits_test_set()
    logits = create_model(pretrained.model).apply({"params": pretrained.params}, images)
    predicted = np.asarray(logits).argmax(1)
    arguments = ["--checkpoint", path, "--dataset", "digits", "--data_dir", data_dir]
    arguments += ["--json", str(tmp_path / "result.json")]

    run_main(monkeypatch, *arguments, "--per_class", "--confusion", str(tmp_path / "c.npz"))
    assert "matched by name: 10 of the checkpoint's 10" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    hits = np.array([names[i] for i in predicted]) == digits.astype(str)
    assert result["accuracy"] == np.mean(hits)
    for digit, row in enumerate(result["per_class"]):
        of_it = digits == digit
        assert (row["name"], row["examples"]) == (str(digit), of_it.sum())
        assert row["accuracy"] == np.mean(hits[of_it])
    with np.load(tmp_path / "c.npz") as found:
        labels = [names.index(str(digit)) for digit in digits]
        assert found["class_names"].tolist() == list(names)
        expected = metrics.confusion_matrix(labels, predicted)
        np.testing.assert_array_equal(found["confusion"], expected)

    run_main(monkeypatch, *arguments, "--ignore_class_names")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] == np.mean(predicted == digits) != np.mean(hits)


@pytest.mark.parametrize("split", ["val", "valid", "validation", "test"])
def test_a_folder_of_some_classes_and_nothing_to_train_on_is_matched_by_name(
    split, tmp_path, monkeypatch, capsys
):
    images, digits = digits_test_set()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    path = str(tmp_path / "words.npz")
    pretrained = save_random(path, words)
    chosen = np.isin(digits, [3, 7, 8])
    for i in np.flatnonzero(chosen):
        directory = tmp_path / "data" / split / words[digits[i]]
        directory.mkdir(parents=True, exist_ok=True)
        pixels = np.rint((images[i] + 1) * 127.5).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(directory / f"{i}.webp", lossless=True)
    arguments = ["--checkpoint", path, "--dataset", f"folder:{tmp_path / 'data'}"]
    run_main(monkeypatch, *arguments, "--json", str(tmp_path / "result.json"), "--per_class")
    assert "matched by name: 3 of the checkpoint's 10" in capsys.readouterr().out
    logits = create_model(pretrained.model).apply({"params": pretrained.params}, images[chosen])
    hits = np.asarray(logits).argmax(1) == digits[chosen]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["accuracy"], result["examples"]) == (np.mean(hits), chosen.sum())
    assert [row["name"] for row in result["per_class"]] == ["eight", "seven", "three"]
    for row in result["per_class"]:
        assert row["accuracy"] == np.mean(hits[digits[chosen] == words.index(row["name"])])


@pytest.fixture(scope="module")
def imagenet_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "imagenet.npz"
    return save_random(path, None, num_classes=1000).source


@pytest.fixture
def run_imagenet(imagenet_checkpoint, monkeypatch, tmp_path):
    """Evaluates on six made-up images of imagenet2012, and returns the results."""

    def run_mocked(*flags):
        path = tmp_path / "result.json"
        with tfds.testing.mock_data(num_examples=6):
            run_main(
                monkeypatch, "--checkpoint", imagenet_checkpoint, "--dataset", "imagenet2012",
                "--json", str(path), *flags,
            )  # fmt: skip
        return json.loads(path.read_text())

    return run_mocked


def test_imagenet_is_scored_on_its_own_labels_and_on_real(run_imagenet):
    result = run_imagenet()
    assert (result["split"], result["examples"]) == ("validation", 6)
    with tfds.testing.mock_data(num_examples=6):
        labeled = [bool(r["label"].numpy().any()) for r in datasets.open_real().examples()]
    assert result["real_examples"] == sum(labeled)
    assert 0 <= result["real_accuracy"] <= 1


def test_real_is_of_the_validation_split_only(run_imagenet):
    assert "real_accuracy" not in run_imagenet("--split", "train")


def test_imagenet_without_real_says_so(run_imagenet, monkeypatch, capsys):
    def open_real(**_):
        raise UserError("data set 'imagenet2012_real' is not prepared")

    monkeypatch.setattr(datasets, "open_real", open_real)
    assert "real_accuracy" not in run_imagenet("--data_dir", "somewhere")
    *_, line = capsys.readouterr().out.splitlines()
    assert line == "ImageNet-ReaL is left out: data set 'imagenet2012_real' is not prepared"


def test_real_alone_has_no_single_label(imagenet_checkpoint, monkeypatch):
    for flag in (["--fewshot=1"], ["--per_class"], ["--confusion=confusion.csv"]):
        with pytest.raises(UserError, match="need --dataset imagenet2012"):
            run_main(
                monkeypatch, "--checkpoint", imagenet_checkpoint, "--dataset", "imagenet2012_real",
                *flag,
            )  # fmt: skip


OBJECTNET = {"alarm_clock": (409, 530), "chair": (423, 559, 765), "wok": (909,)}


@pytest.fixture
def objectnet_folder(tmp_path):
    """Nine images of three classes, with a red border, and two of a class that does not count."""
    rng = np.random.default_rng(0)
    pixels = {}
    for name in (*OBJECTNET, "squeegee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            inner = rng.integers(0, 256, (8, 8, 3), np.uint8)
            bordered = np.full((12, 12, 3), (255, 0, 0), np.uint8)
            bordered[2:-2, 2:-2] = inner
            PIL.Image.fromarray(bordered).save(tmp_path / "images" / name / f"{i}.png")
            pixels[name, i] = inner / 127.5 - 1
    return tmp_path / "images", pixels


def save_for_objectnet(path, pixels):
    """A model of 1,000 classes that believes in ten of them; its logits by image."""
    pretrained = save_random(path, None, num_classes=1000)
    path.unlink()
    model = create_model(pretrained.model)
    bias = np.zeros(1000, np.float32)
    bias[[*range(4), *(i for several in OBJECTNET.values() for i in several)]] = 20
    pretrained.params["head"]["bias"] = bias
    names = [name for name in pixels if name[0] in OBJECTNET]
    images = np.stack([pixels[name] for name in names]).astype(np.float32)
    save_pretrained(pretrained, str(path), "official")
    return names, np.asarray(model.apply({"params": pretrained.params}, images))


def test_objectnet_counts_every_class_that_it_stands_for(
    objectnet_folder, tmp_path, monkeypatch, capsys
):
    folder, pixels = objectnet_folder
    names, logits = save_for_objectnet(tmp_path / "imagenet.npz", pixels)
    top1 = top5 = 0
    for (name, _), row in zip(names, logits, strict=True):
        ranking = sorted(range(1000), key=lambda i: -row[i])
        top1 += ranking[0] in OBJECTNET[name]
        top5 += any(i in OBJECTNET[name] for i in ranking[:5])
    assert 0 < top1 < top5 < 9
    path = tmp_path / "result.json"
    run_main(
        monkeypatch, "--checkpoint", str(tmp_path / "imagenet.npz"), "--json", str(path),
        "--dataset", f"objectnet:{folder}", "--batch_size", "4",
    )  # fmt: skip
    result = json.loads(path.read_text())
    assert (result["examples"], result["classes"], result["passed_over"]) == (9, 3, 1)
    assert result["accuracy"] == pytest.approx(top1 / 9)
    assert result["top5_accuracy"] == pytest.approx(top5 / 9)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "3 of the 113 classes of ObjectNet that ImageNet has, too",
        "1 directories of other classes are passed over",
    ]


def test_objectnet_needs_imagenets_classes_in_their_order(
    objectnet_folder, checkpoint, tmp_path, monkeypatch
):
    dataset = ["--dataset", f"objectnet:{objectnet_folder[0]}"]
    with pytest.raises(UserError, match="has 10 classes and ObjectNet is scored by ImageNet's"):
        run_main(monkeypatch, "--checkpoint", checkpoint.source, *dataset)
    other = tmp_path / "other.npz"
    save_random(other, [f"class {i}" for i in range(1000)], num_classes=1000)
    with pytest.raises(UserError, match="class 0 is 'class 0' in the checkpoint and 'n01440764'"):
        run_main(monkeypatch, "--checkpoint", str(other), *dataset)
    for flag in ("--fewshot=1", "--per_class", "--confusion=c.csv", "--split=test"):
        with pytest.raises(UserError, match="objectnet has several labels an image"):
            run_main(monkeypatch, "--checkpoint", str(other), *dataset, flag)


def test_several_label_accuracy_is_that_of_a_loop_at_any_batch_size():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(53, 12)).round(1).astype(np.float32)  # With equal ones.
    labels = (rng.random((53, 12)) < 0.15).astype(np.int32)
    top1 = top5 = 0
    for row, right in zip(logits, labels, strict=True):
        ranking = sorted(range(12), key=lambda i: (-row[i], i))
        top1 += right[ranking[0]]
        top5 += right[ranking[:5]].any()
    for batch_size in (1, 7, 64):
        found = scored(logits, labels, batch_size, multilabel_accuracy)
        assert found == {"examples": 53, "accuracy": top1 / 53, "top5_accuracy": top5 / 53}
    logits[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        scored(logits, labels, 8, multilabel_accuracy)


def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path):
    code, output = run(
        [sys.executable, "-m", "vit_jax.evaluate", "--checkpoint", str(tmp_path / "no.npz")]
        + ["--dataset", f"folder:{tmp_path}"]
    )
    assert code == 2
    assert output.startswith("error: ") and output.count("\n") == 1
    assert "has no train/" in output
