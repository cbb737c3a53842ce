"""TensorRT, the CUDA runtime and the GPU of this machine, or one line that says what is missing.

No JAX, no TensorFlow. Nothing of NVIDIA's is imported before it is asked for.
"""

import ctypes
import os
import re
import sys
from typing import Any

from vit_jax.errors import UserError, first_line
from vit_jax.printable import printable


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


def import_cudart() -> Any:
    """The CUDA runtime of cuda-python, where its new releases or its old ones have it."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        try:
            from cuda import cudart
        except ImportError as error:
            raise UserError(
                f"an engine needs NVIDIA's CUDA bindings ({error}): pip install cuda-python"
            ) from error
    return cudart


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
                print(printable(f"TensorRT: {message}"), file=sys.stderr)

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


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 10.14.1.48.post1 is (10, 14, 1, 48)."""
    found = re.match(r"\d+(\.\d+)*", version)
    if found is None:
        raise ValueError(f"version {version!r} does not begin with a number")
    return tuple(int(number) for number in found[0].split("."))


def device_name(device: dict[str, str]) -> str:
    """A GPU as messages name it, from `find_device`."""
    return f"{device['name']} (compute capability {device['compute_capability']})"
