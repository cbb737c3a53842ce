"""The config of `vit-jax train --data PATH --init WEIGHTS`: chosen, explained, and repeatable.

The model is that of the weights; `recipes.own` chooses what depends on the images and the machine.
A run that has begun goes on with what was chosen then.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vit_jax import command, config_files, recipes
from vit_jax.checkpoints.pretrained import Pretrained, check_exists, load_pretrained
from vit_jax.config import check_values, count_steps
from vit_jax.config_files import Loaded
from vit_jax.data import datasets
from vit_jax.data.subset import take_subset
from vit_jax.errors import UserError
from vit_jax.models import describe, model_config, prediction_fields
from vit_jax.models.base import without_list
from vit_jax.preparation import open_images
from vit_jax.recipes import LEFT_TO_WEIGHTS, own

# Of the model's fields what fine-tuning decides: the head is the data's, without a hidden layer.
_OF_THE_RUN = {"architecture", "num_classes", "representation_size", *LEFT_TO_WEIGHTS}


class Chosen(NamedTuple):
    """A config and how it came about.

    Attributes:
        loaded: the config, whose name is that of a config file with a spec.
        lines: what was chosen and why, and the command that repeats it.
    """

    loaded: Loaded
    lines: list[str]


def default_workdir(data: str) -> str:
    """`/data/flowers/` and `/data/flowers.csv` give `runs/flowers`."""
    path = Path(os.path.abspath(data))
    name = path.name if path.is_dir() else path.stem
    return os.path.join("runs", "-".join(filter(None, re.split(r"[^\w.]+", name))) or "own")


def choose(
    data: str, init: str | None, argv: Sequence[str], workdir: str, parser: command.Parser
) -> Chosen:
    """The config of a run on a folder or list of images, from weights.

    Args:
        data: path of the images.
        init: weights, as `init_from` takes them.
        argv: `--config.KEY=VALUE`, which come before what is chosen here.
        workdir: of the run; if it began there with these images and weights, its config is taken.
        parser: of the command.

    Raises:
        UserError: the images or weights are not there or cannot be read, or a flag is wrong.
    """
    if init is None:
        raise UserError(
            "--init is missing, the weights to begin with: for example --init B_16, a file or a "
            "run; from scratch it is --config vit:ViT-S/16,baseline,folder:PATH instead"
        )
    dataset = datasets.name_of(data)
    if begun := _begun(workdir, dataset, init):
        loaded = config_files.load(begun, argv, parser)
        return Chosen(loaded, [f"the values are those that the run began with, of {begun}"])
    check_exists(init)
    pretrained = load_pretrained(init)
    model = _name(pretrained)
    given = [f"--config.init_from={init}", *argv]
    loaded = config_files.load(f"vit:{model},own,{dataset}", given, parser)
    check_values(loaded.config)  # Choosing computes with them.
    if (loaded.config.init_from, loaded.config.dataset.name) != (init, dataset):
        raise UserError(
            "--config.init_from and --config.dataset.name are what --init and --data say: leave "
            "them out"
        )
    of_images = _apply(loaded, _of_images(pretrained))
    _apply(loaded, _of_weights(loaded, pretrained))
    data = loaded.config.dataset
    source, _ = open_images(data, least_classes=2)
    source = take_subset(source, data.subset, data.subset_seed)
    choices = _choices(loaded, pretrained, source.num_examples)
    if source.multi_label:
        choices.append(own.Choice("loss", "sigmoid", "an image may have several labels"))
    choices = of_images + _apply(loaded, choices)
    facts = (
        f"chosen for {source.num_examples:,} training images of {len(source.class_names)} classes, "
        f"the {model} of {pretrained.source} and "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s):"
    )
    width = max((len(f"{key} {value}") for key, value, _ in choices), default=0)
    lines = [f"  {f'{key} {value}':{width}}  {reason}" for key, value, reason in choices]
    repeat = config_files.as_command(loaded)
    return Chosen(loaded, [facts, *lines, "the same run, wherever it is:", f"  {repeat}"])


def _begun(workdir: str, dataset: str, init: str) -> str | None:
    """The config.json of a run that has begun with these images and weights, if there is one."""
    path = Path(workdir, "config.json")
    try:
        saved = json.loads(path.read_text())
        same = saved["init_from"] == init and datasets.is_same(saved["dataset"]["name"], dataset)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return str(path) if same else None


def _name(pretrained: Pretrained) -> str:
    """The name of a model, or of one of its architecture, which flags make of its sizes."""
    architecture = pretrained.model["architecture"]
    return recipes.name_of(pretrained.model) or next(
        name
        for name in recipes.OFFICIAL_NAMES.values()
        if model_config(name)["architecture"] == architecture
    )


def _of_images(pretrained: Pretrained) -> list[own.Choice]:
    """The channels that images must have for the weights, where these are not RGB."""
    channels = pretrained.preprocessing.channels
    choice = own.Choice("dataset.channels", channels, "as the weights have it")
    return [choice] if channels != 3 else []


def _of_weights(loaded: Loaded, pretrained: Pretrained) -> list[own.Choice]:
    """The fields in which the model of the weights differs from the one of its name."""
    model = prediction_fields(loaded.config.model.to_dict())
    return [
        own.Choice(f"model.{key}", without_list(pretrained.model[key]), "as the weights have it")
        for key in model.keys() - _OF_THE_RUN
        if key in pretrained.model
        and without_list(pretrained.model[key]) != without_list(model[key])
    ]


def _choices(loaded: Loaded, pretrained: Pretrained, num_images: int) -> list[own.Choice]:
    config = loaded.config
    facts = own.Facts(
        num_images=num_images,
        image_size=pretrained.preprocessing.image_size,
        model=describe(pretrained.model),
        on_cpu=jax.default_backend() == "cpu",
        devices=jax.device_count(),
        memory=_memory(),
        has_bfloat16=_has_bfloat16(jax.local_devices()[0]),
    )
    batch = config.batch_size if _is_given(loaded, "batch_size") else own.batch_size(facts)
    given: dict[str, Any] = {}
    if _is_given(loaded, "duration"):
        given["steps"] = count_steps(config.duration, num_images, batch)
    if _is_given(loaded, "dataset.image_size"):
        given["image_size"] = config.dataset.image_size
    if _is_given(loaded, "model.dtype"):
        given["dtype"] = config.model.dtype
    return own.choices(facts, batch, **given)


def _memory() -> int:
    """Bytes of a device; of a CPU those of the machine."""
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def _has_bfloat16(device: jax.Device) -> bool:
    """See `own.Facts`; what is no GPU of NVIDIA's has it."""
    capability = str(getattr(device, "compute_capability", ""))
    return not re.fullmatch(r"[1-7]\.\d+", capability)


def _is_given(loaded: Loaded, key: str) -> bool:
    return loaded.sources[key] == "command line"


def _apply(loaded: Loaded, choices: Sequence[own.Choice]) -> list[own.Choice]:
    """Puts choices into a config where the command line says nothing; returns these."""
    free = [choice for choice in choices if not _is_given(loaded, choice.key)]
    loaded.config.update_from_flattened_dict({key: value for key, value, _ in free})
    loaded.sources.update({key: reason for key, _, reason in free})
    return free
