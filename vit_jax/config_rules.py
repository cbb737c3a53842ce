"""The rule of every key of a config: its type, the values that it may have, and why.

A key of `recipes.base` has a row in `RULES`; those of `config.model` have theirs beside the fields
of `models.ModelConfig`. No number is NaN or infinite, and a bool is no number.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Collection
from itertools import pairwise
from types import UnionType
from typing import Any

from ml_collections import ConfigDict

from vit_jax.data.augmentation import CONTRASTS, parse_augment
from vit_jax.data.class_weights import CLASS_WEIGHTS
from vit_jax.data.order import SAMPLINGS
from vit_jax.data.protocols import JPEG_DCTS, MAX_CHANNELS, PROTOCOLS
from vit_jax.data.subset import parse_subset
from vit_jax.distillation import KINDS
from vit_jax.errors import UserError, brief, first_line
from vit_jax.evaluation import registry
from vit_jax.evaluation.fewshot import parse_shots
from vit_jax.image_size import ImageSize, size_problem
from vit_jax.lora import parse_targets
from vit_jax.models import ARCHITECTURES, DTYPES, field_type, model_config, model_fields
from vit_jax.models.base import type_problem
from vit_jax.models.detection import UPSAMPLES
from vit_jax.models.masked import TARGETS
from vit_jax.multipliers import parse_multipliers
from vit_jax.sharding import parse_sharding
from vit_jax.state import DECAY_MASKS, DECAYS, DROPS, OPTIMIZERS
from vit_jax.steps import LOSSES

OBJECTIVES = ("classification", "masked_patches", "segmentation", "detection")
KEEP_HEAD = ("never", "auto")
BROKEN = ("refuse", "skip")

# Says of a value of the right type what is wrong with it, None if nothing.
Problem = Callable[[Any], str | None]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a key may have.

    Attributes:
        kind: its type; an int will do for a float, a list for a tuple.
        problem: says of a value of that type what is wrong with it.
        example: a value that is right.
    """

    kind: type | UnionType
    problem: Problem
    example: Any


def check_value(key: str, value: Any, rule: Rule) -> None:
    """Checks one value of a config.

    Args:
        key: dotted, such as "schedule.base_lr".
        value: of the key.
        rule: of the key.

    Raises:
        UserError: it is of another type, not finite, or refused by the rule.
    """
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    if problem := type_problem(value, rule.kind) or rule.problem(value):
        space = "" if problem.startswith(":") else " "
        way_out = "" if rule.example is None else f"; try --config.{key}={_as_flag(rule.example)}"
        raise UserError(f"config.{key}{space}{problem}{way_out}")


def _as_flag(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if re.fullmatch(r"[\w.,:/%-]+", text) else f"'{text}'"


def _between(kind: type, least: float, most: float, example: float, reason: str) -> Rule:
    """A number; the reason says why there is none above `most`."""

    def problem(value: float) -> str | None:
        if value < least:
            rule = f"be at least {least}" if least else "not be negative"
            return f"is {brief(value)}: it must {rule}"
        if value > most:
            shown = most if kind is int else f"{most:g}"
            return f"is {brief(value)}: it must be at most {shown}, {reason}"
        return None

    return Rule(kind, problem, example)


def _fraction(example: float) -> Rule:
    """A share: at 1 nothing would be left, of what is averaged or smoothed, to learn from."""

    def problem(value: float) -> str | None:
        return None if 0 <= value < 1 else f"is {brief(value)}: it must be from 0 to below 1"

    return Rule(float, problem, example)


def _above_zero(most: float, example: float, reason: str) -> Rule:
    bounded = _between(float, 0, most, example, reason)

    def problem(value: float) -> str | None:
        return bounded.problem(value) if value > 0 else f"is {brief(value)}: it must be above 0"

    return Rule(float, problem, example)


def _one_of(names: Collection[str], example: str) -> Rule:
    """One of the names that there are when it is asked: a registry may grow."""

    def problem(value: str) -> str | None:
        listed = (" or " if len(names) == 2 else ", ").join(names)
        return None if value in names else f"{brief(value)} is unknown: use {listed}"

    return Rule(str, problem, example)


def _one_of_or_none(names: Collection[str], example: str) -> Rule:
    """One of the names, of which "" switches it off."""
    listed = ", ".join(name or "'' for none" for name in sorted(names, reverse=True))

    def problem(value: str) -> str | None:
        return None if value in names else f"{brief(value)} is unknown: use {listed}"

    return Rule(str, problem, example)


def _evaluator_type(example: str) -> Rule:
    return Rule(str, lambda name: _one_of(registry.EVALUATORS, example).problem(name), example)


def _yes_or_no(example: bool) -> Rule:
    return Rule(bool, lambda value: None, example)  # noqa: ARG005


def text_problem(value: str, most: int = 4096) -> str | None:
    """Says why a text is no name of anything: as a path of Linux it is one line, and not long."""
    if len(value) > most:
        return f"is {brief(value)}: it must have at most {most} characters"
    # Control characters, and halves of a character, which UTF-8 cannot write.
    odd = next((x for x in value if unicodedata.category(x) in ("Cc", "Cs")), None)
    if odd is not None:
        return f"is {brief(value)}: it must be one line of text, without {ascii(odd)}"
    return None


def _text(example: str, most: int = 4096) -> Rule:
    return Rule(str, lambda value: text_problem(value, most), example)


def _read_by(parse: Callable[[str], Any], example: str, most: int = 200) -> Rule:
    """Text in a small language, whose parser says in a UserError what is wrong with it.

    Nothing in most of them is longer than 200 characters, and Python reads no number of thousands
    of digits.
    """

    def problem(value: str) -> str | None:
        if bad := text_problem(value, most):
            return bad
        try:
            parse(value)
        except UserError as error:
            return f": {first_line(error)}"
        return None

    return Rule(str, problem, example)


# Of steps, which are counted in int32.
MOST_STEPS = 2**31 - 1


def parse_duration(duration: str) -> tuple[float, str]:
    """The number and the unit of a duration, "steps" or "epochs".

    Raises:
        UserError: the duration is of neither form, or longer than steps can be counted.
    """
    form = r"\s*(\d+(?:_\d+)*(?:\.\d+)?)\s*(steps?|epochs?)?\s*"
    match = re.fullmatch(form, duration, re.ASCII)
    if not match or (not (match[2] or "").startswith("epoch") and "." in match[1]):
        raise UserError(f"duration {duration!r} is not understood: use '500 steps' or '7 epochs'")
    unit = "epochs" if (match[2] or "").startswith("epoch") else "steps"
    if float(match[1]) > MOST_STEPS:
        raise UserError(f"duration {duration!r} is above {MOST_STEPS} {unit}, which int32 counts")
    return float(match[1]), unit


PICTURES = ("inputs", "attention", "confusion")


def parse_pictures(text: str) -> frozenset[str]:
    """The pictures that a config's `log_images` names, "inputs,attention"; "" is none.

    Raises:
        UserError: one of them is unknown.
    """
    names = text.split(",") if text else []
    for name in names:
        if name not in PICTURES:
            raise UserError(f"{brief(name)} is unknown: use {', '.join(PICTURES)}")
    return frozenset(names)


def _drops_problem(drops: Collection[Any]) -> str | None:
    # Ascending shares between 0 and 1. A tenth, a hundred times, is 0 in float32.
    shares = [0.0, *drops, 1.0]
    numbers = all(isinstance(x, float) for x in shares)
    if not (numbers and len(drops) <= 100 and all(a < b for a, b in pairwise(shares))):
        return f"is {brief(drops)}: it must be up to 100 ascending shares between 0 and 1"
    return None


_DURATION = _read_by(parse_duration, "500 steps")
_LARGEST_BATCH = "far above any published batch"
_LARGEST_RATE = "far above any rate that trains"

RULES: dict[str, Rule] = {
    # JAX's keys have 32 bits: of a larger seed they would be those of another.
    "seed": _between(int, -(2**31), 2**32 - 1, 0, "JAX's random keys have 32 bits"),
    "batch_size": _between(int, 1, 2**24, 512, _LARGEST_BATCH),
    "accumulate_steps": _between(int, 1, 2**24, 1, _LARGEST_BATCH),
    "duration": _DURATION,
    "init_from": _text("B_16"),
    "keep_head": _one_of(KEEP_HEAD, "auto"),
    "objective": _one_of(OBJECTIVES, "classification"),
    "masking.rate": Rule(
        float,
        lambda x: None if 0 < x <= 1 else f"is {brief(x)}: it must be above 0 and at most 1",
        0.5,
    ),
    "masking.target": _one_of(TARGETS, "mean_color"),
    "detection.width": _between(int, 1, 2**14, 256, "far above any published head's"),
    "detection.layers": _between(int, 0, 64, 4, "far above any published head's"),
    "detection.upsample": Rule(
        int,
        lambda x: None if x in UPSAMPLES else f"is {brief(x)}: it must be 1, 2 or 4",
        2,
    ),
    "detection.most_boxes": _between(int, 1, 2**14, 100, "far above what an image shows"),
    "distillation.teacher": _text("runs/large"),
    "distillation.kind": _one_of(KINDS, "hard"),
    "distillation.alpha": _above_zero(1, 0.5, "where labels count for nothing"),
    "distillation.temperature": _above_zero(1000, 3.0, "where all classes are alike"),
    "loss": _one_of(LOSSES, "softmax"),
    "label_smoothing": _fraction(0.1),
    "class_weights": _one_of_or_none(CLASS_WEIGHTS, "balanced"),
    "augment": _read_by(parse_augment, "medium1"),
    "augment_contrast": _one_of(CONTRASTS, "augreg"),
    "ema_decay": _fraction(0.9999),
    "lora.rank": _between(int, 0, 4096, 8, "where kernels have hardly a higher one"),
    "lora.alpha": _above_zero(1e6, 8.0, _LARGEST_RATE),
    "lora.targets": _read_by(parse_targets, "query,value"),
    "sharding": _read_by(parse_sharding, "fsdp"),
    "log_every": _DURATION,
    "log_images": _read_by(parse_pictures, "inputs,attention,confusion"),
    "evals.*.type": _evaluator_type("objective"),
    "evals.*.dataset": _text("cifar10"),
    "evals.*.data_dir": _text("/data/tfds"),
    "evals.*.split": _text("test", most=1000),
    "evals.*.every": _DURATION,
    "evals.*.shots": _read_by(parse_shots, "1,5,10,25"),
    "patience": _between(int, 0, MOST_STEPS, 0, "more than a run can have evaluations"),
    "checkpoint_every": _DURATION,
    "keep_checkpoints": _between(int, 1, MOST_STEPS, 2, "more than a run can save"),
    "dataset.name": _text("cifar10"),
    "dataset.data_dir": _text("/data/tfds"),
    "dataset.train_split": _text("train", most=1000),
    "dataset.eval_split": _text("test", most=1000),
    "dataset.development": _yes_or_no(True),
    "dataset.subset": _read_by(lambda text: text and parse_subset(text), "10%"),
    # It is the key of a hash, of 8 bytes.
    "dataset.subset_seed": _between(int, 0, 2**63 - 1, 0, "it is hashed as 8 bytes"),
    "dataset.sampling": _one_of_or_none(SAMPLINGS, "balanced"),
    "dataset.holdout": Rule(
        float,
        lambda x: None if 0 < x < 1 else f"is {brief(x)}: it must be above 0 and below 1",
        0.2,
    ),
    "dataset.broken": _one_of(BROKEN, "skip"),
    "dataset.image_size": Rule(ImageSize, size_problem, 224),
    "dataset.channels": _between(int, 1, MAX_CHANNELS, 3, "more than cameras have"),
    "dataset.protocol": _one_of(PROTOCOLS, "big_vision"),
    "dataset.jpeg_dct": _one_of(JPEG_DCTS, "accurate"),
    "dataset.random_crop": _yes_or_no(True),
    "dataset.random_flip": _yes_or_no(True),
    "dataset.workers": _between(int, 0, 4096, 0, "a machine has no more cores"),
    "model.architecture": _one_of(ARCHITECTURES, "vit"),
    "optimizer.name": _one_of(OPTIMIZERS, "adam"),
    "optimizer.b1": _fraction(0.9),
    "optimizer.b2": _fraction(0.999),
    "optimizer.momentum": _fraction(0.9),
    "optimizer.decay_rate": _above_zero(10, 0.8, "where the second moment is kept from the start"),
    "optimizer.weight_decay": _between(float, 0, 1e6, 0.1, _LARGEST_RATE),
    "optimizer.decay": _one_of(DECAY_MASKS, "all"),
    "optimizer.mu_dtype": _one_of(DTYPES, "float32"),
    # Gradients are float32, of which 1e38 is the end; 0 is off.
    "optimizer.clip_norm": _between(float, 0, 1e30, 1.0, "float32 has hardly larger norms"),
    # An entry for each layer of a deep model, or for each of its parameters by its name.
    "optimizer.lr_multipliers": _read_by(
        parse_multipliers, "head/.*=10,embedding/.*=0", most=10_000
    ),
    "optimizer.layer_decay": _above_zero(1, 0.75, "at which all layers have the same rate"),
    "schedule.base_lr": _above_zero(1e6, 1e-3, _LARGEST_RATE),
    "schedule.decay": _one_of(DECAYS, "cosine"),
    "schedule.warmup": _DURATION,
    "schedule.end_lr": _between(float, 0, 1e6, 0.0, _LARGEST_RATE),
    "schedule.timescale": _DURATION,
    "schedule.drops": Rule(tuple, _drops_problem, DROPS),
    "schedule.cooldown": _DURATION,
}

# Keys are grouped in these.
SECTIONS = {key.partition(".")[0] for key in RULES if "." in key}
_OF_MODELS = {"num_classes": 1000, "resnet_layers": (3, 4, 6, 3), **model_config("ViT-B/16")}


def model_rules(architecture: str) -> dict[str, Rule]:
    """The rules of the keys of `config.model` for an architecture, from its description."""
    rules = {"architecture": RULES["model.architecture"]}
    for key, field in model_fields(architecture).items():
        kind, metadata = field_type(field), field.metadata
        default = None if field.default is dataclasses.MISSING else field.default
        example = _OF_MODELS.get(key, default)
        if metadata.get("choices"):
            rules[key] = _one_of(metadata["choices"], example)
        else:
            rules[key] = Rule(kind, metadata.get("check") or (lambda value: None), example)  # noqa: ARG005
    return rules


def evaluator_rules(kind: str) -> dict[str, Rule]:
    """The rules of the keys of an entry of `config.evals` of a type.

    A key that has no row, as those of a type that one writes, must be of its default's type.
    """
    defaults = {"type": kind, **registry.EVALUATORS[kind].defaults}
    return {
        key: RULES.get(f"evals.*.{key}") or Rule(type(default), lambda value: None, default)  # noqa: ARG005
        for key, default in defaults.items()
    }
