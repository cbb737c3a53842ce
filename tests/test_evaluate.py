import csv
import json
import pathlib
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.special
from sklearn import metrics
from sklearn.datasets import load_digits

from vit_jax import command, config_files, evaluate, train
from vit_jax.checkpoints.model_info import info_path
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data import datasets
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot
from vit_jax.models import create_model

from . import prepared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --checkpoint"),
        (["--dataset", "digits"], "required: --checkpoint"),
        (["--nonsense"], "required"),
        (["--checkpoint=c", "--dataset=d", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--checkpoint=c", "--dataset=d", "--batch_size=0"], "--batch_size: '0' is not a whole"),
        (["--checkpoint=c", "--dataset=d", "--fewshot=5,0"], "shots '5,0' are not positive"),
        (["--checkpoint=c", "--dataset=d", "--confusion=x.png"], "neither .npz nor .csv"),
        (["--checkpoint=c", "--dataset=d", "--report=no/where"], "--report no/where is not a fold"),
        (["--checkpoint=c", "--dataset=d", "--report=setup.py"], "--report setup.py is not a fold"),
        (
            ["--checkpoint=c", "--dataset=d", "--json=no/where.json"],
            "not a file in a directory that exists",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.parse_arguments(arguments)
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


def write_folder(path, images):
    """Writes so many random images of 8 x 8 pixels of each class."""
    rng = np.random.default_rng(0)
    for name, count in images.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(path / name / f"{i}.png")


def run_main(*arguments):
    return evaluate.main(arguments)


def logits_of(pretrained, images):
    apply = jax.jit(create_model(pretrained.model).apply)
    return np.asarray(apply({"params": pretrained.params}, images))


def digits_test_set():
    """The images as the model is fed them and their labels, straight from scikit-learn."""
    digits = load_digits()
    test = np.zeros(len(digits.target), bool)
    for digit in range(10):
        test[np.flatnonzero(digits.target == digit)[4::5]] = True
    images = np.round(digits.images[test] * 255 / 16) / 127.5 - 1
    return np.repeat(images[..., None], 3, -1).astype(np.float32), digits.target[test]


@pytest.mark.parametrize("devices", [1, 8])
def test_the_command_counts_exactly_on_any_number_of_devices(
    checkpoint, data_dir, tmp_path, run, capsys, devices
):
    files = {name: tmp_path / name for name in ("result.json", "confusion.npz")}
    arguments = ["--checkpoint", checkpoint.source, "--dataset", "digits", "--data_dir", data_dir]
    arguments += ["--batch_size", "50", "--json", str(files["result.json"])]
    arguments += ["--confusion", str(files["confusion.npz"])]
    if devices == 1:
        code, output = run_main(*arguments), "".join(capsys.readouterr())
    else:
        code, output = run([sys.executable, "-m", "vit_jax.evaluate", *arguments], devices)
    assert code == 0, output
    images, labels = digits_test_set()
    logits = logits_of(checkpoint, images)
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


def test_per_class_accuracy_confusion_and_few_shots(checkpoint, data_dir, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("result.json", "confusion.csv")]
    run_main(
        "--checkpoint", checkpoint.source, "--dataset", "digits", "--per_class",
        "--data_dir", data_dir, "--fewshot", "1,10", "--json", paths[0], "--confusion", paths[1],
        "--report", str(tmp_path / "report"),
    )  # fmt: skip
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.html", "worst.png", "confusion.png", "per_class.csv",
    }  # fmt: skip
    result = json.loads(pathlib.Path(paths[0]).read_text())
    header, *rows = csv.reader(pathlib.Path(paths[1]).read_text().splitlines())
    assert header[1:] == [row[0] for row in rows] == list("0123456789")
    matrix = np.array([row[1:] for row in rows], int)
    for row, counts, digit in zip(result["per_class"], matrix, range(10), strict=True):
        assert (row["name"], row["examples"]) == (str(digit), counts.sum())
        assert row["accuracy"] == row["recall"] == counts[digit] / counts.sum()
        predicted = matrix[:, digit].sum()
        assert row["precision"] == (counts[digit] / predicted if predicted else None)
        assert row["f1"] == 2 * counts[digit] / (predicted + counts.sum())
    first = result["most_confused"][0]
    wrong = matrix * (1 - np.eye(10, dtype=int))
    assert first["examples"] == wrong[int(first["true"]), int(first["predicted"])] == wrong.max()
    assert result["accuracy"] == matrix.trace() / 355
    output = capsys.readouterr().out
    assert "10-shot accuracy" in output and "confused most:" in output
    header, *table = output.partition("class ")[2].splitlines()[:11]
    assert header.split() == ["precision", "recall", "F1", "images"]
    assert [line.split()[0] for line in table] == list("0123456789")
    assert [int(line.split()[-1]) for line in table] == matrix.sum(1).tolist()
    few = result["fewshot"]
    assert few.keys() == {"1", "10"}
    # Even random features tell digits apart, the better the more there are to learn from.
    assert 0.2 < few["1"]["accuracy"] < few["10"]["accuracy"] < 1
    assert few["10"]["accuracy"] == pytest.approx(np.mean(few["10"]["seeds"]))
    assert len(few["10"]["seeds"]) == 3


def test_a_head_for_other_classes_is_refused_but_few_shots_need_none(data_dir, tmp_path, capsys):
    path = str(tmp_path / "other.npz")
    save_random(path, None, num_classes=7)
    arguments = ["--checkpoint", path, "--dataset", "digits", "--data_dir", data_dir]
    with pytest.raises(UserError, match="has 7 classes and the data set 10"):
        run_main(*arguments)
    for asked in (
        ["--per_class"],
        ["--confusion", f"{tmp_path}/a.csv"],
        ["--report", f"{tmp_path}"],
    ):
        with pytest.raises(UserError, match="has 7 classes and the data set 10"):
            run_main(*arguments, "--fewshot", "1", *asked)
    run_main(*arguments, "--fewshot", "1")
    lines = capsys.readouterr().out.splitlines()
    assert "has 7 classes and the data set 10" in lines[0]
    assert lines[1].startswith("1-shot accuracy")


def test_few_shots_are_scored_on_images_that_they_do_not_learn_from(tmp_path, monkeypatch, capsys):
    def create(*arguments, **_):
        _, train, test = arguments
        assert train.num_examples == 8 and test.num_examples == 2
        assert not set(train.ids()) & set(test.ids())
        return lambda params: {1: [0.25, 0.75]}

    monkeypatch.setattr(fewshot, "create_fewshot", create)
    save_random(tmp_path / "weights.npz", "ab", num_classes=2)
    write_folder(tmp_path / "data", {"a": 5, "b": 5})
    arguments = ["--checkpoint", f"{tmp_path}/weights.npz", "--dataset", f"folder:{tmp_path}/data"]
    run_main(*arguments, "--fewshot", "1", "--json", f"{tmp_path}/result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["examples"], result["split"]) == (10, "train+validation")
    assert result["fewshot_split"] == "validation"
    assert "learned from train, 8 images, and scored on validation, 2\n" in capsys.readouterr().out


def test_a_head_of_zeros_scores_nothing(data_dir, tmp_path):
    pretrained = save_random(tmp_path / "trained.npz", None)
    pretrained.params["head"] = jax.tree.map(np.zeros_like, pretrained.params["head"])
    save_pretrained(pretrained, str(tmp_path / "trunk.npz"), "official")
    arguments = ["--checkpoint", str(tmp_path / "trunk.npz"), "--dataset", "digits"]
    with pytest.raises(UserError, match="trunk.npz has a head of zeros, as before training"):
        run_main(*arguments, "--data_dir", data_dir)


def test_class_names_in_another_order_are_matched_by_name(data_dir, tmp_path, capsys):
    names = "5678901234"
    path = str(tmp_path / "other.npz")
    pretrained = save_random(path, names)
    images, digits = digits_test_set()
    logits = logits_of(pretrained, images)
    predicted = np.asarray(logits).argmax(1)
    arguments = ["--checkpoint", path, "--dataset", "digits", "--data_dir", data_dir]
    arguments += ["--json", str(tmp_path / "result.json")]

    run_main(*arguments, "--per_class", "--confusion", str(tmp_path / "c.npz"))
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

    run_main(*arguments, "--ignore_class_names")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] == np.mean(predicted == digits) != np.mean(hits)


@pytest.mark.parametrize("split", ["val", "valid", "validation", "test"])
def test_a_folder_of_some_classes_and_nothing_to_train_on_is_matched_by_name(
    split, tmp_path, capsys
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
    run_main(*arguments, "--json", str(tmp_path / "result.json"), "--per_class")
    assert "matched by name: 3 of the checkpoint's 10" in capsys.readouterr().out
    logits = logits_of(pretrained, images[chosen])
    hits = np.asarray(logits).argmax(1) == digits[chosen]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["accuracy"], result["examples"]) == (np.mean(hits), chosen.sum())
    assert [row["name"] for row in result["per_class"]] == ["eight", "seven", "three"]
    for row in result["per_class"]:
        assert row["accuracy"] == np.mean(hits[digits[chosen] == words.index(row["name"])])
    # Among the three alone.
    run_main(*arguments, "--among", "dataset", "--json", str(tmp_path / "result.json"))
    assert "the 3 classes of the data set are chosen among, of 10" in capsys.readouterr().out
    among = np.where(np.isin(np.arange(10), [3, 7, 8]), logits, -np.inf)
    fewer = json.loads((tmp_path / "result.json").read_text())
    assert fewer["accuracy"] == np.mean(among.argmax(1) == digits[chosen]) > np.mean(hits)
    assert fewer["loss"] == pytest.approx(
        metrics.log_loss(digits[chosen], scipy.special.softmax(among, 1), labels=range(10)),
        rel=1e-4,
    )


@pytest.fixture(scope="module")
def imagenet_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "imagenet.npz"
    return save_random(path, None, num_classes=1000).source


def real_examples():
    return prepared.random_examples("imagenet2012_real", 6, np.random.default_rng(1))


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    """Six made-up images in each split of imagenet2012 and in imagenet2012_real."""
    data_dir = tmp_path_factory.mktemp("imagenet")
    images = prepared.random_examples("imagenet2012", 6, np.random.default_rng(0))
    prepared.write("imagenet2012", data_dir, {"train": images, "validation": images})
    prepared.write("imagenet2012_real", data_dir, {"validation": real_examples()})
    return str(data_dir)


@pytest.fixture
def run_imagenet(imagenet_checkpoint, imagenet_dir, tmp_path):
    """Evaluates on made-up images of imagenet2012, and returns the results."""

    def run(*flags):
        path = tmp_path / "result.json"
        run_main(
            "--checkpoint", imagenet_checkpoint, "--dataset", "imagenet2012",
            "--data_dir", imagenet_dir, "--json", str(path), *flags,
        )  # fmt: skip
        return json.loads(path.read_text())

    return run


def test_imagenet_is_scored_on_its_own_labels_and_on_real(run_imagenet):
    result = run_imagenet()
    assert (result["split"], result["examples"]) == ("validation", 6)
    assert result["real_examples"] == sum(
        bool(example["real_label"]) for example in real_examples()
    )
    assert 0 <= result["real_accuracy"] <= 1


def test_real_is_of_the_validation_split_only(run_imagenet):
    assert "real_accuracy" not in run_imagenet("--split", "train")


def test_imagenet_without_real_says_so(run_imagenet, monkeypatch, capsys):
    def open_real(**_):
        raise UserError("data set 'imagenet2012_real' is not prepared")

    monkeypatch.setattr(datasets, "open_real", open_real)
    assert "real_accuracy" not in run_imagenet()
    *_, line = capsys.readouterr().out.splitlines()
    assert line == "ImageNet-ReaL is left out: data set 'imagenet2012_real' is not prepared"


def test_real_alone_has_no_single_label(imagenet_checkpoint):
    for flag in (["--fewshot=1"], ["--per_class"], ["--confusion=confusion.csv"]):
        with pytest.raises(UserError, match="need --dataset imagenet2012"):
            run_main(
                "--checkpoint", imagenet_checkpoint, "--dataset", "imagenet2012_real",
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
    info_path(path).unlink()
    bias = np.zeros(1000, np.float32)
    bias[[*range(4), *(i for several in OBJECTNET.values() for i in several)]] = 20
    pretrained.params["head"]["bias"] = bias
    names = [name for name in pixels if name[0] in OBJECTNET]
    images = np.stack([pixels[name] for name in names]).astype(np.float32)
    save_pretrained(pretrained, str(path), "official")
    return names, logits_of(pretrained, images)


def test_objectnet_counts_every_class_that_it_stands_for(objectnet_folder, tmp_path, capsys):
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
        "--checkpoint", str(tmp_path / "imagenet.npz"), "--json", str(path),
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


def test_objectnet_needs_imagenets_classes_in_their_order(objectnet_folder, checkpoint, tmp_path):
    dataset = ["--dataset", f"objectnet:{objectnet_folder[0]}"]
    with pytest.raises(UserError, match="has 10 classes and ObjectNet is scored by ImageNet's"):
        run_main("--checkpoint", checkpoint.source, *dataset)
    other = tmp_path / "other.npz"
    save_random(other, [f"class {i}" for i in range(1000)], num_classes=1000)
    with pytest.raises(UserError, match="class 0 is 'class 0' in the checkpoint and 'n01440764'"):
        run_main("--checkpoint", str(other), *dataset)
    for flag in ("--fewshot=1", "--per_class", "--confusion=c.csv", "--split=test"):
        with pytest.raises(UserError, match="objectnet has several labels an image"):
            run_main("--checkpoint", str(other), *dataset, flag)


@pytest.mark.parametrize("below", ["", "checkpoints", "best", "best/2"])
def test_a_run_is_scored_on_what_it_held_out_unless_something_else_is_named(
    tmp_path, monkeypatch, capsys, below
):
    """Training's own last evaluation is what it must agree with."""
    monkeypatch.chdir(tmp_path)
    for label, color in enumerate(("red", "lime", "blue")):
        (tmp_path / "photos" / color).mkdir(parents=True)
        for number in range(10):
            image = PIL.Image.new("RGB", (8, 8), color if number else "white")
            image.save(tmp_path / "photos" / color / f"{label}{number}.png")
    config = config_files.load("digits").config
    config.dataset.update(name="folder:photos", image_size=8, holdout=0.3, channels=3)
    config.duration, config.checkpoint_every, config.evals.val.every = (
        "2 steps",
        "2 steps",
        "2 steps",
    )
    config.batch_size = 4
    config.schedule.warmup = "1 step"
    config.model.update(num_layers=1, hidden_size=8, mlp_dim=8, num_heads=1, patch_size=4)
    trained = train.train(config, tmp_path / "runs" / "photos")
    capsys.readouterr()
    checkpoint = str(pathlib.Path("runs/photos", below))
    assert run_main("--checkpoint", checkpoint, "--json", "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["dataset"] == "folder:photos"
    assert result["examples"] == 9
    assert result["accuracy"] == trained["accuracy"]
    assert result["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert capsys.readouterr().out.startswith(
        f"of {tmp_path}/runs/photos/config.json: --dataset folder:photos\n"
    )
    assert run_main("--checkpoint", checkpoint, "--dataset", "photos/", "--json", "again.json") == 0
    assert json.loads((tmp_path / "again.json").read_text()) == result


def test_weights_alone_have_no_data_set(checkpoint):
    with pytest.raises(UserError, match="--dataset is missing, and .* is not a run"):
        run_main("--checkpoint", checkpoint.source)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    flags = ["--checkpoint", str(tmp_path / "no.npz"), "--dataset", f"folder:{tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    with pytest.raises(SystemExit) as end:
        command.run(evaluate.main)
    assert end.value.code == 2
    output = "".join(capsys.readouterr())
    assert output.startswith("error: ") and output.count("\n") == 1
    assert "no.npz does not exist" in output
