"""The mapping from the classes of a data set to those of a model."""

from collections.abc import Sequence

from vit_jax.data import classes
from vit_jax.errors import UserError


def match_classes(
    num_classes: int, class_names: Sequence[str] | None, data_names: Sequence[str]
) -> tuple[int, ...]:
    """The class of a model that each class of a data set is, see `classes.match`.

    Args:
        num_classes: of the model.
        class_names: of the model, or None if they are not known.
        data_names: the class names of the data set.

    Raises:
        UserError: it cannot be told, with the way out.
    """
    labels = classes.match(num_classes, class_names, data_names)
    if labels is not None:
        return labels
    names = class_names or ()
    difference = classes.difference(num_classes, class_names, data_names)
    if num_classes != len(data_names):
        if classes.are_numbers(data_names) and {*data_names} < {*names}:
            difference += ", whose names are numbers and may count others"
        raise UserError(f"{difference}: fine-tune it first; only --fewshot needs no head")
    if not classes.positions_may_agree(names, data_names):
        raise UserError(
            f"{difference}, and their positions do not agree: give the classes of the data set the "
            "names that they have in the checkpoint"
        )
    numbers = any(map(classes.are_numbers, (names, data_names)))
    condition = (
        "the numbers count the same classes in the same order" if numbers else ("all mean the same")
    )
    raise UserError(f"{difference}: if {condition}, add --ignore_class_names")
