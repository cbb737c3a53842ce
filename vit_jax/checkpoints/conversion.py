"""Conversion of weights between formats, which is proved by reading the result again."""

import dataclasses

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import models
from vit_jax.checkpoints import timm_config
from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data.protocols import resized_sides
from vit_jax.errors import UserError

NUM_IMAGES = 2  # on which the logits are compared


def convert(source: Pretrained, path: str, format: str) -> tuple[float, float]:
    """Writes a model in another format, reads it again and compares.

    Args:
        source: the model.
        path: where to, see `save_pretrained`.
        format: one of `FORMATS`.

    Returns:
        The largest absolute difference of any parameter, and of the logits on random images.

    Raises:
        UserError: the model cannot be written in this format, or is another when it is read again.
    """
    save_pretrained(source, path, format)
    again = load_pretrained(path)
    before, after = (flatten_dict(x.params, sep="/") for x in (source, again))
    of_params = max(float(np.abs(after[name] - x).max()) for name, x in before.items())
    of_logits = float(np.abs(_logits(again) - _logits(source)).max())
    described, found = (dataclasses.replace(x, params={}, source="") for x in (source, again))
    if of_params or of_logits or described != found:
        raise UserError(
            f"{path} is not what was converted (parameters differ by {of_params:.3g}, logits by "
            f"{of_logits:.3g}; {described} became {found}): do not use it"
        )
    return of_params, of_logits


def _logits(pretrained: Pretrained) -> np.ndarray:
    shape = (NUM_IMAGES, *pretrained.preprocessing.image_shape)
    images = np.random.default_rng(0).uniform(-1, 1, shape)
    model = models.create_model(pretrained.model)
    return np.asarray(jax.jit(model.apply)({"params": pretrained.params}, np.float32(images)))


def reader_notes(source: Pretrained, format: str) -> list[str]:
    """Lists what readers other than this project would do otherwise, unless they are told."""
    model, notes = source.model, []
    if format == "timm":
        if model["gelu"] == "tanh":
            notes += ["timm's GELU is the exact one: create the model with act_layer='gelu_tanh'"]
        if model["layer_norm_epsilon"] != 1e-6:
            notes += [f"timm's LayerNorm epsilon is 1e-6, here {model['layer_norm_epsilon']:g}"]
        if model.get("num_registers") or model.get("layer_scale"):
            notes += [
                "timm's models with registers, and DeiT III, have no positions of the class token: "
                "create the model with no_embed_class=False"
            ]
        seen = resized_sides(source.preprocessing)
        if (written := timm_config.written_sides(source.preprocessing)) != seen:
            notes += [
                f"timm resizes to {written[0]} x {written[1]} before it crops, these weights saw "
                f"{seen[0]} x {seen[1]}: no crop_pct gives both sides"
            ]
    if format == "torchvision":
        notes += _torchvision_notes(source)
    if format == "official" and model.get("gelu") == "erf":
        notes += ["Google's code has the tanh form of GELU, these weights the exact one"]
    # timm's transforms are torchvision's.
    resizer = "timm" if format == "torchvision" else format
    if format != "official" and source.preprocessing.resize != resizer:
        resize, antialias = source.preprocessing.resize, source.preprocessing.antialias
        notes += [
            f"{format} resizes with PIL, with antialiasing and to whole pixels; these weights saw "
            f"images by resize {resize}" + ", without antialiasing" * (not antialias)
        ]
    return notes


def _torchvision_notes(source: Pretrained) -> list[str]:
    model, view, notes = source.model, source.preprocessing, []
    if model["gelu"] == "tanh":
        notes += [
            "torchvision's GELU is the exact one: set mlp[1] of each of model.encoder.layers to "
            "torch.nn.GELU('tanh')"
        ]
    if (epsilon := model["layer_norm_epsilon"]) != timm_config.LAYER_NORM_EPSILON:
        notes += [
            f"torchvision's LayerNorm epsilon is 1e-6, here {epsilon:g}: create the model with "
            f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={epsilon:g})"
        ]
    if not model["num_classes"]:
        notes += ["torchvision's ViT has a head: set model.heads to torch.nn.Identity() first"]
    statistics = {"mean": view.mean, "std": view.std}
    if statistics != timm_config.IMAGENET_STATISTICS:
        notes += [
            "torchvision's transforms have ImageNet's mean and standard deviation, these weights "
            f"saw mean {view.mean} and std {view.std}"
        ]
    return notes
