"""Checks, durations and JSON of a run's config.

A config is an `ml_collections.ConfigDict` that describes a whole run; `vit_jax.recipes` makes them.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from vit_jax import recipes
from vit_jax.config_migration import (
    MOVED_KEYS,
    REMOVED_KEYS,
    complete_sections,
    migrate,
    of_kind,
)
from vit_jax.config_objective import check_objective
from vit_jax.config_rules import (
    MOST_STEPS,
    RULES,
    SECTIONS,
    Rule,
    check_value,
    evaluator_rules,
    model_rules,
    parse_duration,
)
from vit_jax.data.augmentation import parse_augment
from vit_jax.data.source import check_splits
from vit_jax.errors import UserError, brief, brief_name, first_line, nearest
from vit_jax.evaluation import registry
from vit_jax.image_size import ImageSize, sides
from vit_jax.models import describe, vit
from vit_jax.state import (
    ENDING_DECAYS,
    OPTIMIZERS,
    SCHEDULE_LENGTHS,
    check_warmup,
    optimizer_keys,
)

_LEFT_TO_WEIGHTS = {f"model.{key}" for key in recipes.LEFT_TO_WEIGHTS}
# Whose name decides which other keys a section has.
_NAMED = {"model": "architecture", "optimizer": "name"}
# Of an image's forward pass: 200 times those of ViT-22B at 224 pixels, two seconds of an H100.
MOST_MULTIPLY_ADDS = 1e15


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
    config = complete_sections(config)
    check_values(config)
    _check_evals(config.evals)
    _check_model(config.model, config.dataset.image_size)
    check_objective(config)
    _check_channels(config)
    check_teaching(config)
    if not may_lack:
        _check_adapters(config)
    _check_splits(config.dataset)
    _check_durations(config)
    _check_end(config.schedule)


def check_values(config: ConfigDict) -> None:
    """Checks each key and value of a config by its own rule, and not how they go together.

    Raises:
        UserError: as `check_config` does.
    """
    check_keys(config)
    for section, rules in _rules(config).items():
        values = _section(config, section)
        for key in sorted(rules.keys() & values.keys()):  # An evaluator has defaults.
            _check_given(f"{section}.{key}".lstrip("."), values[key], rules[key])


def check_keys(config: ConfigDict) -> None:
    """Checks that a config has the keys that a run reads, and no others; their values may be any.

    Raises:
        UserError: a key is unknown (the nearest valid one is named) or missing, a section is none,
            or the name that decides the keys of a section is unknown.
    """
    _check_names(config, {key.partition(".")[0] for key in RULES}, "")
    for section in sorted(SECTIONS):
        _check_is_section(section, config[section])
    for name, entry in config.evals.items():
        _check_entry(name, entry)
    _check_is_of_its_name(config.optimizer)
    for section, rules in _rules(config).items():
        if section:
            _check_names(_section(config, section), rules, f"{section}.")


def _check_is_section(name: str, values: Any) -> None:
    if not isinstance(values, ConfigDict):
        raise UserError(f"config.{name} is {brief(values)}: it is a section of keys")
    if key := _NAMED.get(name):
        check_value(f"{name}.{key}", values.get(key), RULES[f"{name}.{key}"])


def _check_is_of_its_name(optimizer: ConfigDict) -> None:
    """Refuses the keys of one optimizer under the name of another, as a flag would have them."""
    name, keys = optimizer.name, set(optimizer.keys())
    other = next((each for each in OPTIMIZERS if optimizer_keys(each) == keys), name)
    if other != name and keys != optimizer_keys(name):
        raise UserError(
            f"config.optimizer.name is {name!r} but its other keys are those of {other}, which a "
            "flag cannot change: set config.optimizer as a whole in a config file, see 'Learning "
            "rate and optimizer' in docs/training.md"
        )


def _check_entry(name: str, entry: Any) -> None:
    if not name or not name.isprintable():
        raise UserError(f"config.evals has an entry {name!r}: give it a name of one line of text")
    _check_is_section(f"evals.{name}", entry)
    try:
        registry.complete(entry.to_dict())
    except UserError as error:
        raise UserError(f"config.evals.{name}: {error}") from error


def _rules(config: ConfigDict) -> dict[str, dict[str, Rule]]:
    """The rules of a config's keys, by section; those of the top level are of section ""."""
    rules: dict[str, dict[str, Rule]] = {"": {}}
    for name, rule in RULES.items():
        section, _, key = name.rpartition(".")
        rules.setdefault(section, {})[key] = rule
    del rules["evals.*"]
    keys = optimizer_keys(config.optimizer.name)
    rules["optimizer"] = {key: rules["optimizer"][key] for key in sorted(keys)}
    rules["model"] = model_rules(config.model.architecture)
    for name, entry in config.evals.items():
        rules[f"evals.{name}"] = evaluator_rules(entry["type"])
    return rules


def _section(config: ConfigDict, path: str) -> ConfigDict:
    return functools.reduce(lambda values, key: values[key], filter(None, path.split(".")), config)


def _without_required(config: ConfigDict) -> ConfigDict:
    given = config.copy_and_resolve_references()
    if given.get("init_from") == recipes.REQUIRED:
        given.init_from = ""
    return given


def _check_given(name: str, value: Any, rule: Rule) -> None:
    if isinstance(value, str) and value == recipes.REQUIRED:
        raise UserError(f"config.{name} must be given: --config.{name}=...")
    if value is not None or name not in _LEFT_TO_WEIGHTS:
        check_value(name, value, rule)


def _check_names(keys: Iterable[str], valid: Iterable[str], prefix: str) -> None:
    for key in sorted(set(keys) - set(valid)):
        raise unknown_key(prefix + key, [prefix + name for name in valid])
    has_defaults = prefix.startswith("evals.")
    for key in sorted(set() if has_defaults else set(valid) - set(keys)):
        raise UserError(f"config.{prefix}{key} is missing")


def _check_evals(evals: ConfigDict) -> None:
    prefixes = {}
    for name, values in evals.items():
        settings = registry.complete(values.to_dict())
        registry.EVALUATORS[settings["type"]].check(settings)
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


def _check_model(model: ConfigDict, image_size: ImageSize) -> None:
    description = describe(dict(model))
    if isinstance(description, vit.ViTConfig):
        description.grid(*sides(image_size))
    if (cost := description.multiply_adds(image_size)) > MOST_MULTIPLY_ADDS:
        raise UserError(
            f"config.model has {cost:.1e} multiply-adds for an image of config.dataset.image_size "
            f"{image_size}: at most {MOST_MULTIPLY_ADDS:.0e} can be trained, make either smaller"
        )


def _check_splits(data: ConfigDict) -> None:
    try:
        check_splits(
            train_split=data.train_split, eval_split=data.eval_split, development=data.development
        )
    except UserError as error:
        raise UserError(f"config.dataset: {error}") from error


def _check_channels(config: ConfigDict) -> None:
    """Refuses what is of red, green and blue where images have other channels."""
    channels = config.dataset.channels
    if channels == 3:
        return
    if config.objective == "masked_patches":
        raise UserError(
            f"config.dataset.channels is {channels}, but objective masked_patches predicts the "
            "colors of RGB images: set --config.dataset.channels=3"
        )
    if parse_augment(config.augment).num_operations:
        raise UserError(
            f"config.augment is {config.augment!r}, but RandAugment's operations are of RGB images "
            f"and config.dataset.channels is {channels}: use mixup, cutmix and erase, or none"
        )


def _check_durations(config: ConfigDict) -> None:
    parsed = {}
    for key, text in {
        "duration": config.duration,
        **{f"schedule.{key}": config.schedule[key] for key in SCHEDULE_LENGTHS},
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
        **{f"evals.{name}.every": x["every"] for name, x in _complete_evals(config).items()},
    }.items():
        parsed[key] = parse_duration(text)
    duration, unit = parsed["duration"]
    if duration == 0:
        raise UserError(f"duration {config.duration!r} is 0 {unit}: it must be at least 1 step")
    if parsed["schedule.timescale"][0] == 0:
        raise UserError("schedule.timescale is 0: it must be at least 1 step")
    # Only the data set tells how many steps an epoch has: of another unit it is checked later.
    warmup, cooldown = (
        length if its_unit == unit else 0
        for length, its_unit in (parsed["schedule.warmup"], parsed["schedule.cooldown"])
    )
    check_warmup(warmup, duration, unit, cooldown)
    deciding = f"evals.{registry.DECIDING}.every"
    if config.patience and parsed[deciding][0] == 0:
        raise UserError(
            f"patience is {config.patience} but {deciding} is "
            f"{config.evals[registry.DECIDING].every!r}: only evaluations can stop the run, set an "
            "interval"
        )


def _check_end(schedule: ConfigDict) -> None:
    ends_at_0 = parse_duration(schedule.cooldown)[0] > 0
    if schedule.end_lr and (ends_at_0 or schedule.decay not in ENDING_DECAYS):
        ending = "a cool-down ends at 0" if ends_at_0 else f"decay {schedule.decay} has no end"
        raise UserError(
            f"schedule.end_lr is {schedule.end_lr} but {ending}: set --config.schedule.end_lr=0"
        )


def check_teaching(config: ConfigDict) -> None:
    """Checks that a model can learn all that it is for from its teacher, if it has one.

    Raises:
        UserError: it is to learn something else than classes, or one of its heads learns nothing.
    """
    if not config.distillation.teacher:
        return
    for key, needed in (("objective", "classification"), ("loss", "softmax")):
        if config[key] != needed:
            raise UserError(
                f"config.{key} is {config[key]!r}, but a teacher's classes are learned with "
                f"{needed}: set --config.{key}={needed}, or leave config.distillation.teacher out"
            )
    if config.distillation.alpha == 1 and config.model.get("distillation_token"):
        raise UserError(
            "config.distillation.alpha is 1, but with a distillation_token only labels teach the "
            "other head, and they count for nothing then: set --config.distillation.alpha=0.5"
        )


def _check_adapters(config: ConfigDict) -> None:
    if not config.lora.rank:
        return
    if config.objective == "masked_patches":
        raise UserError(
            f"config.lora.rank is {config.lora.rank}, but objective {config.objective} pre-trains "
            "all parameters: set --config.lora.rank=0"
        )
    if not config.init_from:
        raise UserError(
            f"config.lora.rank is {config.lora.rank}, but there are no weights to adapt: give "
            "--config.init_from=..., or set --config.lora.rank=0"
        )


def unknown_key(key: str, valid: Iterable[str]) -> UserError:
    """The error for a key that nothing reads, with its name of today or the nearest valid one."""
    sections = {old.partition(".")[0]: new.rpartition(".")[0] for old, new in MOVED_KEYS.items()}
    key = brief_name(key)
    if moved := (sections | MOVED_KEYS).get(key):
        return UserError(f"config.{key} is config.{moved} today: set that")
    if key in REMOVED_KEYS:
        return UserError(f"config.{key} is gone, {REMOVED_KEYS[key]}: leave it out")
    leaves = {name.rpartition(".")[2]: name for name in sorted(valid)}
    last = key.rpartition(".")[2]
    if near := nearest(last, leaves):
        hint = f"did you mean config.{leaves[near]}?"
    elif having := [name for name in leaves.values() if last in re.split(r"[._]", name)]:
        having.sort(key=lambda name: not name.endswith(last))
        hint = f"did you mean {' or '.join(f'config.{name}' for name in having)}?"
    else:
        hint = f"valid are {_listed(leaves.values())}"
    return UserError(f"config.{key} is not a key that anything reads: {hint}")


def _listed(names: Iterable[str]) -> str:
    """Names of keys, of many those of their sections alone."""
    names = sorted(names)
    if len(names) <= 20:
        return ", ".join(names)
    first = dict.fromkeys(re.sub(r"\..*", ".*", name) for name in names)
    return f"{', '.join(first)}; --print_config shows all"


def count_steps(duration: str, num_examples: int, batch_size: int) -> int:
    """Steps in a duration: "500 steps" (or "500"), or "7 epochs" of num_examples images each.

    Raises:
        UserError: the duration is of neither form, or of more steps than int32 counts.
    """
    number, unit = parse_duration(duration)
    if unit == "steps" or not number:
        return int(number)
    steps = max(round(number * num_examples / batch_size), 1)
    if steps > MOST_STEPS:
        raise UserError(
            f"duration {duration!r} is {steps} steps of {batch_size} images: at most {MOST_STEPS} "
            "are counted, shorten it"
        )
    return steps


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


def _restore_tuples(config: ConfigDict) -> None:
    for path, rules in _rules(config).items():
        section = _section(config, path)
        for key in section.keys() & rules.keys():
            if (value := of_kind(section[key], rules[key])) is not section[key]:
                del section[key]  # A ConfigDict would make a list of it again.
                section[key] = value


def read_config(path: str) -> ConfigDict:
    """The config of a run's config.json: `--config runs/x/config.json` runs it again.

    Raises:
        UserError: it cannot be read, or its keys are not those of a run, see `check_keys`.
    """
    try:
        saved = json.loads(pathlib.Path(path).read_text())
        if not isinstance(saved, dict):
            raise ValueError(f"it is {brief(saved)}, not an object of keys and values")
        config = ConfigDict(migrate(saved))
        check_keys(config)
        _restore_tuples(config)
    # A key that a ConfigDict cannot have is one of the others.
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"config {path} cannot be read: {first_line(error)}: give the config.json of a run"
        ) from error
    for key, kind in recipes.LEFT_TO_WEIGHTS.items():
        # A flag can replace null only where it knows the type.
        if config.model.get(key, "") is None:
            config.model[key] = config_dict.placeholder(kind)
    return config
