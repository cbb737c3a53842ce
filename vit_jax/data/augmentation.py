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


def parse_augment(text: str) -> Augmentation:
    """The augmentation that AugReg calls so, or "randaugment(2,15)+mixup(0.2)", or one of the two.

    Raises:
        UserError: it is none of these, or a number is out of its range.
    """
    written = AUGREG.get(text, text).replace(" ", "")
    found = {}
    for word in written.split("+") if text != "none" else []:
        match = re.fullmatch(r"(randaugment)\((\d+),(\d+)\)|(mixup)\((\d*\.?\d+)\)", word)
        if not match or (match[1] or match[4]) in found:
            raise UserError(
                f"augment {text!r} is not understood: use {', '.join(AUGREG)}, or for "
                "example randaugment(2,15), mixup(0.2) or randaugment(2,15)+mixup(0.2)"
            )
        found[match[1] or match[4]] = match
    augmentation = Augmentation()
    if "randaugment" in found:
        operations, magnitude = (int(number) for number in found["randaugment"].group(2, 3))
        if not (1 <= operations <= 16 and magnitude <= 30):
            raise UserError(
                f"augment {text!r} is out of range: randaugment takes 1 to 16 operations, of a "
                "magnitude from 0 to 30"
            )
        augmentation = augmentation._replace(num_operations=operations, magnitude=magnitude)
    if "mixup" in found:
        alpha = float(found["mixup"][5])
        if not 0 < alpha <= MOST_ALPHA:
            raise UserError(
                f"augment {text!r} is out of range: mixup's alpha must be above 0 and at most "
                f"{MOST_ALPHA}, from where on all are mixed half and half"
            )
        augmentation = augmentation._replace(mixup_alpha=alpha)
    return augmentation
