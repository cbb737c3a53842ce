"""Where workers run: how many at once, and the cores or GPUs of each."""

import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import experiments
from vit_jax.errors import UserError

# Of a machine of many cores: each takes memory for the libraries alone.
_MOST_WORKERS = 8


def default_workers() -> int:
    """How many workers run at once unless it is said: one on an accelerator, else one a core."""
    return 1 if _has_accelerator() else min(len(_cores()), _MOST_WORKERS)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares(workers: int) -> list[list[int]]:
    """The cores of each of some workers, so that they do not keep each other waiting.

    Two workers of a core each took 6.4 s of CPU for a run of the smoke scale, with all cores 7.5 s.
    """
    cores = _cores()
    if workers == 1 or workers > len(cores) or _has_accelerator():
        return [[] for _ in range(workers)]
    return _divided(cores, workers)


def _divided(items: Sequence[Any], parts: int) -> list[list[Any]]:
    bounds = [len(items) * index // parts for index in range(parts + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(bounds)]


def _has_accelerator() -> bool:
    """Tells whether JAX will find one; to ask JAX would take the accelerator from the workers."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    if importlib.util.find_spec("libtpu") and _device_files("accel*", "vfio/[0-9]*"):
        return True
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) and bool(_gpus() or _device_files("accel[0-9]*", "vfio/[0-9]*", "kfd"))


def _device_files(*patterns: str) -> list[pathlib.Path]:
    return [path for pattern in patterns for path in pathlib.Path("/dev").glob(pattern)]


def _gpus() -> list[str]:
    """NVIDIA's GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    files = _device_files("nvidia[0-9]*")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None or not files:
        return [str(index) for index in range(len(files))]
    return [name for word in given.split(",") if (name := word.strip()) not in ("", "-1")]


def environments(workers: int) -> list[dict[str, str]]:
    """The variables of each of some workers: several on one accelerator have GPUs of their own.

    Raises:
        UserError: there are less GPUs than workers.
    """
    root = str(pathlib.Path(experiments.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    if workers == 1 or not _has_accelerator():
        return [environment] * workers
    gpus = _gpus()
    if len(gpus) < workers:
        raise UserError(
            f"--jobs {workers} need as many GPUs, and there are {len(gpus)}: two runs cannot share "
            "an accelerator; leave --jobs out, or name more GPUs in CUDA_VISIBLE_DEVICES"
        )
    return [environment | {"CUDA_VISIBLE_DEVICES": ",".join(x)} for x in _divided(gpus, workers)]
