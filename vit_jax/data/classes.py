"""Class names: their order in a folder, and which classes of two lists are the same."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from vit_jax.data.imagenet import comparable, readable


def are_numbers(names: Iterable[str]) -> bool:
    """Tells whether all names are numbers, such as 0 ... 999, which do not say what a class is."""
    return all(re.fullmatch(r"[0-9]+", name) for name in names)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names in the order of their labels: numbers by their value, others by their characters."""
    names = sorted(names)
    if not are_numbers(names):
        return tuple(names)
    digits = {name: name.lstrip("0") for name in names}  # `int` refuses thousands of them.
    return tuple(sorted(names, key=lambda name: (len(digits[name]), digits[name])))


def match(
    num_classes: int, class_names: Sequence[str] | None, data_names: Sequence[str]
) -> tuple[int, ...] | None:
    """The class of a model that each class of a data set is; None if that is unknown.

    Without names the i-th is the i-th. Names may be in another order, and those of the data set
    only some of the model's, unless they are numbers: 0 ... 9 of one data set need not be those of
    another with more. They are compared as they are, and if that finds nothing without case and
    punctuation, ImageNet's WordNet ids by what they stand for; if that does not either, by one of
    the words of "tench, Tinca tinca" that no other class has.

    Args:
        num_classes: of the model.
        class_names: of the model, or None if they are not known.
        data_names: of the data set.
    """
    same_number = num_classes == len(data_names)
    if class_names is None:
        return tuple(range(num_classes)) if same_number else None
    if not same_number and are_numbers(data_names):
        return None
    for form in (str, comparable):
        own, other = list(map(form, class_names)), list(map(form, data_names))
        if own == other:
            return tuple(range(num_classes))
        if all(Counter(own)[name] == 1 for name in other) and len(set(other)) == len(other):
            return tuple(map(own.index, other))
    return _by_synonym(class_names, data_names)


def _by_synonym(class_names: Sequence[str], data_names: Sequence[str]) -> tuple[int, ...] | None:
    owners: dict[str, set[int]] = {}
    for index, name in enumerate(class_names):
        for synonym in (name, *readable(name).split(",")):
            owners.setdefault(comparable(synonym), set()).add(index)
    owners.pop("", None)  # Of punctuation alone.
    found = [owners.get(comparable(name), set()) for name in data_names]
    if not all(len(owner) == 1 for owner in found) or len(set().union(*found)) < len(found):
        return None
    return tuple(index for owner in found for index in owner)


def difference(
    num_classes: int, class_names: Sequence[str] | None, data_names: Sequence[str]
) -> str:
    """The difference between the classes of a model and of a data set, in one phrase.

    Args:
        num_classes: as in `match`, which has found none.
        class_names: likewise.
        data_names: likewise.
    """
    if not num_classes:
        return "the checkpoint has no head, so it knows no classes"
    if class_names is None or num_classes != len(data_names):
        return f"the checkpoint has {num_classes} classes and the data set {len(data_names)}"
    index, own, other = next(
        (index, own, other)
        for index, (own, other) in enumerate(zip(class_names, data_names, strict=True))
        if comparable(own) != comparable(other)
    )
    return f"class {index} is {own!r} in the checkpoint and {other!r} in the data set"


def positions_may_agree(class_names: Sequence[str], data_names: Sequence[str]) -> bool:
    """Tells whether class i may be class i under another name.

    Not where a name, or its first synonym, is that of another class in the other list, nor where
    numbers do not go up: they count nothing then.
    """

    def places(names: Sequence[str]) -> dict[str, int]:
        return {comparable(readable(name).split(",")[0]): i for i, name in enumerate(names)}

    own, other = places(class_names), places(data_names)
    if any(own[name] != other[name] for name in own.keys() & other.keys()):
        return False
    return all(
        tuple(names) == in_order(names) for names in (class_names, data_names) if are_numbers(names)
    )
