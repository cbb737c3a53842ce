"""TensorRT engines on disk, and whether this machine can run them. No JAX, no TensorFlow."""

import ctypes
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, first_line

ENGINE, DESCRIPTION = "model.engine", "engine.json"


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
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name an engine") from error
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


def import_tensorrt() -> Any:
    """Imports `tensorrt`; a UserError says how to get it."""
    try:
        import tensorrt
    # The package may be there and its libraries not.
    except (ImportError, OSError) as error:
        raise UserError(
            f"TensorRT is not installed here ({first_line(error)}): pip install tensorrt, "
            "or take the ONNX file to a machine that has it"
        ) from error
    if numbers(tensorrt.__version__) < (8, 6):
        raise UserError(f"TensorRT {tensorrt.__version__} is too old: use 8.6, 10 or 11")
    return tensorrt


def find_device() -> dict[str, str]:
    """The first visible GPU: its `name`, `compute_capability` and CUDA version of its `driver`.

    Asks the driver itself: TensorRT 8.6 crashes where there is none.

    Raises:
        UserError: there is no NVIDIA driver, or no GPU that it shows.
    """
    way_out = "take the ONNX file to a machine with one"
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise UserError(f"no NVIDIA GPU here (the driver is not installed): {way_out}") from error
    count, device, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise UserError(
            f"no NVIDIA GPU here (the driver reports {count.value} devices, error {status}; "
            f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}): {way_out}"
        )
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    cuda.cuDriverGetVersion(ctypes.byref(number))
    return {
        "name": name.value.decode(),
        "compute_capability": ".".join(capability),
        "driver": f"{number.value // 1000}.{number.value % 1000 // 10}",
    }


def make_logger(trt: Any, verbose: bool = False) -> Any:
    """A TensorRT logger that keeps errors for the message that the user gets.

    Args:
        trt: the `tensorrt` module.
        verbose: print everything to stderr; otherwise nothing but warnings of the builder.
    """
    printed = trt.ILogger.VERBOSE if verbose else trt.ILogger.WARNING

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(" ".join(message.split()))
            if verbose or int(trt.ILogger.ERROR) < int(severity) <= int(printed):
                print(f"TensorRT: {message}", file=sys.stderr)

        def last_error(self):
            return self.errors[-1] if self.errors else "it gave no reason (try --verbose)"

    return Logger()


def create(kind: Any, logger: Any) -> Any:
    """A Builder or a Runtime, for which TensorRT wants a GPU that it can use."""
    try:
        return kind(logger)
    except TypeError as error:  # What the bindings make of a null pointer.
        raise UserError(
            f"TensorRT cannot use this GPU: {logger.last_error()} (is the driver too old for it?)"
        ) from error


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
    """The engine.json beside an engine, or nothing if there is none."""
    path = engine.with_name(DESCRIPTION)
    if not engine.is_file():
        raise UserError(f"{engine} is missing: name an engine, or the directory of one")
    if not path.is_file():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        size = description["engine"]["bytes"]
        for key in ("tensorrt", "device", "version_compatible", "hardware_compatibility"):
            description[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): build the engine again") from error
    if engine.name != description["engine"]["file"]:
        return {}
    if engine.stat().st_size != size:
        raise UserError(
            f"{engine} has {engine.stat().st_size} bytes and engine.json says {size}: "
            "build the engine again"
        )
    return description


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 10.14.1.48.post1 is (10, 14, 1, 48)."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def device_name(device: dict[str, str]) -> str:
    """A GPU as messages name it, from `find_device`."""
    return f"{device['name']} (compute capability {device['compute_capability']})"
