"""The mapping from the classes of a data set to those of a model."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vit_jax.data import classes
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.data.source import Source


def label(
    source: "Source",
    num_classes: int,
    class_names: Sequence[str] | None,
    refusal: Callable[[int, Sequence[str] | None, Sequence[str]], str],
) -> tuple["Source", tuple[int, ...]]:
    """Gives a source the labels of a model's head, see `classes.match`.

    Args:
        source: of the data set.
        num_classes: of the model.
        class_names: of the model, or None if they are not known.
        refusal: what to say, with the way out, where that cannot be told; of the classes of the
            model, their names and those of the data set.

    Returns:
        The source, and the model's class of each of the data set's.

    Raises:
        UserError: it cannot be told which class is which.
    """
    from vit_jax.data.datasets import relabel  # It opens all kinds of data sets.

    labels = classes.match(num_classes, class_names, source.class_names)
    if labels is None:
        raise UserError(refusal(num_classes, class_names, source.class_names))
    if class_names is None or labels == tuple(range(num_classes)):
        return source, labels
    return relabel(source, labels, class_names), labels


def explain(num_classes: int, class_names: Sequence[str] | None, data_names: Sequence[str]) -> str:
    """Tells why a checkpoint cannot be evaluated on a data set, and the way out.

    Args:
        num_classes: of the model.
        class_names: of the model, or None if they are not known.
        data_names: the class names of the data set.
    """
    names = class_names or ()
    difference = classes.difference(num_classes, class_names, data_names)
    if num_classes != len(data_names):
        if classes.are_numbers(data_names) and {*data_names} < {*names}:
            difference += ", whose names are numbers and may count others"
        return f"{difference}: fine-tune it first; only --fewshot needs no head"
    if not classes.positions_may_agree(names, data_names):
        return (
            f"{difference}, and their positions do not agree: give the classes of the data set the "
            "names that they have in the checkpoint"
        )
    numbers = any(map(classes.are_numbers, (names, data_names)))
    condition = (
        "the numbers count the same classes in the same order" if numbers else ("all mean the same")
    )
    return f"{difference}: if {condition}, add --ignore_class_names"
