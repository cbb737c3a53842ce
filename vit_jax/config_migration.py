"""Configs of before: the keys that came, moved and went, and what a saved config means today."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vit_jax.config_rules import RULES, Rule
from vit_jax.evaluation import registry
from vit_jax.models import ARCHITECTURES
from vit_jax.state import DROPS

# Keys that configs did not have from the beginning, and what runs did without them: the value that
# a saved config without the key has.
ADDED_KEYS = {
    "augment_contrast": "pil",
    "class_weights": "",
    "dataset.broken": "refuse",
    "dataset.channels": 3,
    "dataset.holdout": 0.2,
    "dataset.jpeg_dct": "accurate",
    "dataset.sampling": "",
    "dataset.workers": 0,
    "detection.layers": 4,
    "detection.most_boxes": 100,
    "detection.upsample": 1,
    "detection.width": 256,
    "distillation.alpha": 0.5,
    "distillation.kind": "hard",
    "distillation.teacher": "",
    "distillation.temperature": 3.0,
    "keep_head": "never",
    "log_images": "",
    "lora.alpha": 8.0,
    "lora.rank": 0,
    "lora.targets": "query,value",
    "optimizer.layer_decay": 1.0,
    "optimizer.lr_multipliers": "",
    "schedule.cooldown": "0 steps",
    "schedule.drops": list(DROPS),
    "schedule.timescale": "10000 steps",
}
# The same of `config.model`, for the architectures that have them.
ADDED_MODEL_KEYS = {
    "distillation_token": False,
    "dropout_after": "activation",
    "layer_scale": 0.0,
    "mlp": "gelu",
    "num_registers": 0,
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
# Sections that a config file may replace as a whole, such as by `recipes.ADAFACTOR`.
_REPLACED = ("optimizer", "schedule")


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
    return unflatten_dict(ADDED_KEYS | _added_model_keys(values) | values, sep=".")


def _added_model_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    family = ARCHITECTURES.get(str(values.get("model.architecture")))
    fields = {field.name for field in dataclasses.fields(family)} if family else set()
    return {f"model.{key}": x for key, x in ADDED_MODEL_KEYS.items() if key in fields}


def complete_sections(config: ConfigDict) -> ConfigDict:
    """A config whose optimizer and schedule have the keys that were added to these.

    A config file that replaces a section as a whole, written before, does what it did then.
    """
    missing = [
        key
        for key in ADDED_KEYS
        if (section := key.partition(".")[0]) in _REPLACED
        and isinstance(values := config.get(section), ConfigDict)
        and key.partition(".")[2] not in values
    ]
    if not missing:
        return config
    filled = config.copy_and_resolve_references()
    for key in missing:
        section, _, name = key.partition(".")
        with filled[section].unlocked():
            filled[section][name] = of_kind(ADDED_KEYS[key], RULES[key])
    return filled


def of_kind(value: Any, rule: Rule) -> Any:
    """A value as a flag can replace it: JSON has lists for tuples."""
    return tuple(value) if rule.kind is tuple and isinstance(value, list) else value
