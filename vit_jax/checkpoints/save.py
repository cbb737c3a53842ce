"""Writes a model in the format of Google, timm or Hugging Face, for others and for us to read."""

import json
import os
from pathlib import Path

from flax.traverse_util import flatten_dict

from vit_jax.checkpoints import foreign_configs, layouts
from vit_jax.checkpoints.arrays import write_npz, write_safetensors
from vit_jax.checkpoints.model_info import ModelInfo, sidecar, to_json
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.errors import UserError
from vit_jax.files import atomic_folder, atomic_write

FORMATS = ("official", "timm", "huggingface")
_WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}
_SUFFIXES = {"official": (".npz",), "timm": ("", ".safetensors", ".npz"), "huggingface": ("",)}


def save_pretrained(pretrained: Pretrained, path: str | os.PathLike[str], layout: str) -> None:
    """Writes a model so that `load_pretrained` gives back the same, and others can read it too.

    What the format has no place for goes to a JSON file beside it, see `checkpoints.model_info`.

    Args:
        pretrained: the model.
        path: a file that ends in .npz (official, timm) or .safetensors (timm), or a folder to be
            made (timm, huggingface). It must not exist. It appears at once, when all is written.
        layout: one of `FORMATS`.

    Raises:
        UserError: the path exists or has another suffix, the format has no place for a parameter,
            or the disk is full.
    """
    path = Path(path)
    suffix = path.suffix if path.suffix in _WRITERS else ""
    if suffix not in _SUFFIXES[layout]:
        usual = " or ".join(x or "no suffix, for a folder" for x in _SUFFIXES[layout])
        raise UserError(f"{path}: a path in the {layout} format ends in {usual}")
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another path")
    model = pretrained.model
    places = model.get("position_embedding", "learned"), model.get("position_placement", "stem")
    if layout != "official" and places != ("learned", "stem"):
        raise UserError(
            f"the {layout} format has learned position embeddings at the stem, this model "
            f"{places[0]} ones, {places[1]}: use --format official"
        )
    arrays = layouts.from_official(flatten_dict(pretrained.params, sep="/"), layout)
    known = ModelInfo(
        pretrained.model, pretrained.preprocessing, pretrained.class_names, pretrained.loss
    )
    if suffix:
        with atomic_write(sidecar(path)) as temporary:
            temporary.write_text(to_json(known))
        _WRITERS[suffix](path, arrays)
        return
    files = foreign_configs.timm_files if layout == "timm" else foreign_configs.huggingface_files
    documents = {name: json.dumps(x, indent=2) + "\n" for name, x in files(known).items()}
    with atomic_folder(path) as folder:
        for name, text in documents.items():
            (folder / name).write_text(text)
        sidecar(folder).write_text(to_json(known))
        write_safetensors(folder / "model.safetensors", arrays)
