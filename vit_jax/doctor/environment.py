"""Installed packages, those that each part of the project needs, and where files are kept."""

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vit_jax.export import stages
from vit_jax.files import cache_dir

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    "grain",
    "tensorflow-cpu|tensorflow",
)


class Part(NamedTuple):
    """A part of the project that not everybody needs.

    Attributes:
        name: what it does.
        needs: packages, with alternatives separated by "|".
        way: how to get them.
    """

    name: str
    needs: tuple[str, ...]
    way: str


PARTS = (
    Part(
        "train, evaluate",
        ("grain", "tensorflow-datasets"),
        "pip install -e .",
    ),
    Part(
        "export to ONNX",
        ("onnx", "onnxscript", "onnxruntime", "jax2onnx|tf2onnx"),
        stages.INSTALL_NEWEST,
    ),
    Part(
        "serve over HTTP",
        ("fastapi", "uvicorn", "python-multipart", "prometheus-client", "onnxruntime"),
        "pip install -e '.[serve]'",
    ),
    Part("measure detections", ("pycocotools",), "pip install -e '.[detection]'"),
    Part("read PyTorch's files", ("torch",), "pip install -e '.[peers]'"),
    Part(
        "compute on an NVIDIA GPU",
        ("jax-cuda12-plugin|jax-cuda13-plugin",),
        "pip install -e '.[cuda]'",
    ),
    Part(
        "build TensorRT engines, on a GPU",
        ("tensorrt|tensorrt-cu12|tensorrt-cu13", "cuda-python"),
        "pip install -e '.[tensorrt]'",
    ),
)


def version(package: str) -> str | None:
    """The installed version of a package by its name on PyPI, or of one of several: "a|b"."""
    for name in package.split("|"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def missing(part: Part) -> list[str]:
    """The packages that a part lacks."""
    return [package.replace("|", " or ") for package in part.needs if version(package) is None]


def prepared_datasets(directory: Path) -> list[str]:
    """The data sets that TFDS has prepared below a folder, as "name/version" or with a config."""
    found = directory.glob("*/**/dataset_info.json")
    return sorted(file.parent.relative_to(directory).as_posix() for file in found)


def places() -> list[tuple[str, Path, str]]:
    """Lists what is kept on this machine: what it is, where, and what is there."""
    kept = cache_dir()
    datasets = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    rows = [
        ("data sets of TFDS", datasets, _listed(prepared_datasets(datasets))),
        ("weights of Google's bucket", kept, _listed(_names(kept, "**/*.npz"))),
        ("weights of Hugging Face's hub", hub, _listed(_names(hub, "models--*"))),
    ]
    compiled = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or kept / "xla")
    rows.append(("compiled programs", compiled, f"{len(_names(compiled, '**/*-cache'))} of them"))
    return rows


def _names(directory: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.glob(pattern))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
