"""A class that runs a SavedModel, an ONNX file or a TensorRT engine. No JAX.

    with runtime.load("DIR/model.engine") as model:
        logits = model.predict(images)

TensorFlow, onnxruntime, TensorRT and the CUDA bindings are imported for the format that needs them.

An engine is a program, and the graph of a SavedModel may read and write files: load these from a
source that you trust. An ONNX file is data.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError, first_line
from vit_jax.export.engine import EngineRunner, load_engine
from vit_jax.export.onnx_file import RAW, read_class_names, read_metadata
from vit_jax.image_size import MAX_IMAGE_SIZE

# In pixels, of images that a model prepares itself: what `data.images` reads.
_MAX_RAW_SIDE = 2**20

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is ready to run; one thread at a time may use it.

    Attributes:
        path: what was loaded.
        image_shape: (height, width, channels) of one image; -1 is free.
        free_sides: in pixels, where height and width are free: from a patch on.
        image_dtype: of the model's input. uint8: pixels go in as they are.
        sizes: (smallest, largest) batch that it runs at once; None: any.
        preprocessing: from pixels to what the model was trained on, or None if the file has none.
        class_names: in the order of the outputs, or None.
        metadata: what the export wrote beside the graph, JSON by name, see `Forward.metadata`.
    """

    path: Path
    image_shape: tuple[int, int, int]
    free_sides: range
    image_dtype: np.dtype
    sizes: tuple[int, int | None]
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    metadata: Mapping[str, str]
    _run: Callable[[np.ndarray], np.ndarray]
    _resources: contextlib.ExitStack

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The logits of images, or whatever the model was exported to give.

        Args:
            images: [batch, height, width, 3] that were cropped and resized as `preprocessing` says;
                uint8 pixels, or floats whose mean and std were adjusted already. A model that
                prepares images itself takes uint8 pixels of any size, turned upright. A batch
                larger than the model takes is run in parts, a smaller one is filled up.

        Returns:
            float32 [batch, ...].

        Raises:
            UserError: the images have another shape or type, or there are none.
        """
        images = np.asarray(images)
        if not _fits(images.shape, self.image_shape, self.free_sides):
            named = zip(self.image_shape, ("height", "width", "3"), strict=True)
            shape = ", ".join(name if size == -1 else str(size) for size, name in named)
            raise UserError(
                f"images of shape {images.shape} do not fit {self.path}: pass "
                f"[batch, {shape}] with at least one image"
                + f", of {self.free_sides.start} to {self.free_sides.stop - 1} pixels a free side"
                * (-1 in self.image_shape)
            )
        smallest, largest = self.sizes
        parts = []
        for start in range(0, len(images), largest or len(images)):
            part = self._normalize(images[start : start + (largest or len(images))])
            if len(part) < smallest:
                filling = np.repeat(part[-1:], smallest - len(part), axis=0)
                outputs = self._run(np.concatenate([part, filling]))[: len(part)]
            else:
                outputs = self._run(part)
            parts.append(outputs.astype(np.float32, copy=False))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Gives memory and streams of the GPU back; the model cannot be used afterwards."""
        self._resources.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()

    def _normalize(self, images: np.ndarray) -> np.ndarray:
        """To the type of the model's input; pixels become what the model was trained on."""
        if images.dtype == np.uint8:
            if self.image_dtype == np.uint8:
                return images
            if self.preprocessing is None:
                raise UserError(
                    f"{self.path} does not say how pixels are normalized: pass images as floats, "
                    "with mean and std as in training"
                )
            mean = np.asarray(self.preprocessing.mean, np.float32)
            std = np.asarray(self.preprocessing.std, np.float32)
            normalized = (images / np.float32(255) - mean) / std
            return normalized.astype(self.image_dtype, copy=False)
        if self.image_dtype == np.uint8 or not np.issubdtype(images.dtype, np.floating):
            wanted = "uint8" if self.image_dtype == np.uint8 else "uint8 or floats"
            raise UserError(f"images of {images.dtype} do not fit {self.path}: pass {wanted}")
        return images.astype(self.image_dtype, copy=False)


def load(
    path: str | os.PathLike[str], device: str | None = None, *, cuda_graph: bool = False
) -> Model:
    """Loads a SavedModel directory, an `.onnx` file, or an engine (a file or its directory).

    Args:
        path: of the model. A SavedModel holds neither preprocessing nor class names: they are taken
            from the `model.onnx` beside it, if there is one.
        device: for ONNX, "cpu" (the default), "cuda" or "tensorrt", the last two with ":1" and so
            on for another GPU. A SavedModel and an engine take no device: TensorFlow finds its own,
            and an engine runs on the first GPU of CUDA_VISIBLE_DEVICES.
        cuda_graph: engines only: launch all kernels at once. Batches are then filled up to the
            smallest, the optimal or the largest size of a profile, each captured once.

    Raises:
        UserError: the file is missing or damaged, the device or a package that it needs is not
            there, or the engine was built for another GPU or TensorRT.
    """
    path = Path(path)
    saved_model = (path / "saved_model.pb").is_file()
    onnx = path.suffix == ".onnx"
    if not path.exists():
        raise UserError(f"{path} is missing: name a SavedModel, an ONNX file or an engine")
    if not (saved_model or onnx or path.is_dir() or path.suffix in (".engine", ".plan")):
        raise UserError(f"{path} is not a SavedModel, a .onnx file, or a .engine or .plan file")
    if device is not None and not onnx:
        raise UserError(f"device {device!r} is for ONNX files: leave it out for {path}")
    if cuda_graph and (saved_model or onnx):
        raise UserError(f"a CUDA graph is for engines: leave cuda_graph out for {path}")
    if saved_model:
        return _saved_model(path)
    return _onnx(path, device or "cpu") if onnx else _engine(path, cuda_graph)


def _saved_model(path: Path) -> Model:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f"a SavedModel needs TensorFlow ({error}): use the ONNX file") from error
    try:
        serve = tf.saved_model.load(str(path)).signatures["serving_default"]
        ((name, spec),) = serve.structured_input_signature[1].items()
        (output,) = serve.structured_outputs
    except (OSError, KeyError, ValueError, tf.errors.OpError) as error:
        raise UserError(
            f"{path} is not a SavedModel of one input and output ({first_line(error)})"
        ) from error

    def run(images: np.ndarray) -> np.ndarray:
        return serve(**{name: tf.constant(images)})[output].numpy()

    beside = path.parent / "model.onnx"
    return _model(
        path,
        shape=spec.shape.as_list(),
        dtype=spec.dtype.as_numpy_dtype,
        metadata=read_metadata(beside) if beside.is_file() else {},
        run=run,
    )


def _onnx(path: Path, device: str) -> Model:
    kind, _, index = device.partition(":")
    if kind not in PROVIDERS or (index and not index.isdigit()) or (index and kind == "cpu"):
        raise UserError(f"device {device!r} is unknown: use cpu, cuda or tensorrt, or cuda:1")
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"an ONNX file needs onnxruntime ({error}): install it") from error
    provider = PROVIDERS[kind]
    providers = [provider] if kind == "cpu" else [(provider, {"device_id": int(index or 0)})]
    # TensorRT leaves what it does not take to the next in the list.
    providers += [(PROVIDERS["cuda"], {"device_id": int(index or 0)})] * (kind == "tensorrt")
    missing = UserError(
        f"onnxruntime {onnxruntime.__version__} cannot run on {device!r} here: "
        "pip install onnxruntime-gpu on a machine with a GPU, or use --device cpu"
    )
    if provider not in onnxruntime.get_available_providers():
        raise missing
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors; it warns of every node that stays on the CPU.
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # Its exceptions have no common type of their own.
        reason = " ".join(str(error).split())
        raise UserError(f"onnxruntime cannot load {path}: {reason}") from error
    # onnxruntime falls back to the CPU without an error.
    if session.get_providers()[0] != provider:
        raise missing
    try:
        (images,), (_output,) = session.get_inputs(), session.get_outputs()
    except ValueError as error:
        raise UserError(f"{path} is no model of one input and one output: use another") from error

    def run(batch: np.ndarray) -> np.ndarray:
        results: Any = session.run(None, {images.name: np.ascontiguousarray(batch)})
        return results[0]

    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    if images.type not in dtypes:
        raise UserError(f"{path} takes {images.type}: use one of {', '.join(dtypes)}")
    return _model(
        path,
        shape=images.shape,
        dtype=dtypes[images.type],
        metadata=session.get_modelmeta().custom_metadata_map,
        run=run,
    )


def _engine(path: Path, cuda_graph: bool) -> Model:
    loaded = load_engine(path)
    with contextlib.ExitStack() as resources:
        engine = EngineRunner(loaded, cuda_graph, resources)
        return _model(
            path,
            shape=(-1, *engine.input_shape),
            dtype=engine.input_dtype,
            metadata=loaded.description.get("metadata", {}),
            run=engine.run,
            sizes=(1, max(largest for _, _, largest in engine.profiles)),
            resources=resources.pop_all(),
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], free: range) -> bool:
    """Tells whether images of a shape are some, of a wanted shape of each."""
    return (
        len(shape) == 1 + len(wanted)
        and 0 not in shape
        and all(
            x in free if size == -1 else x == size
            for x, size in zip(shape[1:], wanted, strict=True)
        )
    )


def _model(
    path: Path,
    *,
    shape: Any,
    dtype: Any,
    metadata: Mapping[str, str],
    run: Callable[[np.ndarray], np.ndarray],
    sizes: tuple[int, int | None] = (1, None),
    resources: contextlib.ExitStack | None = None,
) -> Model:
    """Puts a model together from the shape of its input; a batch that is no number is free."""
    batch, *image_shape = shape
    free = [size for size in image_shape[:2] if isinstance(size, str)]  # ONNX names them.
    if len(image_shape) != 3 or not all(
        size in free or (isinstance(size, int) and size > 0) for size in image_shape
    ):
        raise UserError(
            f"{path} takes {list(shape)}: it is no model of [batch, height, width, channels]"
        )
    height, width, channels = (-1 if size in free else size for size in image_shape)
    if isinstance(batch, int) and batch > 0:
        sizes = (batch, batch)
    try:
        fields = json.loads(metadata.get("preprocessing", "null"))
        if fields is not None:
            fields |= {name: tuple(fields[name]) for name in ("mean", "std")}
        names = read_class_names(metadata)
        raw = metadata.get("pixels") == RAW
        patch = json.loads(metadata.get("model", "{}")).get("patch_size", 1) if free else 1
        return Model(
            path=path,
            image_shape=(height, width, channels),
            free_sides=range(1, _MAX_RAW_SIDE + 1) if raw else range(patch, MAX_IMAGE_SIZE + 1),
            image_dtype=np.dtype(dtype),
            sizes=sizes,
            preprocessing=None if fields is None else Preprocessing(**fields),
            class_names=names,
            metadata=dict(metadata),
            _run=run,
            _resources=resources or contextlib.ExitStack(),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"the metadata of {path} is damaged ({reason}): export it again") from error
