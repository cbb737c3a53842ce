"""A model that is served, and all that is told of it. No JAX."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.image_files import read_view
from vit_jax.data.images import open_image
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError, brief, first_line
from vit_jax.evaluation.ranking import top
from vit_jax.export import runtime
from vit_jax.export.engine import ENGINE, read_description
from vit_jax.export.nvidia import import_tensorrt
from vit_jax.export.onnx_file import RAW, read_onnx
from vit_jax.export.parity import as_pixels
from vit_jax.export.stages import OUTPUTS
from vit_jax.printable import printable

ONNX = "model.onnx"
# Of the outputs of an export those that rank classes.
_OF_CLASSES = ("logits", "probabilities")
# In pixels, of images that a model prepares itself. Its graph resizes one axis after the other, and
# takes up to 13 KB a pixel of the longer side for 224 pixels.
_MAX_RAW_SIDE = 2**14


@dataclasses.dataclass(frozen=True)
class Served:
    """A model, from an image file to an answer.

    Attributes:
        name: for people.
        output: what it gives, one of `export.stages.OUTPUTS`.
        output_shape: of one image.
        preprocessing: of an image.
        takes_pixels: whether the model takes uint8 pixels, with mean and std in it.
        takes_raw: whether it takes images of any size, and prepares them itself; see `opened`.
        class_names: in the order of the outputs, or None.
        loss: "softmax" or "sigmoid", for which logits were trained.
        largest: the images that it runs at once, at most; None: any number.
        metadata: what the export wrote beside it, see `Forward.metadata`.
        facts: what else is told of it, by name.
        predict: maps [batch, height, width, channels] to float32 [batch, ...], in one thread.
        close: gives up what the model holds.
    """

    name: str
    output: str
    output_shape: tuple[int, ...]
    preprocessing: Preprocessing
    takes_pixels: bool
    takes_raw: bool
    class_names: tuple[str, ...] | None
    loss: str
    largest: int | None
    metadata: Mapping[str, str]
    facts: Mapping[str, Any]
    predict: Callable[[np.ndarray], np.ndarray]
    close: Callable[[], None] = lambda: None

    @property
    def has_classes(self) -> bool:
        """Tells whether the outputs rank classes."""
        return self.output in _OF_CLASSES

    def view(self, name: str, encoded: bytes) -> np.ndarray:
        """The model's input of an image file, [height, width, channels].

        Args:
            name: of the file, for the message.
            encoded: its content.

        Raises:
            UserError: as `images.read_image` does.
        """
        view = read_view(name, self.preprocessing, encoded)
        return as_pixels(view, self.preprocessing) if self.takes_pixels else view

    @contextlib.contextmanager
    def opened(self, name: str, encoded: bytes) -> Generator[np.ndarray]:
        """Yields the input of a model that prepares images itself, uint8 [height, width, channels].

        Threads wait for each other as in `images.open_image`, so that few are decoded at a time.

        Args:
            name: of the file, for the message.
            encoded: its content.

        Raises:
            UserError: as `images.read_image` does; or a side has more than 16,384 pixels.
        """
        dct, channels = self.preprocessing.jpeg_dct, self.preprocessing.channels
        with open_image(name, encoded, jpeg_dct=dct, channels=channels) as image:
            if max(image.shape[:2]) > _MAX_RAW_SIDE:
                raise UserError(
                    f"{name} has a side of {max(image.shape[:2])} pixels: a model that prepares "
                    f"images itself is given at most {_MAX_RAW_SIDE} here, so make it smaller"
                )
            yield image

    def classes(self, row: np.ndarray, topk: int) -> list[dict[str, Any]]:
        """The most probable classes of a row of outputs, see `ranking.top`."""
        return top(row, self.class_names, self.loss if self.output == "logits" else None, topk)

    def describe(self) -> dict[str, Any]:
        """All that is told of the model, as JSON has it."""
        height, width, channels = self.preprocessing.image_shape
        return {
            "name": self.name,
            "input": {
                "height": None if self.takes_raw else height,
                "width": None if self.takes_raw else width,
                "channels": channels,
                "dtype": "uint8" if self.takes_pixels else "float32",
            },
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "output": self.output,
            "output_shape": list(self.output_shape),
            "loss": self.loss,
            "class_names": self.class_names,
            "largest_batch": self.largest,
            "architecture": self.metadata.get("architecture"),
            "source": self.metadata.get("source"),
            **self.facts,
        }


def find(path: Path) -> Path:
    """The file of a folder that `vit-jax export` wrote: its engine where there is TensorRT.

    An engine that was built of another ONNX file than lies beside it is left out.

    Args:
        path: of the folder; whatever else is named is taken as it is.

    Raises:
        UserError: the folder has no model.
    """
    if not path.is_dir() or (path / "saved_model.pb").is_file():
        return path
    onnx, engine = path / ONNX, path / ENGINE
    if engine.is_file():
        try:
            import_tensorrt()
            if onnx.is_file():
                _check_engine(engine, onnx)
            return engine
        except UserError as error:
            if not onnx.is_file():
                raise
            print(printable(f"{engine} is left out for {onnx.name}: {error}"), flush=True)
    if not onnx.is_file():
        raise UserError(
            f"{path} has neither {ONNX} nor {ENGINE}: name the folder that vit-jax export --output "
            "wrote"
        )
    return onnx


def _check_engine(engine: Path, onnx: Path) -> None:
    """Raises a UserError where an engine says that it was built of another ONNX file."""
    description = read_description(engine)
    built = description.get("onnx")
    if description and (
        not isinstance(built, dict) or built.get("sha256") != read_onnx(onnx).sha256
    ):
        raise UserError(
            "its engine.json names another SHA-256, so it was built of another export; build it "
            "again: python -m vit_jax.export.to_tensorrt"
        )


def is_exported(path: Path) -> bool:
    """Tells whether a path is an export's, and not of weights."""
    inside = (ONNX, ENGINE, "saved_model.pb")
    return path.suffix in (".onnx", ".engine", ".plan") or any((path / x).is_file() for x in inside)


def load(path: Path, device: str | None = None) -> Served:
    """Loads an exported model, and runs it once.

    Args:
        path: of a folder, see `find`, or a file, see `runtime.load`.
        device: see `runtime.load`.

    Raises:
        UserError: as `runtime.load` does; or the file does not say how images are prepared, takes
            them as they are, or is damaged.
    """
    file = find(path)
    model = runtime.load(file, device)
    preprocessing = model.preprocessing
    if preprocessing is None:
        raise UserError(
            f"{file} does not say how images are prepared: serve one that vit-jax export wrote"
        )
    # Height and width may be free.
    wanted = (-1, preprocessing.image_shape[0]), (-1, preprocessing.image_shape[1])
    height, width, channels = model.image_shape
    if height not in wanted[0] or width not in wanted[1] or channels != preprocessing.channels:
        raise UserError(
            f"{file} takes images of {model.image_shape}, and its preprocessing makes "
            f"{preprocessing.image_shape}: export it again"
        )
    takes_raw = model.metadata.get("pixels") == RAW
    served = Served(
        name=printable(file.absolute().parent.name if path.is_dir() else file.name),
        output=model.metadata.get("output", "logits"),
        output_shape=_output_shape(model, preprocessing),
        preprocessing=preprocessing,
        takes_pixels=model.image_dtype == np.uint8,
        takes_raw=takes_raw,
        class_names=model.class_names,
        loss=model.metadata.get("loss", "softmax"),
        largest=1 if takes_raw else model.sizes[1],
        metadata=model.metadata,
        facts={"runtime": _runtime(file, device), "sha256": _sha256(file)},
        predict=model.predict,
        close=model.close,
    )
    _check(served, file)
    return served


def _output_shape(model: runtime.Model, preprocessing: Preprocessing) -> tuple[int, ...]:
    """The shape of what a model gives for an image; two are run, of which each must have its own.

    Raises:
        UserError: the model cannot run them.
    """
    blank = np.zeros((2, *preprocessing.image_shape), model.image_dtype)
    try:
        outputs = model.predict(blank)
    except Exception as error:  # Those of onnxruntime have no common type.
        raise UserError(
            f"{model.path} cannot run 2 images ({first_line(error)}): export it again"
        ) from error
    if outputs.shape[:1] != (2,):
        raise UserError(
            f"{model.path} gives {outputs.shape} for 2 images, not a row for each: export it again"
        )
    return outputs.shape[1:]


def _check(served: Served, file: Path) -> None:
    if served.output not in OUTPUTS:
        raise UserError(f"{file} gives {brief(served.output)}: export one of {', '.join(OUTPUTS)}")
    if not served.has_classes:
        return
    if len(served.output_shape) != 1:
        raise UserError(
            f"{file} gives {served.output} of shape {served.output_shape} an image: export it again"
        )
    (count,) = served.output_shape
    if served.class_names is not None and len(served.class_names) != count:
        raise UserError(
            f"{file} has {len(served.class_names)} class names for {count} classes: export it again"
        )


def _runtime(file: Path, device: str | None) -> str:
    if file.suffix == ".onnx":
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__} on {device or 'cpu'}"
    return "TensorFlow" if file.is_dir() else "TensorRT"


def _sha256(file: Path) -> dict[str, str]:
    """The hash of every file of the model, by name."""
    if file.suffix == ".onnx":
        return read_onnx(file).sha256
    if file.is_dir():
        return {}
    with file.open("rb") as opened:
        return {file.name: hashlib.file_digest(opened, "sha256").hexdigest()}
