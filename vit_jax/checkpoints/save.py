"""Writes a model in the format of Google, timm, torchvision or Hugging Face, for others and us."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from vit_jax.checkpoints import foreign_configs, layouts
from vit_jax.checkpoints.formats.npz import write_npz
from vit_jax.checkpoints.formats.safetensors import write_safetensors
from vit_jax.checkpoints.model_info import ModelInfo, info_path
from vit_jax.checkpoints.pretrained import OFFICIAL, Pretrained
from vit_jax.errors import UserError
from vit_jax.files import atomic_files, atomic_folder

FORMATS = ("official", "timm", "torchvision", "huggingface")
_WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}
_SUFFIXES = {
    "official": (".npz",),
    "timm": ("", ".safetensors", ".npz"),
    "torchvision": (".safetensors",),
    "huggingface": ("",),
}
# The fields in which torchvision's ViT has one value.
_TORCHVISION = {
    "architecture": "vit",
    "classifier": "token",
    "distillation_token": False,
    "layer_scale": 0.0,
    "mlp": "gelu",
    "num_registers": 0,
}


def save_pretrained(pretrained: Pretrained, path: str | os.PathLike[str], format: str) -> None:
    """Writes a model so that `load_pretrained` gives back the same, and others can read it too.

    What the format has no place for goes to an info file beside it, see `checkpoints.model_info`.

    Args:
        pretrained: the model.
        path: a file that ends in .npz (official, timm) or .safetensors (timm, torchvision), or a
            folder to be made (timm, huggingface). It must not exist. It appears at once, when all
            is written.
        format: one of `FORMATS`.

    Raises:
        UserError: the path or its info file exists, it has another suffix, the format has no place
            for such a model or a parameter of it, or the disk is full.
    """
    path = Path(path)
    _check_path(path, format)
    _check_positions(pretrained.model, format)
    if format == "torchvision":
        _check_torchvision(pretrained)
    arrays = layouts.from_official(flatten_dict(pretrained.params, sep="/"), format)
    info = ModelInfo(
        pretrained.model,
        pretrained.preprocessing,
        pretrained.class_names,
        pretrained.loss,
        pretrained.multi_label,
    )
    if path.suffix in _WRITERS:
        _write_file(path, arrays, info)
        return
    files = foreign_configs.config_files(info, format)
    documents = {name: json.dumps(x, indent=2) + "\n" for name, x in files.items()}
    with atomic_folder(path) as folder:
        for name, text in documents.items():
            (folder / name).write_text(text)
        info_path(folder).write_text(info.to_json())
        write_safetensors(folder / "model.safetensors", arrays)


def _write_file(path: Path, arrays: Mapping[str, Any], info: ModelInfo) -> None:
    """Writes weights and their info file, which get their names one right after the other."""
    with atomic_files(path.parent) as folder:
        _WRITERS[path.suffix](folder / path.name, arrays)
        (folder / info_path(path).name).write_text(info.to_json())


def _check_path(path: Path, format: str) -> None:
    suffix = path.suffix if path.suffix in _WRITERS else ""
    if suffix not in _SUFFIXES[format]:
        endings = " or ".join(x or "no suffix, for a folder" for x in _SUFFIXES[format])
        raise UserError(f"{path}: a path in the {format} format ends in {endings}")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: folder {path.parent} does not exist")
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another path")
    if suffix and (info := info_path(path)).exists():
        raise UserError(f"{info} exists, of other weights: remove it, or choose another path")


def _check_positions(model: dict[str, Any], format: str) -> None:
    embedding = model.get("position_embedding", "learned")
    placement = model.get("position_placement", "stem")
    if format != "official" and (embedding, placement) != ("learned", "stem"):
        raise UserError(
            f"the {format} format has learned position embeddings at the stem, this model "
            f"{embedding} ones, {placement}: use --format official"
        )


def _check_torchvision(pretrained: Pretrained) -> None:
    for key, only in _TORCHVISION.items():
        if (found := pretrained.model.get(key, only)) != only:
            raise UserError(
                f"torchvision's ViT has {key} {only!r} alone, this model {found!r}: use another "
                "--format"
            )
    height, width, channels = pretrained.preprocessing.image_shape
    if height != width or channels != 3:
        raise UserError(
            f"torchvision's ViT takes square images of 3 channels, this model {height} x {width} "
            f"of {channels}: use another --format"
        )


def write_official(pretrained: Pretrained, folder: Path) -> None:
    """Writes a model of any architecture into a folder, which `load_pretrained` reads to the same.

    Args:
        pretrained: the model.
        folder: is there; `files.atomic_folder` makes one that appears whole or not at all.

    Raises:
        UserError: a file cannot be written.
    """
    facts = {x.name: getattr(pretrained, x.name) for x in dataclasses.fields(ModelInfo)}
    write_npz(folder / OFFICIAL, flatten_dict(pretrained.params, sep="/"))
    info_path(folder).write_text(ModelInfo(**facts).to_json())
