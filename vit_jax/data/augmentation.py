"""The language of `config.augment`: names and words to numbers, without TensorFlow."""

import re
from typing import NamedTuple

from vit_jax.errors import UserError

# Not in the paper: the augmentations of AugReg (Steiner et al., 2021), by the names of its
# published configs: RandAugment's number of operations and magnitude, and mixup's alpha.
AUGREG = {
    "none": "",
    "light1": "randaugment(2,0)",
    "light2": "randaugment(2,10)+mixup(0.2)",
    "medium1": "randaugment(2,15)+mixup(0.2)",
    "medium2": "randaugment(2,15)+mixup(0.5)",
    "strong1": "randaugment(2,20)+mixup(0.5)",
    "strong2": "randaugment(2,20)+mixup(0.8)",
}

# Towards which gray RandAugment's Contrast goes, see `randaugment.enhance`.
CONTRASTS = ("augreg", "pil")


# The share of an image has a standard deviation of 1 / sqrt(8 alpha + 4).
MOST_ALPHA = 1000


class Augmentation(NamedTuple):
    """The augmentation of training images beyond crop and flip; 0 is nothing."""

    num_operations: int = 0
    magnitude: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    erase_probability: float = 0.0


_NUMBER = r"(\d*\.?\d+)"
_WORDS = {
    "randaugment": re.compile(r"(\d+),(\d+)"),
    "mixup": re.compile(_NUMBER),
    "cutmix": re.compile(_NUMBER),
    "erase": re.compile(_NUMBER),
}


def parse_augment(text: str) -> Augmentation:
    """The augmentation that AugReg calls so, or words, each at most once, joined by "+".

    They are "randaugment(operations,magnitude)", "mixup(alpha)", "cutmix(alpha)" and
    "erase(probability)".

    Raises:
        UserError: it is none of these, or a number is out of its range.
    """
    written = AUGREG.get(text, text).replace(" ", "")
    found: dict[str, tuple[str, ...]] = {}
    for word in written.split("+") if text != "none" else []:
        name, _, rest = word.partition("(")
        numbers = _WORDS[name].fullmatch(rest[:-1]) if name in _WORDS else None
        if not numbers or not rest.endswith(")") or name in found:
            raise UserError(
                f"augment {text!r} is not understood: use {', '.join(AUGREG)}, or for "
                "example randaugment(2,15), mixup(0.2), cutmix(1.0), erase(0.25), or several of "
                "these joined by +"
            )
        found[name] = numbers.groups()
    operations, magnitude = (int(x) for x in found.get("randaugment", ("0", "0")))
    if "randaugment" in found and not (1 <= operations <= 16 and magnitude <= 30):
        raise UserError(
            f"augment {text!r} is out of range: randaugment takes 1 to 16 operations, of a "
            "magnitude from 0 to 30"
        )
    numbers = {name: float(found[name][0]) for name in found if name != "randaugment"}
    _check_ranges(text, numbers)
    return Augmentation(
        operations,
        magnitude,
        numbers.get("mixup", 0.0),
        numbers.get("cutmix", 0.0),
        numbers.get("erase", 0.0),
    )


def _check_ranges(text: str, numbers: dict[str, float]) -> None:
    for name in numbers.keys() & {"mixup", "cutmix"}:
        if not 0 < numbers[name] <= MOST_ALPHA:
            raise UserError(
                f"augment {text!r} is out of range: {name}'s alpha must be above 0 and at most "
                f"{MOST_ALPHA}, from where on all are mixed half and half"
            )
    if not 0 < numbers.get("erase", 1.0) <= 1:
        raise UserError(
            f"augment {text!r} is out of range: erase's probability must be above 0 and at most 1"
        )
