"""Classes of pixels, as the masks of semantic segmentation give them: an index for each pixel."""

from collections.abc import Sequence

from vit_jax.errors import UserError, brief

# The index of a pixel that counts for nothing, neither in training nor in evaluation.
IGNORED = 255
# A mask has a byte for each pixel.
MOST_CLASSES = IGNORED


def numbered(count: int) -> tuple[str, ...]:
    """The names of classes that have none: their indices."""
    return tuple(map(str, range(count)))


def check_same_classes(
    name: str,
    class_names: Sequence[str],
    of_model: Sequence[str],
    source: str,
    *,
    by_name: bool = True,
    what: str = "masks",
) -> None:
    """Checks that a class in the masks or boxes of a data set means what it means to a model.

    Args:
        name: of the data set.
        class_names: of the data set, by index.
        of_model: those of the model, which may have more.
        source: of the model, as messages name it.
        by_name: whether the names count, or only how many there are.
        what: the data set has, for messages.

    Raises:
        UserError: the data set has a class that the model does not have, or has at another index.
    """
    if not by_name:
        if len(class_names) > len(of_model):
            raise UserError(
                f"{name} has {len(class_names)} classes, and {source} {len(of_model)}: give {what} "
                "without others"
            )
        return
    for index, class_name in enumerate(class_names):
        known = of_model[index] if index < len(of_model) else None
        if class_name != known:
            there = "has no such class" if known is None else f"has {brief(known)} there"
            raise UserError(
                f"class {index} of {name} is {brief(class_name)}, and {source} {there}: give "
                f"{what} of the same classes in the same order"
            )
