"""The evaluators of a run, and how one is added."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from vit_jax import train
from vit_jax.config import check_config
from vit_jax.data import datasets
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluation import registry
from vit_jax.evaluation.metrics import classification_metrics, make_apply_fn
from vit_jax.evaluation.registry import EVALUATORS, EvaluatorType, complete, create_evaluators
from vit_jax.evaluation.watched import Watched
from vit_jax.models import create_model
from vit_jax.sharding import make_mesh
from vit_jax.steps import classification

from .. import prepared
from ..runs import read_metrics


def norm(settings, watched):
    """The evaluator that the docs add: the norm of all parameters, to some power."""
    del watched
    return lambda params: {
        "norm": sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) ** settings["power"]
    }


def test_an_evaluator_is_added_by_a_line_and_an_entry(
    finished, tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(EVALUATORS, "norm", EvaluatorType(norm, keys={"power": 0.5}))
    config = tiny_config()
    config.evals.size = {"type": "norm", "every": "2 steps"}
    train.train(config, tmp_path / "run")
    found = [r for r in read_metrics(tmp_path / "run") if "size/norm" in r]
    assert [r["step"] for r in found] == [2, 4, 6]
    assert all(r.keys() == {"step", "size/norm"} and r["size/norm"] > 0 for r in found)
    assert "step 2/6  evaluated size: norm " in capsys.readouterr().out
    others = [r for r in read_metrics(tmp_path / "run") if r not in found]
    assert others == read_metrics(finished)
    # What the entry left to the type is in config.json.
    saved = json.loads((tmp_path / "run/config.json").read_text())["evals"]["size"]
    assert saved == {"type": "norm", "power": 0.5, "every": "2 steps", "dataset": "",
                     "data_dir": "", "split": ""}  # fmt: skip


def test_several_sets_are_watched_in_one_run(tiny_config, tmp_path, capsys):
    config = tiny_config(**{"evals.val.split": "train[90%:]"})
    config.evals.test = {"type": "classification", "split": "test", "every": "0 steps"}
    config.evals.train = {"type": "objective", "split": "train[:100]", "every": "3 steps"}
    final = train.train(config, tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    steps = {
        name: [r["step"] for r in records if name in r]
        for name in ("eval_accuracy", "test/accuracy", "train/accuracy")
    }
    assert steps == {
        "eval_accuracy": [4, 6], "test/accuracy": [6], "train/accuracy": [3, 6]
    }  # fmt: skip
    names = {"accuracy", "top5_accuracy", "loss", "calibration_error"}
    assert records[-1].keys() | records[-2].keys() >= {f"test/{name}" for name in names}
    # val decides, wherever its images are from.
    assert final["examples"] == 144
    output = capsys.readouterr().out
    assert "evaluated on 144 images of train[90%:]: accuracy 0." in output
    assert "evaluated on 355 images of test: accuracy 0." in output
    assert "evaluated on 100 images of train: accuracy 0." in output


def test_fewshot_accuracy_is_measured_while_the_run_goes(finished, tiny_config, tmp_path, capsys):
    config = tiny_config(
        **{
            "evals.fewshot.dataset": "digits",
            "evals.fewshot.data_dir": tiny_config().dataset.data_dir,
            "evals.fewshot.shots": "1,10",
            "evals.fewshot.every": "3 steps",
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
    config = tiny_config(
        **{"evals.fewshot.dataset": "flowers", "evals.fewshot.data_dir": str(tmp_path)}
    )
    with pytest.raises(UserError, match="data set 'flowers' is not known to TFDS"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture
def watched(tiny_config):
    """A run on the digits, and parameters of its model."""
    config = tiny_config()
    model = create_model(config.model, num_classes=10)
    _, source = datasets.open_dataset("digits", data_dir=config.dataset.data_dir)
    images = np.zeros((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    run = Watched(
        model=model,
        trunk=create_model(config.model, num_classes=0),
        objective=classification(model, "softmax"),
        loss="softmax",
        class_names=source.class_names,
        dataset="digits",
        data_dir=config.dataset.data_dir,
        eval_source=source,
        preprocessing=Preprocessing(8),
        batch_size=32,
        mesh=make_mesh(),
    )
    return run, params


def evaluator(settings, run):
    return EVALUATORS[settings["type"]].create(complete(settings), run)


def test_the_classification_evaluator_gives_what_the_metrics_do(watched):
    run, params = watched
    found = evaluator({"type": "classification"}, run)(params)
    apply_fn = make_apply_fn(run.model, run.mesh)
    whole = classification_metrics(apply_fn, params, run.batches(run.eval_source), run.mesh)
    assert found == {
        "examples": 355, "accuracy": whole.accuracy, "top5_accuracy": whole.top5_accuracy,
        "loss": whole.loss, "calibration_error": whole.calibration_error,
    }  # fmt: skip
    # The objective's accuracy and loss are the same on the same images.
    objective = evaluator({"type": "objective"}, run)(params)
    assert objective["accuracy"] == pytest.approx(whole.accuracy, abs=1e-6)
    assert objective["loss"] == pytest.approx(whole.loss, rel=1e-5)


def test_another_data_set_is_scored_by_the_names_of_its_classes(watched, tmp_path):
    run, params = watched
    rng = np.random.default_rng(0)
    names = ("seven", "three")
    run_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for name in names:
        (tmp_path / "test" / name).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "test" / name / f"{i}.png")
    run = Watched(**{**vars(run), "class_names": run_names})
    source = run.open(complete({"type": "objective", "dataset": f"folder:{tmp_path}"}))
    assert {r["label"] for r in source} == {7, 3}
    run = Watched(**{**vars(run), "class_names": ("cat", "dog")})
    with pytest.raises(UserError, match="has 2 classes that are not all among the 2 of digits"):
        run.open(complete({"type": "objective", "dataset": f"folder:{tmp_path}"}))


def test_the_folder_of_a_run_is_its_own_however_it_is_written(watched, tmp_path, monkeypatch):
    for name, count in (("cat", 5), ("dog", 5)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(count):
            PIL.Image.new("L", (8, 8)).save(tmp_path / "pets" / name / f"{i}.png")
    (tmp_path / "link").symlink_to("pets")
    train, held_out = datasets.open_dataset(f"folder:{tmp_path}/pets")
    monkeypatch.chdir(tmp_path)
    changes = {"class_names": train.class_names, "eval_source": held_out}
    for own in (f"folder:{tmp_path}/pets", "folder:pets"):
        told: list[str] = []
        changes |= {"dataset": own, "report": told.append}
        run = Watched(**{**vars(watched[0]), **changes})
        for name in ("pets", "pets/", "./pets", f"{tmp_path}/pets", "link"):
            source = run.open(complete({"type": "objective", "dataset": f"folder:{name}"}))
            assert [os.path.realpath(x) for x in source.ids()] == held_out.ids()
            assert told.pop().endswith("the images that the run held out are scored, 2")
        (tmp_path / "pets/.list.csv").write_text("path,label\ncat/0.png,cat\n")  # In that folder.
        source = run.open(complete({"type": "objective", "dataset": "list:pets/.list.csv"}))
        assert told.pop().endswith("it has no splits, so all images are scored, 1")
        assert not told


def test_a_data_set_named_by_itself_has_its_usual_split(watched):
    run, _ = watched
    held_out = Watched(**{**vars(run), "eval_source": None})
    named = held_out.open(complete({"type": "objective", "dataset": "digits"}))
    assert (named.split, named.num_examples) == ("test", 355)
    assert held_out.open(complete({"type": "objective"})) is None


def test_real_is_scored_on_imagenets_own_images(watched, tmp_path):
    run, _ = watched
    examples = prepared.random_examples("imagenet2012_real", 6, np.random.default_rng(0))
    prepared.write("imagenet2012_real", tmp_path, {"validation": examples})
    source = datasets.open_real(data_dir=str(tmp_path))
    labeled = [bool(example["real_label"]) for example in examples]
    model = create_model({
        "architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1,
        "mlp_dim": 8, "num_heads": 2, "num_classes": 1000,
    })  # fmt: skip
    images = np.zeros((1, 8, 8, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    changes = {"model": model, "class_names": source.class_names, "dataset": "imagenet2012"}
    settings = {"type": "real", "data_dir": str(tmp_path)}
    found = evaluator(settings, Watched(**{**vars(run), **changes}))(params)
    assert found["examples"] == sum(labeled)
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"type": "real", "dataset": "cifar10"},
            "'cifar10' has no labels of ReaL: type real takes",
        ),
        ({"type": "objectnet", "dataset": "cifar10"}, "'cifar10': type objectnet takes objectnet:"),
        ({"type": "objective", "split": "no"}, "split 'no' of data set 'digits' cannot be read"),
        ({"type": "objective", "every": "5 hours"}, "duration '5 hours' is not understood"),
    ],
)
def test_an_evaluator_that_cannot_be_made_is_told_by_its_name(watched, settings, message):
    run, _ = watched

    def count(duration):
        if duration == "5 hours":
            raise UserError(f"duration {duration!r} is not understood")
        return 1

    evals = {"val": complete({"type": "objective"}), "other": complete(settings)}
    with pytest.raises(UserError, match=f"config.evals.other: .*{message}"):
        create_evaluators(evals, run, count)


@pytest.mark.parametrize("kind", ["classification", "real", "objectnet"])
def test_what_scores_classes_is_refused_where_none_are_predicted(watched, kind):
    run, _ = watched
    run = Watched(**{**vars(run), "class_names": None})
    with pytest.raises(UserError, match=f"type {kind} scores predicted classes, which the run's"):
        evaluator({"type": kind, "dataset": "digits"}, run)


class Recording(dict):
    """Settings that take down which of them are read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("kind", EVALUATORS)
def test_every_key_of_an_entry_is_read(watched, tmp_path, kind, monkeypatch):
    run, _ = watched
    given = {"objectnet": f"objectnet:{tmp_path}", "fewshot": "digits", "real": datasets.REAL}
    settings = {"type": kind, "dataset": given.get(kind, "digits"), "split": "test"}
    settings |= {"data_dir": "" if kind == "objectnet" else run.data_dir}
    if kind == "objectnet":
        settings["split"] = ""
    if kind in ("real", "objectnet"):
        monkeypatch.setattr(datasets, "open_real", lambda **_: run.eval_source)
        monkeypatch.setattr(
            "vit_jax.data.objectnet.open_objectnet", lambda _: (run.eval_source, 1, 0)
        )
    recording = Recording(complete(settings))
    create_evaluators({"val": recording}, run, lambda duration: 1)
    assert recording.read == set(recording)


def test_the_evaluators_come_in_one_order_and_the_deciding_one_first(watched):
    run, _ = watched
    evals = {name: complete({"type": "objective"}) for name in ("z", "val", "a")}
    evals["off"] = complete({"type": "fewshot"})
    found = create_evaluators(evals, run, lambda duration: 7)
    assert [(x.name, x.prefix, x.every) for x in found] == [
        ("val", "eval_", 7), ("a", "a/", 7), ("z", "z/", 7)
    ]  # fmt: skip
    scalars = {"examples": 1355, "accuracy": 0.12345}
    lines = [x.describe(scalars) for x in found[:2]]
    assert lines == [
        "evaluated on 1,355 images of test: accuracy 0.1235",
        "evaluated on 1,355 images of a: accuracy 0.1235",
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "fewshots"}, "config.evals.new: type 'fewshots' is unknown: did you mean fewsho"),
        (
            {"type": 7},
            "config.evals.new: type '7' is unknown: use one of objective, classification",
        ),
        ({"every": "1 step"}, "config.evals.new: type '' is unknown: use one of objective"),
        (
            {"type": "objective", "splits": ""},
            "config.evals.new.splits is not a key .* did you mea",
        ),
        ({"type": "objective", "shots": "1"}, "config.evals.new.shots is not a key that anything"),
        ({"type": "objective", "every": 3}, "config.evals.new.every is 3: it must be of type str"),
        ({"type": "fewshot", "shots": "0"}, "shots '0' are not positive numbers, each once"),
    ],
)
def test_an_entry_with_a_mistake_is_refused(tiny_config, entry, message):
    config = tiny_config()
    config.evals.new = entry
    with pytest.raises(UserError, match=message) as error:
        check_config(config)
    assert "\n" not in str(error.value)


def test_an_entry_is_a_section(tiny_config):
    config = tiny_config()
    config.evals.new = "objective"
    with pytest.raises(UserError, match="config.evals.new is 'objective': it is a section of keys"):
        check_config(config)


@pytest.mark.parametrize("entry", [None, {"type": "fewshot"}, {"type": "real", "dataset": ""}])
def test_one_entry_decides(tiny_config, entry):
    config = tiny_config()
    del config.evals.val
    if entry:
        config.evals.val = entry
    with pytest.raises(UserError, match="config.evals.val is .*it decides which checkpoint is the"):
        check_config(config)


def test_two_entries_do_not_write_under_one_name(tiny_config):
    config = tiny_config(**{"evals.fewshot.dataset": "digits"})
    config.evals.again = {"type": "fewshot", "dataset": "digits:1.0.0"}
    with pytest.raises(UserError, match="write its scalars under the names of those of config.ev"):
        check_config(config)


def test_which_images_decide_may_not_change_but_what_else_is_watched_may(
    finished, tiny_config, capsys
):
    config = tiny_config(**{"evals.val.every": "1 step", "evals.fewshot.dataset": "digits"})
    config.evals.train = {"type": "objective", "split": "train[:10]"}
    train.train(config, finished)
    assert "holds a finished run: nothing to do" in capsys.readouterr().out
    config.evals.val.split = "train"
    with pytest.raises(UserError, match="evals.val.split:  in the checkpoint, train now"):
        train.train(config, finished)


def test_the_registry_names_imagenet_real_as_the_data_does():
    assert registry.EVALUATORS["real"].defaults["dataset"] == datasets.REAL
