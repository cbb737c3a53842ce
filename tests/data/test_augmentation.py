"""The words of an augmentation, against the paper of AugReg and by hand."""

import re

import pytest

from vit_jax.data.augmentation import parse_augment
from vit_jax.errors import UserError

# Typed from the paper of AugReg and its published configs: operations, magnitude, mixup.
AUGREG = """
none    0 0  0
light1  2 0  0
light2  2 10 0.2
medium1 2 15 0.2
medium2 2 15 0.5
strong1 2 20 0.5
strong2 2 20 0.8
"""


@pytest.mark.parametrize("row", AUGREG.strip().splitlines())
def test_the_augmentations_of_augreg(row):
    name, operations, magnitude, alpha = row.split()
    assert parse_augment(name) == (int(operations), int(magnitude), float(alpha), 0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("randaugment(3,9)", (3, 9, 0, 0, 0)),
        ("randaugment(1, 30)", (1, 30, 0, 0, 0)),
        ("mixup(.3)", (0, 0, 0.3, 0, 0)),
        ("mixup(1)", (0, 0, 1.0, 0, 0)),
        ("randaugment(2,15)+mixup(0.2)", (2, 15, 0.2, 0, 0)),
        ("mixup(0.2) + randaugment(2, 15)", (2, 15, 0.2, 0, 0)),
        ("cutmix(1.0)", (0, 0, 0, 1.0, 0)),
        ("erase(.25)", (0, 0, 0, 0, 0.25)),
        ("erase(1)+mixup(0.8)+randaugment(2,9)+cutmix(1)", (2, 9, 0.8, 1.0, 1.0)),
    ],
)
def test_augmentations_in_words(text, expected):
    assert parse_augment(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("medium", "augment 'medium' is not understood: use none, light1"),
        ("", "augment '' is not understood"),
        ("mixup", "augment 'mixup' is not understood"),
        ("randaugment(2)", "augment 'randaugment(2)' is not understood"),
        ("randaugment(2,-1)", "is not understood"),
        ("mixup(0.2)+mixup(0.3)", "is not understood"),
        ("light1+mixup(0.2)", "is not understood"),
        ("mixup(0.2)+", "is not understood"),
        ("cutmix(1.0", "is not understood"),
        ("cutmix(1)+cutmix(1)", "is not understood"),
        ("cutout(0.5)", "is not understood: use none, light1"),
        ("cutmix(0)", "augment 'cutmix(0)' is out of range: cutmix's alpha must be above 0"),
        ("erase(0)", "erase's probability must be above 0 and at most 1"),
        ("erase(1.5)", "erase's probability must be above 0 and at most 1"),
        ("mixup(0)", "augment 'mixup(0)' is out of range: mixup's alpha must be above 0"),
        ("randaugment(0,10)", "is out of range: randaugment takes 1 to 16 operations"),
        ("randaugment(2,31)", "magnitude from 0 to 30"),
    ],
)
def test_another_augmentation_is_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_augment(text)
    assert "\n" not in str(error.value)
