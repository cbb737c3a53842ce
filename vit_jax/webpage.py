"""Pages of HTML that load nothing and run no script, on a light and on a dark screen."""

import datetime
import html
import importlib.metadata
import pathlib
import platform
from collections.abc import Iterable

from vit_jax import __version__
from vit_jax.printable import printable

_STYLE = pathlib.Path(__file__).with_suffix(".css")
_NOTHING_FROM_ELSEWHERE = """
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">"""
_VERSIONS_OF = ("jax", "flax", "numpy")


def text(words: str) -> str:
    """Makes text from files or from a user safe between tags and in a quoted attribute."""
    return html.escape(printable(words))


def document(
    title: str, body: Iterable[str], style: str = "", *, self_contained: bool = False
) -> str:
    """Returns a page as a file's text; its footer says when and with what it was made.

    Args:
        title: of the window; plain text.
        body: pieces of HTML; empty ones are left out.
        style: CSS, after that of every page (`webpage.css`).
        self_contained: whether the browser is told to load nothing and to run no script, whatever
            the body may say.
    """
    policy = _NOTHING_FROM_ELSEWHERE if self_contained else ""
    content = "\n".join(filter(None, body))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{policy}
<title>{text(title)}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}{style}</style>
</head>
<body>
{content}
<footer>{text(_made())}</footer>
</body>
</html>
"""


def _made() -> str:
    today = datetime.datetime.now(datetime.UTC)
    versions = [f"vit_jax {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS_OF]
    return f"Made on {today:%Y-%m-%d} with {', '.join(versions)}."
