"""Times alternatives in turns, in one process, beside the machine's own rate of matrix products.

Whatever else the machine does then falls on all of them alike: of a run only the ratios count.
"""

import argparse
import ast
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Does a number of calls, one after the other, and waits for the last.
Repeat = Callable[[int], None]

# A turn takes at least that long, so that neither the start of a call nor the waiting counts.
TURN_SECONDS = 0.1
# Threads of the one before, which may wait for work in a loop, go to sleep.
PAUSE_SECONDS = 0.02
FEWEST_ROUNDS = 3
PACKAGES = (
    "vit_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tensorflow-cpu",
    "tensorflow",
    "grain",
    "onnxruntime",
    "fastapi",
    "uvicorn",
    "opencv-python-headless",
    "pillow",
)
MATRIX = "matrix product"


class Times(NamedTuple):
    """Seconds of a call: the median over the turns, and the quartiles around it."""

    median: float
    lower: float
    upper: float


def time_in_turns(
    candidates: Mapping[str, Repeat], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of a call in each turn.

    Args:
        candidates: by name; called twice before, to compile and to warm up.
        rounds: turns of each. Every round begins with another one.
        seconds: no round begins after them, but for the first `FEWEST_ROUNDS`.
    """
    calls = {name: _calls_in_a_turn(repeat) for name, repeat in candidates.items()}
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE_SECONDS)
            times[name].append(_seconds(candidates[name], calls[name]) / calls[name])
    return times


def _calls_in_a_turn(repeat: Repeat) -> int:
    repeat(1)
    return max(1, math.ceil(TURN_SECONDS / _seconds(repeat, 1)))


def _seconds(repeat: Repeat, calls: int) -> float:
    start = time.perf_counter()
    repeat(calls)
    return time.perf_counter() - start


def summary(times: list[float]) -> Times:
    """Returns median and quartiles."""
    lower, median, upper = np.quantile(times, (0.25, 0.5, 0.75))
    return Times(float(median), float(lower), float(upper))


def ratio(ours: list[float], theirs: list[float]) -> Times:
    """The ratio of two times of the same round: median and quartiles over the rounds."""
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def matrix_products(dtype: str) -> tuple[dict[str, Repeat], float]:
    """Square products as XLA and, where it is installed, PyTorch compute them, and their FLOPs."""
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    draw = np.random.default_rng(0).standard_normal
    # Of that scale products of products stay where they are.
    a = jnp.asarray(draw((size, size), np.float32) / math.sqrt(size), dtype)
    multiply = jax.jit(jnp.matmul)

    def by_xla(calls: int) -> None:
        x = a
        for _ in range(calls):
            x = multiply(a, x)
        x.block_until_ready()

    products: dict[str, Repeat] = {f"{MATRIX}, XLA": by_xla}
    with contextlib.suppress(ImportError, Unavailable):
        products[f"{MATRIX}, PyTorch"] = _product_by_torch(np.asarray(a, np.float32), dtype)
    return products, 2.0 * size**3


def _product_by_torch(a: np.ndarray, dtype: str) -> Repeat:
    import torch

    device = torch_device()
    matrix = torch.tensor(a).to(device, getattr(torch, dtype))

    def repeat(calls: int) -> None:
        x = matrix
        for _ in range(calls):
            x = matrix @ x
        wait_for_torch(device)

    return repeat


class Unavailable(Exception):
    """A peer cannot take part; its message says why."""


def torch_device() -> str:
    """PyTorch's name for the device that JAX computes on.

    Raises:
        ImportError: there is no PyTorch.
        Unavailable: PyTorch does not see the device.
    """
    import jax
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise Unavailable(f"PyTorch sees no {jax.devices()[0].device_kind}")
    return "cuda"


def wait_for_torch(device: str) -> None:
    """Waits until the device has done all."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def add_arguments(parser: argparse.ArgumentParser, rounds: int = 15) -> None:
    """Adds what every benchmark is told."""
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each")
    parser.add_argument("--seconds", type=float, default=120, help="for all turns together")
    parser.add_argument("--output", help="a file for the numbers as JSON")


def overrides(words: list[str]) -> dict[str, Any]:
    """Values by key of words such as "scan_layers=True"; what is no literal is a string."""
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            values[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            values[key] = value
    return values


def machine() -> dict[str, Any]:
    """What the numbers are taken with: processor, device, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found = {
        "cpu": name or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": versions,
    }
    if "jax" in sys.modules:
        found["device"] = sys.modules["jax"].devices()[0].device_kind
    return found


def report(**found: Any) -> dict[str, Any]:
    """A benchmark's numbers, below the command, the date and the machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        **found,
    }


def write(path: str | None, found: Mapping[str, Any]) -> None:
    """Writes a report as JSON, if it is asked for."""
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
