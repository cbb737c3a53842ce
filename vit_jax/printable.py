"""Text from files, such as the name of a class, made safe to show."""

import unicodedata

# Between letters and emoji they decide how these look: Persian, Hindi, families of emoji.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""Writes what cannot be seen as an escape, such as `\n` and `\x1b`; all else stays.

    So a name neither steers a terminal nor begins a line of its own. Escaped are control and format
    characters (those that turn the direction of writing among them), separators of lines, what
    Unicode has not assigned, and the bytes of a file name that are no text, which no encoding could
    write either. Letters and spaces of any language and emoji stay. What has been escaped stays
    likewise, so it does no harm to call this twice.
    """
    if text.isprintable():
        return text
    return "".join(x if _can_be_seen(x) else x.encode("unicode_escape").decode() for x in text)


def table_cell(text: str) -> str:
    """Makes a text safe as a cell of a Markdown table, which a `|` would end."""
    return printable(text).replace("|", r"\|")


def csv_cell(text: str) -> str:
    """Makes a text safe as a cell that a spreadsheet opens, which takes `=1+1` for a formula.

    What would be one has an apostrophe before it, as such programs write it themselves.
    """
    return printable(f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text)


def _can_be_seen(character: str) -> bool:
    return character.isprintable() or (
        character in _JOINERS or unicodedata.category(character) == "Zs"
    )
