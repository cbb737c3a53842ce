"""The common parts of the configuration files of timm and of Hugging Face."""

from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError

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
        field = f"{key if key.isprintable() else ascii(key)} is {value!r}"[:100]
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
        raise UserError(f"{field} {key!r} is none of {', '.join(map(str, table))}")
    return table[key]


def height_and_width(size: Any) -> tuple[int, int]:
    """Reads a size that is a number, a pair or a dict of `height` and `width`."""
    if isinstance(size, dict):
        size = size.get("height"), size.get("width")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def channels(values: Any) -> tuple[Any, ...]:
    """Reads a number for each of red, green and blue; `Preprocessing` checks that they are."""
    return tuple(values)


def pil_interpolation(preprocessing: Preprocessing) -> str:
    """Names the kernel of PIL that comes nearest to how images are resized."""
    # Where an image shrinks, PIL's bilinear comes nearest to the mean over areas, which has no name
    # in these files.
    if preprocessing.interpolation == "area":
        return "bilinear"
    return preprocessing.interpolation
