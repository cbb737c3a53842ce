"""The common parts of the configuration files of timm and of Hugging Face."""

from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError, brief
from vit_jax.image_size import ImageSize, of_sides
from vit_jax.models.base import LONGEST, type_problem
from vit_jax.printable import printable

# Names of activations, and the form of GELU that they are.
GELUS = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_tanh": "tanh",
}
# By PIL's numbers too.
INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}


def check_fields(
    values: Mapping[str, Any], fixed: Mapping[str, Any], accepted: Iterable[str]
) -> None:
    """Checks that a configuration has only fields and values that are understood here.

    With others the model would compute something else, and nobody would notice.

    Args:
        values: its fields.
        fixed: those that must have one value; None counts as that value.
        accepted: those that may have any.

    Raises:
        UserError: a field has another value, or is in neither.
    """
    accepted = set(accepted)
    for key, value in values.items():
        field = f"{printable(key)} is {value!r}"[:100]
        if key in fixed:
            if value is not None and value != fixed[key]:
                raise UserError(
                    f"{field}: only models with {fixed[key]!r} are read, as the paper's"
                )
        elif key not in accepted:
            raise UserError(
                f"{field}, and nothing is known of this field: take it out of the file if "
                "predictions do not depend on it"
            )


def choose(table: Mapping[Any, str], key: Any, field: str) -> str:
    """Returns what a table has for the value of a field.

    Raises:
        UserError: the table does not have the value.
    """
    if not isinstance(key, str | int) or key not in table:
        raise UserError(f"{field} {brief(key)} is none of {', '.join(map(str, table))}")
    return table[key]


def whole(value: Any, field: str) -> int:
    """Returns a number of things that there is at least one of, and no more than in any model.

    Raises:
        UserError: it is none.
    """
    if type(value) is not int or not 1 <= value <= LONGEST:
        raise UserError(f"{field} is {brief(value)}: it must be a whole number from 1 to {LONGEST}")
    return value


def real(value: Any, field: str) -> float:
    """Returns a finite number.

    Raises:
        UserError: it is none.
    """
    if problem := type_problem(value, float):
        raise UserError(f"{field} {problem}")
    return float(value)


def yes_or_no(value: Any, field: str) -> bool:
    """Returns a bool; null is no.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, bool | None):
        raise UserError(f"{field} is {brief(value)}: it must be true or false")
    return bool(value)


def labels(value: Any, field: str) -> tuple[str, ...] | None:
    """Returns the names in a list, None if there are none.

    Raises:
        UserError: it is no list.
    """
    if value and not isinstance(value, list):
        raise UserError(f"{field} is {brief(value)}: it must be a list of names")
    return tuple(map(str, value)) if value else None


def check_shapes(
    told: Mapping[str, Any], sizes: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Checks that a configuration is of the model that its weights have the shapes of.

    Args:
        told: its fields.
        sizes: of the model, as far as shapes tell them.
        names: of those fields that are a size, the size.

    Raises:
        UserError: a size is another.
    """
    for field, name in names.items():
        value = told.get(field)
        if value is not None and name in sizes and whole(value, field) != sizes[name]:
            raise UserError(
                f"{field} is {value}, but by the shapes of the weights {sizes[name]}: they are of "
                "different models, fetch both again"
            )


def height_and_width(size: Any, field: str) -> tuple[int, int]:
    """Reads a size that is a number, a pair or a dict of `height` and `width`."""
    if isinstance(size, dict):
        size = size.get("height"), size.get("width")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return whole(height, field), whole(width, field)


def read_size(size: Any, field: str) -> ImageSize:
    """Reads a size as `height_and_width` does."""
    return of_sides(*height_and_width(size, field))


def channels(values: Any) -> tuple[Any, ...]:
    """Reads a number for each channel; `Preprocessing` checks that they are."""
    return tuple(values)


def pil_interpolation(preprocessing: Preprocessing) -> str:
    """Names the kernel of PIL that comes nearest to how images are resized."""
    # Where an image shrinks, PIL's bilinear comes nearest to the mean over areas, which has no name
    # in these files.
    if preprocessing.interpolation == "area":
        return "bilinear"
    return preprocessing.interpolation
