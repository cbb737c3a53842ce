"""Weights & Biases and MLflow: the run as their pages show it, by their own libraries.

A tracker works in a thread of its own. Whatever goes wrong in it, a network that is gone or a
library that fails, is told in one line, and the training goes on without it.
"""

import io
import json
import os
import pathlib
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from flax.traverse_util import flatten_dict
from PIL import Image

from vit_jax.errors import UserError, brief, first_line, nearest
from vit_jax.files import write_json
from vit_jax.terminal import say
from vit_jax.writers import Line, tags

# What a run is called where the user names nothing else.
_PROJECT = "vit_jax"
# Beside the run: under which name each tracker knows it.
_IDENTITIES = "tracking.json"
# Of what has not been sent when the run ends.
_PATIENCE = 60.0  # seconds


class Track(NamedTuple):
    """A tracker as `--track` names it: "wandb:PROJECT", "mlflow:EXPERIMENT" or "tensorboard"."""

    name: str
    target: str


TENSORBOARD = Track("tensorboard", "")


class Tracker(Protocol):
    """Takes what a run shows; any method may raise anything."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars of a step."""
        ...

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        """Takes a picture of a step."""
        ...

    def close(self) -> None:
        """Waits until all has been taken."""
        ...


class Run(NamedTuple):
    """A run, as a tracker is told of it.

    Attributes:
        workdir: of the run, whose name is that of the run.
        config: nested.
        identity: under which the tracker knows it from an earlier part; "" if it does not.
        remember: takes the identity of a new one, before anything is written.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    identity: str
    remember: Callable[[str], None]


def parse_track(text: str) -> Track:
    """Reads `--track`; "" is TensorBoard, which every run writes for.

    Raises:
        UserError: there is no such tracker, or its package is not installed.
    """
    name, colon, target = text.partition(":")
    if text in ("", TENSORBOARD.name):
        return TENSORBOARD
    if name not in TRACKERS:
        names = (TENSORBOARD.name, *TRACKERS)
        hint = f"did you mean {near}? " if (near := nearest(name, names)) else ""
        raise UserError(f"--track {brief(text)} is unknown: {hint}use {', '.join(names)}")
    if colon and not target:
        raise UserError(f"--track {brief(text)} is not understood: use {name}:{_PROJECT}")
    if find_spec(name) is None:
        raise UserError(f"--track {name} needs a package that is not installed: pip install {name}")
    return Track(name, target)


class Tracking:
    """Hands on what a run shows to a tracker, in the order in which it comes.

    Args:
        track: of `parse_track`.
        workdir: of the run.
        config: of the run.
        again: lines that an earlier part of the run has written, which this one writes again:
            where the tracker has their scalars already, these are left out.
    """

    def __init__(
        self,
        track: Track,
        workdir: pathlib.Path,
        config: Mapping[str, Any],
        again: Collection[Line],
    ):
        self._name = track.name
        self._tasks: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._is_over = threading.Event()
        identity = _identities(workdir).get(track.name, "")
        lines = again if identity else ()
        self._sent = {(line.step, tag) for line in lines for tag in tags(line.scalars)}
        run = Run(workdir, config, identity, lambda new: _remember(workdir, track.name, new))
        create = TRACKERS[track.name]
        self._thread = threading.Thread(
            target=self._work, args=(lambda: create(track.target, run),), daemon=True
        )
        self._thread.start()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hands on scalars by their tags."""
        new = {tag: x for tag, x in scalars.items() if (step, tag) not in self._sent}
        if new and not self._is_over.is_set():
            self._tasks.put(lambda tracker: tracker.write_scalars(step, new))

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        """Hands on a picture, again if need be: no line tells that an earlier part has sent it."""
        if not self._is_over.is_set():
            self._tasks.put(lambda tracker: tracker.write_picture(step, name, png))

    def close(self) -> None:
        """Waits for the tracker to have taken all, but not for longer than a minute."""
        self._tasks.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            say(f"{self._name} has not taken everything in {_PATIENCE:.0f} s: left as it is")

    def _work(self, create: Callable[[], Tracker]) -> None:
        try:
            tracker = create()
            while (task := self._tasks.get()) is not None:
                task(tracker)
            tracker.close()
        except (Exception, SystemExit) as error:  # Whatever a library and its network may raise.
            self._is_over.set()
            say(
                f"{self._name} has failed ({type(error).__name__}: {first_line(error)}): "
                "the run goes on without it"
            )


def _identities(workdir: pathlib.Path) -> dict[str, str]:
    """Reads what `_remember` has written; a file that is damaged is none."""
    try:
        found = json.loads((workdir / _IDENTITIES).read_text())
        return {str(name): str(x) for name, x in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(workdir: pathlib.Path, name: str, identity: str) -> None:
    write_json(workdir / _IDENTITIES, _identities(workdir) | {name: identity})


class _Wandb:
    """Weights & Biases. Scalars go by a step of the run's own: theirs can only grow."""

    def __init__(self, target: str, run: Run):
        os.environ.setdefault("WANDB_SILENT", "true")  # It would ask for a key in the bar.
        import wandb

        identity = run.identity or secrets.token_hex(4)
        run.remember(identity)
        self._image = wandb.Image
        self._run = wandb.init(
            project=target or os.environ.get("WANDB_PROJECT", _PROJECT),
            id=identity,
            name=run.workdir.name,
            resume="allow",
            dir=run.workdir,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.config.update(dict(run.config), allow_val_change=True)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if self._run.url:
            say(f"wandb: {self._run.url}")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        self._run.log({"step": step, name: self._image(_decode(png))})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLflow, of the server or files that its own variable names, MLFLOW_TRACKING_URI."""

    # The most that it takes at once.
    _PARAMS, _LENGTH = 100, 6000

    def __init__(self, target: str, run: Run):
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # It tells of its tables.
        from mlflow import MlflowClient, entities

        self._entities = entities
        self._client = MlflowClient()
        self._id = run.identity
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create(target, run)
            run.remember(self._id)
            self._write_params(run.config)
        say(f"mlflow: run {self._id} at {self._client.tracking_uri}")

    def _create(self, target: str, run: Run) -> str:
        name = target or os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        return self._client.create_run(experiment, run_name=run.workdir.name).info.run_id

    def _write_params(self, config: Mapping[str, Any]) -> None:
        flat = flatten_dict(dict(config), sep=".", keep_empty_nodes=True)
        params = [
            self._entities.Param(_key(name), str(x)[: self._LENGTH]) for name, x in flat.items()
        ]
        for begin in range(0, len(params), self._PARAMS):
            self._client.log_batch(self._id, params=params[begin : begin + self._PARAMS])

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_key(tag), x, now, step) for tag, x in scalars.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        self._client.log_image(self._id, _decode(png), key=_key(name), step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _decode(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def _key(name: str) -> str:
    """A name of the characters that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)


# By the names of their packages.
TRACKERS: dict[str, Callable[[str, Run], Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}
