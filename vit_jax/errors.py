"""A user's mistake, told in one line."""

import difflib
from collections.abc import Iterable

from vit_jax.printable import printable


class UserError(ValueError):
    """A mistake that the user can mend, told in one line.

    The message names the offending value, the rule it breaks and the way out. The commands print it
    after ``error:`` and exit with code 2. What it quotes of a file is escaped, see `printable`.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The name among `valid` that is most like another, None if none is like it."""
    if len(name) > 200:  # The time that it takes is quadratic.
        return None
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def shortlist(lines: list[str], limit: int = 4) -> str:
    """Joins the first lines into one and counts the rest."""
    rest = len(lines) - limit
    return "; ".join(lines[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut at 200 characters."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def brief_name(name: str, most: int = 80) -> str:
    """A name as a message shows it: as it is, or as `brief` where it is long or not printable."""
    return name if name.isprintable() and len(name) <= most else brief(name)


def brief(value: object) -> str:
    """A value as a message shows it: its repr in one line, cut at 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python writes no more than it likes.
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} with a number of too many digits"
    text = text.replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."
