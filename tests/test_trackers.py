"""Trackers: a stand-in that notes what it is given, and the real ones where they are there."""

import io
import json
import re
import threading

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_jax import trackers, train
from vit_jax.errors import UserError
from vit_jax.trackers import Tracking, parse_track
from vit_jax.writers import Line

from .runs import train_until


class StandIn:
    """Notes points and pictures; `fails` says at which step, `waits` for what."""

    points, pictures, runs = [], [], []
    fails, waits = None, None

    def __init__(self, target, run):
        self.runs.append((target, run.identity, run.config))
        if not run.identity:
            run.remember("an identity")

    def write_scalars(self, step, scalars):
        if self.waits:
            self.waits.wait()
        if step == self.fails:
            raise ConnectionError("the network\nis gone")
        self.points.extend((step, tag, x) for tag, x in scalars.items())

    def write_picture(self, step, name, _):
        self.pictures.append((step, name))

    def close(self):
        self.points.append("closed")


@pytest.fixture
def stand_in(monkeypatch):
    class Fresh(StandIn):
        points, pictures, runs = [], [], []

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Fresh)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    return Fresh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wandbb", r"--track 'wandbb' is unknown: did you mean wandb\? use tensorboard, wandb, ml"),
        ("mlflow:", r"--track 'mlflow:' is not understood: use mlflow:vit_jax"),
        ("tensorboard:x", r"--track 'tensorboard:x' is unknown: did you mean tensorboard\?"),
        ("wandb:x", "--track wandb needs a package that is not installed: pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_told_in_a_line(text, message, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        parse_track(text)


def test_scalars_and_pictures_come_in_their_order(stand_in, tmp_path):
    tracking = Tracking(parse_track("mlflow:flowers"), tmp_path, {"seed": 1}, [])
    tracking.write_scalars(1, {"train/loss": 2.0})
    tracking.write_picture(1, "train/inputs", b"")
    tracking.write_scalars(2, {"train/loss": 1.0})
    tracking.close()
    assert stand_in.runs == [("flowers", "", {"seed": 1})]
    assert stand_in.points == [(1, "train/loss", 2.0), (2, "train/loss", 1.0), "closed"]
    assert stand_in.pictures == [(1, "train/inputs")]


def test_a_tracker_that_fails_is_told_once_and_left(stand_in, tmp_path, capsys):
    stand_in.fails = 2
    tracking = Tracking(parse_track("mlflow"), tmp_path, {}, [])
    for step in range(1, 5):
        tracking.write_scalars(step, {"train/loss": 1.0})
    tracking.close()
    assert stand_in.points == [(1, "train/loss", 1.0)]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("mlflow has failed (ConnectionError: the network")
    assert line.endswith("the run goes on without it")


def test_a_tracker_that_hangs_does_not_hold_up_the_run(stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "_PATIENCE", 0.1)
    stand_in.waits = threading.Event()
    tracking = Tracking(parse_track("mlflow"), tmp_path, {}, [])
    tracking.write_scalars(1, {"train/loss": 1.0})
    tracking.close()
    assert "mlflow has not taken everything" in capsys.readouterr().out
    stand_in.waits.set()


@pytest.mark.parametrize("known", [True, False])
def test_what_an_earlier_part_has_sent_is_not_sent_again(known, stand_in, tmp_path):
    if known:
        (tmp_path / "tracking.json").write_text('{"mlflow": "an identity"}')
    again = [Line(5, {"loss": 1.0, "learning_rate": 0.1}), Line(6, {"eval_loss": 1.0})]
    tracking = Tracking(parse_track("mlflow"), tmp_path, {}, again)
    tracking.write_scalars(5, {"train/loss": 1.0})
    tracking.write_scalars(6, {"train/loss": 0.5})
    tracking.write_scalars(6, {"eval/loss": 1.0})
    tracking.write_picture(6, "eval/attention", b"")
    tracking.write_picture(7, "eval/attention", b"")
    tracking.close()
    new = [(6, "train/loss", 0.5), "closed"]
    old = [(5, "train/loss", 1.0), new[0], (6, "eval/loss", 1.0), "closed"]
    assert stand_in.points == (new if known else old)
    # A picture comes after its scalars: it may be what was lost.
    assert [step for step, _ in stand_in.pictures] == [6, 7]


@pytest.mark.parametrize("text", ['{"mlflow": "an', "[1]", "7"])
def test_a_damaged_identity_is_none(text, stand_in, tmp_path):
    (tmp_path / "tracking.json").write_text(text)
    Tracking(parse_track("mlflow"), tmp_path, {}, []).close()
    assert [identity for _, identity, _ in stand_in.runs] == [""]


def test_a_run_that_is_killed_has_every_point_once(stand_in, tiny_config, tmp_path):
    config, shown = tiny_config(), train.Shown(track="mlflow")
    original = train.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", lambda config, workdir: original(config, workdir, shown))
        with pytest.raises(KeyboardInterrupt):
            train_until(config, tmp_path / "run", step=6)  # The last checkpoint is of step 4.
    original(config, tmp_path / "run", shown)
    assert [identity for _, identity, _ in stand_in.runs] == ["", "an identity"]
    points = [point[:2] for point in stand_in.points if point != "closed"]
    assert len(points) == len(set(points))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for tag, steps in (("train/loss", [1, 2, 3, 4, 5, 6]), ("eval/accuracy", [4, 6])):
        assert [step for step, found in points if found == tag] == steps
        assert [x.step for x in events.Scalars(tag)] == steps  # In TensorBoard likewise.


def png():
    data = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(data, "PNG")
    return data.getvalue()


def test_mlflow_itself_has_one_run_of_two_parts(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    config = {"dataset": {"name": "folder:/a|b"}, "evals": {}, **{f"k{i}": i for i in range(250)}}
    lines = [Line(step, {"loss": step, "learning_rate": 0.1}) for step in (2, 3)]
    for part, again in ((range(1, 4), []), (range(2, 5), lines)):
        tracking = Tracking(parse_track("mlflow:flowers"), tmp_path, config, again)
        for step in part:
            tracking.write_scalars(step, {"train/loss": float(step)})
        tracking.write_picture(part[-1], "eval/attention", png())
        tracking.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("flowers")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert run.data.params["dataset.name"] == "folder:/a|b" and run.data.params["k249"] == "249"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(x.step, x.value) for x in history] == [(step, step) for step in (1, 2, 3, 4)]
    assert client.list_artifacts(run.info.run_id, "images")


def test_wandb_itself_goes_on_under_the_same_identity(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        tracking = Tracking(parse_track("wandb:flowers"), tmp_path, {"seed": step}, [])
        tracking.write_scalars(step, {"train/loss": 1.0})
        tracking.write_picture(step, "eval/attention", png())
        tracking.close()
    identity = json.loads((tmp_path / "tracking.json").read_text())["wandb"]
    parts = sorted(tmp_path.glob("wandb/offline-run-*"))
    # The second of one moment has a number behind its name.
    names = [re.fullmatch(r"offline-run-\d+_\d+-(\w+?)(-\d+)?", part.name) for part in parts]
    assert [name and name[1] for name in names] == [identity] * 2
    assert "failed" not in capsys.readouterr().out
