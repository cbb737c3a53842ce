"""An evaluation that fails, or is ended, costs no step of training."""

import shutil
import signal

import pytest
from PIL import Image

from vit_jax import train
from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot, metrics

from .runs import assert_same_run, checkpoint_steps

SAVED = "step 4 is saved, and the same command continues from there"
FEWSHOT = {"dataset": "digits", "shots": "1", "every": "4 steps"}


def failing(original, error):
    """Raises an error, or does what it is, the first time it is called; then it is as it was."""
    errors = [error]

    def evaluate(*args):
        if not errors:
            return original(*args)
        error = errors.pop()
        if callable(error):
            error()
        raise error

    return evaluate


@pytest.fixture(scope="module")
def whole_workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def config(tiny_config):
    """Few-shot accuracy beside the usual."""
    config = tiny_config()
    config.evals.fewshot.update(FEWSHOT | {"data_dir": config.dataset.data_dir})
    return config


@pytest.fixture
def whole(config, whole_workdir):
    """A run that nothing disturbed."""
    if not whole_workdir.exists():
        train.train(config, whole_workdir)
    return whole_workdir


DAMAGED = UserError("image test/a.jpg is damaged")


@pytest.mark.parametrize(
    ("module", "name", "every", "error", "message"),
    [
        (metrics, "mean_metrics", "1000 steps", DAMAGED, f"^{DAMAGED}; {SAVED}$"),
        (metrics, "mean_metrics", "1000 steps", MemoryError("the device"), "^the device$"),
        (fewshot, "_accuracies", "2 steps", DAMAGED, f"^{DAMAGED}; {SAVED}$"),
    ],
)
def test_the_step_of_an_evaluation_that_fails_is_saved_and_evaluated_again(
    config, whole, tmp_path, monkeypatch, module, name, every, error, message
):
    config.checkpoint_every = every
    run = tmp_path / "run"
    monkeypatch.setattr(module, name, failing(getattr(module, name), error))
    with pytest.raises(type(error), match=message):
        train.train(config, run)
    assert max(checkpoint_steps(run)) == 4
    train.train(config, run)
    assert_same_run(whole, run, 6)


def test_a_kill_in_an_evaluation_costs_no_step(config, whole, tmp_path, monkeypatch):
    # What is not a signal's is saved no more than after a kill; val has been evaluated.
    run = tmp_path / "run"
    killed = failing(fewshot._accuracies, KeyboardInterrupt())
    monkeypatch.setattr(fewshot, "_accuracies", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, run)
    assert max(checkpoint_steps(run)) == 4
    train.train(config, run)
    assert_same_run(whole, run, 6)


def test_a_signal_does_not_wait_for_an_evaluation(config, whole, tmp_path, monkeypatch, capsys):
    config.checkpoint_every = "1000 steps"
    run = tmp_path / "run"
    stopped = failing(metrics.mean_metrics, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(metrics, "mean_metrics", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, run)
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "SIGINT: saved step 4; the same command continues from there"
    train.train(config, run)
    assert_same_run(whole, run, 6)


def test_an_evaluation_that_is_taken_out_is_owed_no_more(config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(fewshot, "_accuracies", failing(None, UserError("an image is damaged")))
    with pytest.raises(UserError, match=SAVED):
        train.train(config, run)
    config.evals.fewshot.dataset = ""
    assert train.train(config, run)["step"] == 6


def make_folder(path):
    """Two classes of noisy JPEGs: 16 images to train on, 4 to test."""
    for split, count in (("train", 8), ("test", 2)):
        for name in ("aster", "rose"):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.effect_noise((24, 24), 60 if name == "rose" else 20)
                image.convert("RGB").save(path / split / name / f"{i}.jpg")
    return path


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A folder of images, and beside it the workdir of a run on them that nothing disturbed."""
    return make_folder(tmp_path_factory.mktemp("flowers") / "data")


def of_folder(tiny_config, folder):
    return tiny_config(**{"dataset.name": f"folder:{folder}", "batch_size": 8})


@pytest.fixture
def undisturbed(flowers, tiny_config):
    workdir = flowers.with_name("whole")
    if not workdir.exists():
        train.train(of_folder(tiny_config, flowers), workdir)
    return workdir


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def remove(path):
    path.rename(path.with_name("removed"))


@pytest.mark.parametrize(
    ("damage", "name", "fault"),
    [
        (cut, "test/rose/1.jpg", "image {0} is damaged"),
        (cut, "train/rose/1.jpg", "image {0} is damaged"),
        (remove, "test", "the data cannot be read: {0}/.*: No such file or directory; restore"),
    ],
)
def test_data_that_break_in_a_run_are_named_and_when_they_are_mended_nothing_is_lost(
    tiny_config, tmp_path, monkeypatch, flowers, undisturbed, damage, name, fault
):
    folder, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(flowers, folder)
    config = of_folder(tiny_config, folder)
    compile_train_step = train.compile_train_step

    def break_data(*args):  # What is broken at the start is refused then.
        damage(folder / name)
        return compile_train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_train_step", break_data)
        for _ in range(2):  # The same command comes to the same end.
            message = f"^{fault.format(folder / name)}.*; step \\d is saved, and the same command"
            with pytest.raises(UserError, match=message):
                train.train(config, run)
            shutil.rmtree(folder)
            shutil.copytree(flowers, folder)
    if "test" in name:
        assert max(checkpoint_steps(run)) == 4
    train.train(config, run)
    assert_same_run(undisturbed, run, 6)
