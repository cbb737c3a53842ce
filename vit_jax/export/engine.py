"""TensorRT engines: on disk, whether this machine can run them, and how. No JAX, no TensorFlow.

An engine is a program, not data: TensorRT checks its version and its device, not what it does, and
one that is version-compatible brings its own runtime library. Load none from an unknown source;
build it from the ONNX file, which is data.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.errors import UserError, first_line
from vit_jax.export.nvidia import (
    create,
    device_name,
    find_device,
    import_cudart,
    import_tensorrt,
    make_logger,
    numbers,
)
from vit_jax.files import storage_errors
from vit_jax.printable import printable

if TYPE_CHECKING:  # The builder reads engines too, and needs no NumPy.
    import numpy as np

ENGINE, DESCRIPTION = "model.engine", "engine.json"
_MAX_DESCRIPTION = 4 << 20
# Of the entries of a description that are read here.
_TYPES = {
    "engine file": str,
    "engine bytes": int,
    "tensorrt": str,
    "version_compatible": bool,
    "hardware_compatibility": str,
    "device name": str,
    "device compute_capability": str,
}
_OPTIONS = {"workspace_mib": int, "optimization_level": int, "tactic_sources": str}
HARDWARE_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8"}


@dataclasses.dataclass(frozen=True)
class Engine:
    """A deserialized engine; `logger` and `runtime` must outlive `cuda_engine`."""

    trt: Any
    logger: Any
    runtime: Any
    cuda_engine: Any
    description: dict[str, Any]


def load_engine(path: str | os.PathLike[str]) -> Engine:
    """Deserializes an engine, and says first whether it can run here.

    This runs code of whoever built it: see the top of this module.

    Args:
        path: an engine file, or the directory that `build` wrote. `engine.json` is looked for
            beside it; without one, TensorRT alone decides.

    Raises:
        UserError: the engine is missing or incomplete, or was built for another GPU or version of
            TensorRT; or there is no TensorRT or no GPU here.
    """
    path = Path(path)
    path = path / ENGINE if path.is_dir() else path
    description = read_description(path)
    trt = import_tensorrt()
    device = find_device()
    if description:
        check_engine(description, path, trt.__version__, device)
    else:
        source = f"{path} has no {DESCRIPTION} beside it, so its source is unknown"
        print(
            printable(f"{source}: an engine is a program, load only what you trust"),
            file=sys.stderr,
        )
    with storage_errors(lambda reason: f"{path} cannot be read ({reason}): name an engine"):
        plan = path.read_bytes()
    logger = make_logger(trt)
    # A network may use a plugin; the engine is then only understood once they are registered.
    trt.init_libnvinfer_plugins(logger, "")
    host_code = description.get("version_compatible", False)
    runtime, engine = deserialize(trt, plan, logger, host_code)
    return Engine(trt, logger, runtime, engine, description)


def check_engine(
    description: dict[str, Any], path: Path, version: str, device: dict[str, str]
) -> None:
    """Raises a UserError where an engine was built for another GPU or version of TensorRT.

    Args:
        description: the contents of its engine.json.
        path: of the engine, for the message.
        version: of the TensorRT that is to run it.
        device: the GPU that is to run it, from `find_device`.
    """
    again = "build it here from its ONNX file: python -m vit_jax.export.to_tensorrt"
    built = description["tensorrt"]
    if description["version_compatible"]:
        if numbers(version) < numbers(built):
            raise UserError(
                f"{path} was built by TensorRT {built} and runs with later ones, but this is "
                f"{version}: upgrade, or {again}"
            )
    elif version != built:
        raise UserError(
            f"{path} was built by TensorRT {built} and this is {version}: {again} "
            "(--version_compatible makes engines for later versions too)"
        )
    there, here = description["device"], device
    level = description["hardware_compatibility"]
    if level == "ampere_plus":
        fits = numbers(here["compute_capability"]) >= (8, 0)
    else:
        fits = here["compute_capability"] == there["compute_capability"]
    if not fits:
        raise UserError(
            f"{path} was built for {device_name(there)} and this is {device_name(here)}: {again} "
            "(--hardware_compatibility ampere_plus makes engines for any GPU from Ampere on)"
        )


def deserialize(trt: Any, plan: Any, logger: Any, host_code: bool) -> tuple[Any, Any]:
    """The runtime and the engine of a plan.

    Args:
        trt: the `tensorrt` module.
        plan: the bytes of the engine.
        logger: from `make_logger`.
        host_code: let the plan bring its own runtime library, as a version-compatible one does.

    Raises:
        UserError: TensorRT does not accept the plan.
    """
    runtime = create(trt.Runtime, logger)
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(
            f"TensorRT {trt.__version__} cannot load the engine: {logger.last_error()} "
            "(build it on this machine, from its ONNX file)"
        )
    return runtime, engine


def read_description(engine: Path) -> dict[str, Any]:
    """The engine.json beside an engine, or nothing if there is none.

    Raises:
        UserError: there is no engine, or its description has more than 4 MiB, lacks an entry that
            is read, has one of another type, or says another size.
    """
    path = engine.with_name(DESCRIPTION)
    if not engine.is_file():
        raise UserError(f"{engine} is missing: name an engine, or the directory of one")
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_DESCRIPTION:
            raise ValueError("larger than 4 MiB")
        description = json.loads(path.read_text(encoding="utf-8"))
        _check_entries(description)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} is damaged ({reason}): build the engine again") from error
    size = description["engine"]["bytes"]
    if engine.name != description["engine"]["file"]:
        return {}
    if engine.stat().st_size != size:
        raise UserError(
            f"{engine} has {engine.stat().st_size} bytes and engine.json says {size}: "
            "build the engine again"
        )
    return description


def _check_entries(description: dict[str, Any]) -> None:
    """Raises an exception where an entry is missing, or is not what `build` writes."""
    entries = {
        **{f"engine {key}": description["engine"][key] for key in ("file", "bytes")},
        **{key: description[key] for key in _TYPES if " " not in key},
        **{f"device {key}": description["device"][key] for key in ("name", "compute_capability")},
    }
    for key, value in entries.items():
        if type(value) is not _TYPES[key]:
            raise TypeError(f"{key} is {value!r}")
    for key, kind in _OPTIONS.items():
        value = description.get(key)
        if value is not None and type(value) is not kind:
            raise TypeError(f"{key} is {value!r}")
    if entries["hardware_compatibility"] not in HARDWARE_COMPATIBILITY:
        raise ValueError(f"hardware_compatibility {entries['hardware_compatibility']!r}")
    numbers(entries["tensorrt"])
    numbers(entries["device compute_capability"])
    for profile in description.get("profiles", []):
        low, best, high = (profile[key] for key in ("min", "opt", "max"))
        if {type(low), type(best), type(high)} != {int} or not 0 < low <= best <= high:
            raise ValueError(f"profile {profile!r}")
    metadata = description.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise TypeError("metadata are no texts")


class EngineRunner:
    """Runs batches on an engine: one stream, pinned host buffers, an execution context a profile.

    With CUDA graphs there is a context for every captured size: a graph belongs to the shapes of
    its context.

    Attributes:
        input_shape: of one image, (height, width, 3).
        output_shape: of what is made of one.
        input_dtype: of the images.
        output_dtype: of the outputs.
        profiles: the (smallest, optimal, largest) batch of each.
    """

    def __init__(self, loaded: Engine, cuda_graph: bool, resources: contextlib.ExitStack):
        """Takes streams and memory; closing `resources` gives them back.

        Raises:
            UserError: there are no CUDA bindings, the GPU is full, or the engine is none of one
                input and one output of a known type.
        """
        trt, engine = loaded.trt, loaded.cuda_engine
        self.loaded: Any = loaded
        self.engine: Any = engine
        self.cuda_graph = cuda_graph
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        if (len(inputs), len(outputs)) != (1, 1):
            raise UserError(f"the engine has inputs {inputs} and outputs {outputs}: one of each")
        (self.input,), (self.output,) = inputs, outputs
        self.input_shape = tuple(engine.get_tensor_shape(self.input))[1:]
        self.output_shape = tuple(engine.get_tensor_shape(self.output))[1:]
        self.input_dtype = self._dtype(self.input)
        self.output_dtype = self._dtype(self.output)
        self.profiles = [
            tuple(shape[0] for shape in engine.get_tensor_profile_shape(self.input, index))
            for index in range(engine.num_optimization_profiles)
        ]
        self.contexts: dict[Any, Any] = {}
        self.graphs: dict[tuple[int, int], Any] = {}

        self.cudart = import_cudart()
        largest = max(profile[2] for profile in self.profiles)
        self.stream = self._take(resources, self._stream(), self.cudart.cudaStreamDestroy)
        self.host_in, self.device_in = self._buffers(
            resources, largest, self.input_shape, self.input_dtype
        )
        self.host_out, self.device_out = self._buffers(
            resources, largest, self.output_shape, self.output_dtype
        )
        resources.callback(self._release)

    def run(self, images: "np.ndarray") -> "np.ndarray":
        """Maps images of the engine's type, no more than its largest batch, to its outputs."""
        index, size = self._choose(len(images))
        self.host_in[: len(images)] = images
        # What fills the batch up does not matter, but it must not be stale NaNs of another run.
        self.host_in[len(images) : size] = images[-1]
        if self.cuda_graph:
            if (index, size) not in self.graphs:
                self.graphs[index, size] = self._capture(index, size)
            self._call(self.cudart.cudaGraphLaunch(self.graphs[index, size], self.stream))
        else:
            self._enqueue(self._context(index, index, size), size)
        self._call(self.cudart.cudaStreamSynchronize(self.stream))
        return self.host_out[: len(images)].copy()

    def _choose(self, batch: int) -> tuple[int, int]:
        """The profile, and the size that a batch is filled up to.

        The one that fills up least; of those, the one with the nearest optimum.
        """
        choices = []
        for index, (smallest, optimal, largest) in enumerate(self.profiles):
            if batch <= largest:
                size = max(smallest, batch)
                if self.cuda_graph:
                    size = min(size for size in (smallest, optimal, largest) if size >= batch)
                choices.append((size, abs(optimal - batch), index))
        size, _, index = min(choices)
        return index, size

    def _context(self, key: Any, index: int, size: int) -> Any:
        """An execution context on a profile, with its buffers and the shape of this batch."""
        if key not in self.contexts:
            context = self.engine.create_execution_context()
            if context is None:
                raise UserError(
                    f"the GPU has no memory left for the engine: {self.loaded.logger.last_error()}"
                )
            if not context.set_optimization_profile_async(index, self.stream):
                raise RuntimeError(f"profile {index}: {self.loaded.logger.last_error()}")
            self._call(self.cudart.cudaStreamSynchronize(self.stream))
            context.set_tensor_address(self.input, self.device_in)
            context.set_tensor_address(self.output, self.device_out)
            self.contexts[key] = context
        context = self.contexts[key]
        if not context.set_input_shape(self.input, (size, *self.input_shape)):
            raise RuntimeError(f"batch {size}: {self.loaded.logger.last_error()}")
        return context

    def _enqueue(self, context: Any, size: int) -> None:
        kinds = self.cudart.cudaMemcpyKind
        self._call(
            self.cudart.cudaMemcpyAsync(
                self.device_in,
                self.host_in.ctypes.data,
                self.host_in[:size].nbytes,
                kinds.cudaMemcpyHostToDevice,
                self.stream,
            )
        )
        if not context.execute_async_v3(self.stream):
            raise RuntimeError(f"TensorRT could not run: {self.loaded.logger.last_error()}")
        self._call(
            self.cudart.cudaMemcpyAsync(
                self.host_out.ctypes.data,
                self.device_out,
                self.host_out[:size].nbytes,
                kinds.cudaMemcpyDeviceToHost,
                self.stream,
            )
        )

    def _capture(self, index: int, size: int) -> Any:
        context = self._context((index, size), index, size)
        # The first run after a change of shape does work that cannot be captured.
        self._enqueue(context, size)
        self._call(self.cudart.cudaStreamSynchronize(self.stream))
        mode = self.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self.cudart.cudaStreamBeginCapture(self.stream, mode))
        self._enqueue(context, size)
        graph = self._call(self.cudart.cudaStreamEndCapture(self.stream))
        executable = self._call(self.cudart.cudaGraphInstantiateWithFlags(graph, 0))
        self._call(self.cudart.cudaGraphDestroy(graph))
        return executable

    def _buffers(
        self,
        resources: contextlib.ExitStack,
        batch: int,
        shape: tuple[int, ...],
        dtype: "np.dtype",
    ) -> "tuple[np.ndarray, int]":
        """A pinned array in host memory, and the address of as much memory of the GPU."""
        import numpy as np

        size = batch * math.prod(shape) * dtype.itemsize
        host = self._take(
            resources, self._call(self.cudart.cudaMallocHost(size)), self.cudart.cudaFreeHost
        )
        device = self._take(
            resources, self._call(self.cudart.cudaMalloc(size)), self.cudart.cudaFree
        )
        array = np.ctypeslib.as_array((ctypes.c_byte * size).from_address(int(host)))
        return array.view(dtype).reshape(batch, *shape), int(device)

    def _stream(self) -> int:
        # TensorRT would have to synchronise more often on the default stream.
        return int(
            self._call(self.cudart.cudaStreamCreateWithFlags(self.cudart.cudaStreamNonBlocking))
        )

    def _take(self, resources: contextlib.ExitStack, resource: Any, free: Callable) -> Any:
        resources.callback(free, resource)
        return resource

    def _release(self) -> None:
        for executable in self.graphs.values():
            self.cudart.cudaGraphExecDestroy(executable)
        self.graphs.clear()
        # In this order: a context refers to its engine, and an engine to its runtime.
        self.contexts.clear()
        self.engine = self.loaded = None

    def _dtype(self, name: str) -> "np.dtype":
        import numpy as np

        dtype = self.engine.get_tensor_dtype(name).name
        if dtype not in _NUMPY:
            raise UserError(f"the engine's {name} is {dtype}: use one of {', '.join(_NUMPY)}")
        return np.dtype(_NUMPY[dtype])

    def _call(self, result: tuple) -> Any:
        """The value that a CUDA call returns beside its status."""
        status, *values = result
        if int(status):
            text = self.cudart.cudaGetErrorString(status)[1]
            raise UserError(f"CUDA error {int(status)}: {text.decode()}")
        return values[0] if values else None
