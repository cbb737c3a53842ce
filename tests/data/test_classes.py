"""Class names: in which order, and which of two lists are the same."""

import pytest

from vit_jax.data.classes import in_order, match, positions_may_agree


def test_numbers_are_ordered_by_value_and_other_names_as_text():
    assert in_order({str(i) for i in range(1000)}) == tuple(str(i) for i in range(1000))
    assert in_order({f"{i:03}" for i in range(1000)}) == tuple(f"{i:03}" for i in range(1000))
    assert in_order({"rose 10", "rose 9", "Aster"}) == ("Aster", "rose 10", "rose 9")
    assert in_order({"10", "9", "a"}) == ("10", "9", "a")
    assert in_order({"1", "01", "-1"}) == ("-1", "01", "1")
    assert in_order({"9" * 5000, "1" + "0" * 5000, "00", "0"}) == ("0", "00", "9" * 5000) + (
        "1" + "0" * 5000,
    )


@pytest.mark.parametrize(
    ("own", "data", "labels"),
    [
        (None, ("a", "b"), (0, 1)),
        (("a", "b"), ("a", "b"), (0, 1)),
        (("Lily Valley", "Colt's foot"), ("lily-valley", "colt_s foot"), (0, 1)),
        (("tench, Tinca tinca", "Goldfish, Carassius_auratus"), ("n01440764", "n01443537"), (0, 1)),
        # In another order.
        (("b", "a"), ("a", "b"), (1, 0)),
        (("n01443537", "n01440764"), ("n01440764", "n01443537"), (1, 0)),
        (("goldfish, Carassius auratus", "tench, Tinca tinca"), ("n01440764", "n01443537"), (1, 0)),
        # Of before numbers were ordered by their values.
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), (0, 1, 3, 2)),
        # Some of the classes.
        (("daisy", "iris", "rose"), ("Rose", "daisy"), (2, 0)),
        # By a word of ImageNet's that no other class has.
        (("n01440764", "n01443537", "n01484850"), ("great_white_shark", "Tench"), (2, 0)),
        (("tench, Tinca tinca", "goldfish, Carassius auratus"), ("goldfish", "n01440764"), (1, 0)),
        # Names that differ in nothing but punctuation are told apart where they can be.
        (("c++", "c#"), ("c#", "c++"), (1, 0)),
        (("c++", "c#"), ("c++", "c#"), (0, 1)),
        # Two of a name, in the same places.
        (("crane", "crane", "owl"), ("crane", "crane", "owl"), (0, 1, 2)),
    ],
)
def test_classes_that_are_the_same(own, data, labels):
    assert match(len(own or data), own, data) == labels


@pytest.mark.parametrize(
    ("own", "data"),
    [
        (None, ("a",)),
        (("a", "b"), ("a", "c")),
        (("a", "b"), ("a", "b", "c")),
        # Which of the two?
        (("crane", "crane", "owl"), ("crane", "owl")),
        (("a", "b", "c"), ("A", "a!")),
        (("crane, bird", "crane, machine"), ("crane",)),
        (("crane, bird", "crane, machine"), ("bird", "Crane bird")),
        (("?, bird", "b"), ("!",)),
        # Three digits need not be three of those ten classes.
        (tuple("0123456789"), ("0", "1", "2")),
        (("0", "1"), ("1", "2")),
    ],
)
def test_classes_that_cannot_be_matched(own, data):
    assert match(len(own or "ab"), own, data) is None


@pytest.mark.parametrize(
    ("own", "data", "may"),
    [
        (("Hund", "Katze"), ("dog", "cat"), True),
        (("tench, Tinca tinca", "goldfish"), ("0", "1"), True),
        (("tench, Tinca tinca", "goldfish"), ("1", "0"), False),
        # Sorted as text the tench would come second.
        (("tench, Tinca tinca", "goldfish, Carassius"), ("goldfish", "tench"), False),
        (("n01440764", "n01443537"), ("fish", "tench"), False),
        (("n01440764", "n01443537"), ("tench", "gold fish"), True),
    ],
)
def test_positions_that_may_agree(own, data, may):
    assert positions_may_agree(own, data) is may
