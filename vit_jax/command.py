"""How every command reads its flags and ends: a mistake is one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from vit_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is a UserError, without the usage above it.

    Flags are written out in full: an abbreviation would change its meaning with the next flag.
    """

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message} (--help lists all flags)")


def positive(text: str) -> int:
    """The type of a flag that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(main: Callable[[], int]) -> NoReturn:
    """Exits with the code that `main` returns; a user's mistake is one line and code 2.

    A reader of stdout that has gone, as `head` does, ends the command quietly.
    """
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        code = _failed(error)
    except KeyboardInterrupt:
        code = 130  # what a shell says of a process that SIGINT ended
    except OSError as error:
        code = 141 if isinstance(error, BrokenPipeError) else _failed(error)
        # Python would try once more to write what is left in the buffer, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def report(error: Exception) -> None:
    """Prints an error to stderr in one line, whatever a file's name may hold."""
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)


def _failed(error: Exception) -> int:
    report(error)
    return 2
