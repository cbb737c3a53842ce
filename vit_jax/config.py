"""Checks, durations and JSON of a run's config.

A config is an `ml_collections.ConfigDict` that describes a whole run; `vit_jax.recipes` makes them.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_dict

from vit_jax import recipes
from vit_jax.data.augmentation import CONTRASTS, parse_augment
from vit_jax.data.protocols import JPEG_DCTS
from vit_jax.data.subset import parse_subset
from vit_jax.errors import UserError, nearest
from vit_jax.evaluation import registry
from vit_jax.models import DTYPES, describe, field_type, masked, model_fields, vit
from vit_jax.sharding import parse_sharding
from vit_jax.state import DECAYS, check_warmup, optimizer_keys
from vit_jax.steps import LOSSES

AT_LEAST_ONE = {
    "batch_size",
    "accumulate_steps",
    "keep_checkpoints",
    "dataset.image_size",
}
FRACTIONS = {
    "label_smoothing",
    "ema_decay",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.momentum",
}
CHOICES = {"augment_contrast": CONTRASTS, "dataset.jpeg_dct": JPEG_DCTS}
NAMES = {"loss": LOSSES, "schedule.decay": DECAYS}
NOT_NEGATIVE = {
    "patience",
    "dataset.subset_seed",
    "dataset.workers",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "schedule.base_lr",
    "schedule.end_lr",
}
_LEFT_TO_WEIGHTS = {f"model.{key}" for key in recipes.LEFT_TO_WEIGHTS}

# Keys that configs did not have from the beginning, and what runs did without them: the value that
# a saved config without the key has.
ADDED_KEYS = {
    "augment_contrast": "pil",
    "dataset.jpeg_dct": "accurate",
    "dataset.workers": 0,
}
# Keys that are gone, and why nothing takes their place.
REMOVED_KEYS = {
    "dataset.cache": "images are read in any order, and the system keeps in memory what fits",
    "dataset.shuffle_buffer": "every epoch is shuffled as a whole",
}
# Keys that have moved.
MOVED_KEYS = {
    "eval_every": "evals.val.every",
    "fewshot.dataset": "evals.fewshot.dataset",
    "fewshot.data_dir": "evals.fewshot.data_dir",
    "fewshot.shots": "evals.fewshot.shots",
    "fewshot.every": "evals.fewshot.every",
}
# Values that were once called otherwise.
RENAMED_VALUES: dict[str, dict[Any, str]] = {
    "masking.target": {"mean_colour": "mean_color"},
    "model.remat": {False: "nothing", True: "everything"},
}


def check_config(config: ConfigDict, *, may_lack: bool = False) -> None:
    """Checks all that can be told of a config without its data set, and opens nothing.

    It has exactly the keys that a run reads, each of the right type and in its range, and durations
    that are understood and fit together.

    Args:
        config: of a run.
        may_lack: pass what only the user can give and has not.

    Raises:
        UserError: a key is unknown (the nearest valid one is named), missing, of another type, or
            still to be given; a value is out of its range.
    """
    if may_lack:
        config = _without_required(config)
    template = recipes.pretrain("ViT-B/16", "imagenet2012")
    template.optimizer.update(recipes.finetune("ViT-B/16", "cifar10").optimizer)
    _check_keys(config.keys(), template.keys(), "")
    for section, values in template.items():
        if not isinstance(values, ConfigDict):
            _check_type(section, config[section], type(values))
            continue
        if not isinstance(config[section], ConfigDict):
            raise UserError(f"config.{section} is {config[section]!r}: it is a section of keys")
        if section == "evals":
            _check_evals(config.evals)
            continue
        types = {key: type(value) for key, value in values.items()}
        if section == "model":
            fields = model_fields(config.model.get("architecture"))
            types = {"architecture": str, **{key: field_type(x) for key, x in fields.items()}}
        if section == "optimizer":
            types = {key: types[key] for key in optimizer_keys(config.optimizer.get("name"))}
        _check_keys(config[section].keys(), types, f"{section}.")
        for key, kind in types.items():
            _check_type(f"{section}.{key}", config[section][key], kind)
    _check_model(config.model, config.dataset.image_size)
    _check_ranges(config)
    _check_durations(config)


def _without_required(config: ConfigDict) -> ConfigDict:
    given = config.copy_and_resolve_references()
    if given.get("init_from") == recipes.REQUIRED:
        given.init_from = ""
    return given


def _check_keys(keys: Iterable[str], valid: Iterable[str], prefix: str) -> None:
    for key in sorted(set(keys) - set(valid)):
        raise unknown_key(prefix + key, [prefix + name for name in valid])
    for key in sorted(set(valid) - set(keys)):
        raise UserError(f"config.{prefix}{key} is missing")


def _check_evals(evals: ConfigDict) -> None:
    prefixes = {}
    for name, values in evals.items():
        if not isinstance(values, ConfigDict):
            raise UserError(f"config.evals.{name} is {values!r}: it is a section of keys")
        try:
            settings = registry.complete(values.to_dict())
        except UserError as error:
            raise UserError(f"config.evals.{name}: {error}") from error
        row = registry.EVALUATORS[settings["type"]]
        for key in sorted(set(values) - {"type"}):
            if key not in row.defaults:
                raise unknown_key(
                    f"evals.{name}.{key}", [f"evals.{name}.{x}" for x in row.defaults]
                )
            _check_type(f"evals.{name}.{key}", values[key], type(row.defaults[key]))
        row.check(settings)
        if registry.is_on(settings):
            other = prefixes.setdefault(registry.prefix(name, settings), name)
            if other != name:
                raise UserError(
                    f"config.evals.{name} would write its scalars under the names of those of "
                    f"config.evals.{other}: make one entry of the two"
                )
    _check_deciding(evals)


def _check_deciding(evals: ConfigDict) -> None:
    name = registry.DECIDING
    if name not in evals:
        raise UserError(
            f"config.evals.{name} is missing: it decides which checkpoint is the best; its every "
            "may be '0 steps', which is at the end alone"
        )
    settings = registry.complete(evals[name].to_dict())
    deciding = [kind for kind, row in registry.EVALUATORS.items() if row.decides]
    if settings["type"] not in deciding or not registry.is_on(settings):
        raise UserError(
            f"config.evals.{name} is of type {settings['type']!r} and data set "
            f"{settings['dataset']!r}, but it decides which checkpoint is the best: use images and "
            f"a type with an accuracy or loss, {' or '.join(deciding)}"
        )


def _check_type(key: str, value: Any, kind: type) -> None:
    if value == recipes.REQUIRED:
        raise UserError(f"config.{key} must be given: --config.{key}=...")
    if value is None and key in _LEFT_TO_WEIGHTS:
        return
    alike = {float: (int, float), tuple: (tuple, list)}  # JSON has no tuples.
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, alike.get(kind, kind)):
        raise UserError(f"config.{key} is {value!r}: it must be of type {kind.__name__}")


def _check_model(model: ConfigDict, image_size: int) -> None:
    for key, field in model_fields(model.architecture).items():
        check = field.metadata.get("check")
        if check and model[key] is not None and (problem := check(model[key])):
            raise UserError(f"config.model.{key} {problem}")
    description = describe(dict(model))
    if isinstance(description, vit.ViTConfig) and image_size > 0:
        description.grid(image_size, image_size)


def _check_ranges(config: ConfigDict) -> None:
    values = flatten_dict(to_dict(config), sep=".")
    for key in AT_LEAST_ONE & values.keys():
        if values[key] < 1:
            raise UserError(f"config.{key} is {values[key]}: it must be at least 1")
    for key in FRACTIONS & values.keys():
        if not 0 <= values[key] < 1:
            raise UserError(f"config.{key} is {values[key]}: it must be from 0 to below 1")
    for key in NOT_NEGATIVE & values.keys():
        if values[key] < 0:
            raise UserError(f"config.{key} is {values[key]}: it must not be negative")
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"config.{key} is {values[key]!r}: use {' or '.join(choices)}")
    for key, names in NAMES.items():
        if values[key] not in names:
            raise UserError(f"{key} {values[key]!r} is unknown: use {' or '.join(names)}")
    if values["schedule.base_lr"] == 0:
        raise UserError("config.schedule.base_lr is 0.0: it must be above 0")
    _check_objective(values)
    parse_sharding(values["sharding"])
    parse_augment(values["augment"])
    if values["dataset.subset"]:
        parse_subset(values["dataset.subset"])
    if values["optimizer.mu_dtype"] not in DTYPES:
        raise UserError(
            f"config.optimizer.mu_dtype is {values['optimizer.mu_dtype']!r}: "
            f"use {' or '.join(DTYPES)}"
        )


def _check_durations(config: ConfigDict) -> None:
    parsed = {}
    for key, text in {
        "duration": config.duration,
        "schedule.warmup": config.schedule.warmup,
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
        **{f"evals.{name}.every": x["every"] for name, x in _complete_evals(config).items()},
    }.items():
        try:
            parsed[key] = parse_duration(text)
        except UserError as error:
            raise UserError(f"config.{key}: {error}") from error
    (duration, unit), (warmup, warmup_unit) = parsed["duration"], parsed["schedule.warmup"]
    if duration == 0:
        raise UserError(f"duration {config.duration!r} is 0 {unit}: it must be at least 1 step")
    if unit == warmup_unit:  # Only the data set tells how many steps an epoch has.
        check_warmup(warmup, duration, unit)
    deciding = f"evals.{registry.DECIDING}.every"
    if config.patience and parsed[deciding][0] == 0:
        raise UserError(
            f"patience is {config.patience} but {deciding} is "
            f"{config.evals[registry.DECIDING].every!r}: only evaluations can stop the run, set an "
            "interval"
        )


OBJECTIVES = ("classification", "masked_patches")
# What is about classes, of which masked patch prediction has none.
OF_CLASSES = (
    "label_smoothing",
    "model.head_bias_init",
    "model.num_classes",
    "model.representation_size",
)


def _check_objective(values: Mapping[str, Any]) -> None:
    objective = values["objective"]
    if objective not in OBJECTIVES:
        raise UserError(f"config.objective {objective!r} is unknown: use {' or '.join(OBJECTIVES)}")
    masked.check_masking(values["masking.rate"], values["masking.target"])
    if objective == "masked_patches" and parse_augment(values["augment"]).mixup_alpha:
        raise UserError(
            f"config.augment is {values['augment']!r}, but objective masked_patches has no labels "
            "to mix: leave mixup out"
        )
    for key in OF_CLASSES:
        if objective == "masked_patches" and values.get(key):
            raise UserError(
                f"config.{key} is {values[key]}, but objective masked_patches has no classes: "
                f"add --config.{key}=0"
            )


def unknown_key(key: str, valid: Iterable[str]) -> UserError:
    """The error for a key that nothing reads, with its name of today or the nearest valid one."""
    sections = {old.partition(".")[0]: new.rpartition(".")[0] for old, new in MOVED_KEYS.items()}
    if moved := (sections | MOVED_KEYS).get(key):
        return UserError(f"config.{key} is config.{moved} today: set that")
    if key in REMOVED_KEYS:
        return UserError(f"config.{key} is gone, {REMOVED_KEYS[key]}: leave it out")
    leaves = {name.rpartition(".")[2]: name for name in sorted(valid)}
    near = nearest(key.rpartition(".")[2], leaves)
    hint = f"did you mean config.{leaves[near]}?" if near else f"valid are {', '.join(leaves)}"
    return UserError(f"config.{key} is not a key that anything reads: {hint}")


def parse_duration(duration: str) -> tuple[float, str]:
    """The number and the unit of a duration, "steps" or "epochs".

    Raises:
        UserError: the duration is of neither form.
    """
    match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*(steps?|epochs?)?\s*", duration)
    if not match or (not (match[2] or "").startswith("epoch") and "." in match[1]):
        raise UserError(f"duration {duration!r} is not understood: use '500 steps' or '7 epochs'")
    return float(match[1]), "epochs" if (match[2] or "").startswith("epoch") else "steps"


def count_steps(duration: str, num_examples: int, batch_size: int) -> int:
    """Steps in a duration: "500 steps" (or "500"), or "7 epochs" of num_examples images each.

    Raises:
        UserError: the duration is of neither form.
    """
    number, unit = parse_duration(duration)
    if unit == "epochs":
        return max(round(number * num_examples / batch_size), 1) if number else 0
    return int(number)


def left_to_weights(config: ConfigDict) -> list[str]:
    """The keys of `config.model` that a config leaves to its weights, see `recipes`."""
    return sorted(key for key in recipes.LEFT_TO_WEIGHTS if config.model.get(key, "") is None)


def take_from_weights(config: ConfigDict, model: Mapping[str, Any]) -> ConfigDict:
    """A config with what it leaves to its weights, see `recipes.LEFT_TO_WEIGHTS`.

    Args:
        config: of a run.
        model: the `model` section of its weights, which is asked for what the config has as None.
    """
    left = left_to_weights(config)
    if not left:
        return config
    filled = config.copy_and_resolve_references()
    filled.model.update({key: model.get(key) for key in left})
    return filled


def complete_evals(config: ConfigDict) -> ConfigDict:
    """A config whose evaluators have all their keys, see `evaluation.registry`."""
    complete = _complete_evals(config)
    if config.evals.to_dict() == complete:
        return config
    filled = config.copy_and_resolve_references()
    filled.evals = complete
    return filled


def _complete_evals(config: ConfigDict) -> dict[str, dict[str, Any]]:
    return {name: registry.complete(x.to_dict()) for name, x in config.evals.items()}


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain nested dictionaries, as they are written to config.json."""
    return json.loads(config.to_json())


def migrate(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config as it would be written today.

    See `ADDED_KEYS`, `REMOVED_KEYS`, `MOVED_KEYS` and `RENAMED_VALUES`.
    """
    values = flatten_dict(dict(saved), keep_empty_nodes=True, sep=".")
    for key, renamed in RENAMED_VALUES.items():
        if key in values:
            values[key] = renamed.get(values[key], values[key])
    if "eval_every" in values:
        for name, kind in (("val", "objective"), ("fewshot", "fewshot")):
            defaults = registry.complete({"type": kind})
            values |= {f"evals.{name}.{key}": value for key, value in defaults.items()}
    for key, moved in MOVED_KEYS.items():
        if key in values:
            values[moved] = values.pop(key)
    for key in REMOVED_KEYS:
        values.pop(key, None)
    return unflatten_dict(ADDED_KEYS | values, sep=".")


def read_config(path: str) -> ConfigDict:
    """The config of a run's config.json: `--config runs/x/config.json` runs it again."""
    try:
        config = ConfigDict(migrate(json.loads(pathlib.Path(path).read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from error
    for key, kind in recipes.LEFT_TO_WEIGHTS.items():
        # A flag can replace null only where it knows the type.
        if isinstance(model := config.get("model"), ConfigDict) and model.get(key, "") is None:
            model[key] = config_dict.placeholder(kind)
    return config
