"""The files of a run in progress: metrics.jsonl, and TensorBoard's events."""

import json
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

# protobuf makes the classes as the modules are imported.
from tensorboard.compat.proto.event_pb2 import (
    Event,  # ty: ignore[missing-module-member]
    SessionLog,  # ty: ignore[missing-module-member]
)
from tensorboard.compat.proto.summary_pb2 import Summary  # ty: ignore[missing-module-member]
from tensorboard.summary.writer.record_writer import RecordWriter

from vit_jax.files import atomic_write
from vit_jax.printable import printable

Scalars = Mapping[str, Any]

_RGB = 3  # of summary.proto's color spaces
# A name that every line of training has, and no other.
_OF_TRAINING = "learning_rate"


def tags(scalars: Scalars) -> dict[str, Any]:
    """The scalars of a line of metrics.jsonl by the names that TensorBoard shows them under.

    Those of training are `train/loss` and so on, those of val `eval/loss`, and those of other
    evaluators `eval/NAME/SCALAR`.
    """
    if _OF_TRAINING in scalars:
        return {f"train/{name}": x for name, x in scalars.items()}
    return {f"eval/{name.removeprefix('eval_')}": x for name, x in scalars.items()}


class Line(NamedTuple):
    """A line of metrics.jsonl: a step and its scalars."""

    step: int
    scalars: dict[str, Any]


class JsonlWriter:
    """Appends scalars to a file, one JSON object a line.

    Attributes:
        kept: the lines of `last_step` that an earlier part of the run has left.
        dropped: the later lines, which a killed run wrote after its last checkpoint: the resumed
            run writes them again.
    """

    def __init__(self, path: pathlib.Path, last_step: int, owes_evaluation: bool = False):
        """Opens the file.

        Args:
            path: of the file.
            last_step: of the run.
            owes_evaluation: whether the evaluations of `last_step` are made again too.
        """
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = []
        self.kept: list[Line] = []
        self.dropped: list[Line] = []
        for text in lines:
            line = _parse(text)
            if line is None:
                continue
            if _is_kept(line, last_step, owes_evaluation):
                kept.append(text)
                self.kept += [line] if line.step == last_step else []
            else:
                self.dropped.append(line)
        with atomic_write(path) as part:
            part.write_text("".join(kept))
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _parse(text: str) -> Line | None:
    try:
        record = json.loads(text)
    except ValueError:  # The last line of a run that was killed while writing it.
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None  # Nobody but an editor wrote it.
    return Line(record.pop("step"), record)


def _is_kept(line: Line, last_step: int, owes_evaluation: bool) -> bool:
    if line.step == last_step and owes_evaluation:
        return _OF_TRAINING in line.scalars
    return line.step <= last_step


class EventWriter:
    """Appends scalars and pictures to a file of events of its own, which TensorBoard reads.

    TensorBoard's writer of such files would import TensorFlow, which takes seconds.

    Args:
        directory: of the run.
        first_step: what earlier files have of this step and later is not shown any more.
    """

    def __init__(self, directory: pathlib.Path, first_step: int):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("ab"))
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Writes the scalars of a step."""
        values = [Summary.Value(tag=printable(name), simple_value=x) for name, x in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture of a step."""
        width, height = struct.unpack(">2I", png[16:24])  # PNG begins with both.
        image = Summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=png)
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()
