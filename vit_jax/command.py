"""Parts that all commands share: flags are parsed, programs kept, a mistake told in one line."""

import argparse
import contextlib
import os
import platform
import re
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vit_jax import signals
from vit_jax.errors import UserError, nearest
from vit_jax.files import cache_dir
from vit_jax.image_size import ImageSize, from_text, size_problem
from vit_jax.printable import printable

# Each of the random numbers of an initialization takes about as long to compile, in seconds.
_WORTH_KEEPING = 0.1


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is a UserError, without the usage above it.

    Flags are written out in full: an abbreviation would change its meaning with the next flag. Of
    one that does not exist, the nearest is named.
    """

    def __init__(self, **options: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    # The stub has an overload for each kind of namespace.
    def parse_args(  # ty: ignore[incompatible-method-override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Returns the values of the flags; raises a UserError for what is none of them."""
        args = sys.argv[1:] if args is None else list(args)
        # First: a flag that lacks because its name is misspelled would be asked for otherwise.
        for flag in _flags(args):
            if flag not in self._option_string_actions and (near := self.nearest(flag)):
                self.error(f"unrecognized arguments: {flag}: did you mean {near}?")
        return super().parse_args(args, namespace)

    def nearest(self, flag: str) -> str | None:
        """The flag of this parser whose name is most like another, if any is like it."""
        return nearest(flag, [name for name in self._option_string_actions if name[:2] == "--"])

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message} (--help lists all flags)")


def _flags(args: Sequence[str]) -> list[str]:
    """The names of the flags among arguments, up to a `--`."""
    end = args.index("--") if "--" in args else len(args)
    return [arg.partition("=")[0] for arg in args[:end] if arg.startswith("--")]


def positive(text: str) -> int:
    """The type of a flag that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def image_size(text: str) -> ImageSize:
    """The type of a flag that is the size of images: 224, or 224x320, height and width."""
    size = from_text(text)
    if problem := size_problem(size):
        raise argparse.ArgumentTypeError(problem.removeprefix("is "))
    return size


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that runs configs."""
    add_config_flag(parser)
    parser.add_argument("--workdir", metavar="DIR", help="where it goes [runs/<config>-<spec>]")


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names a config."""
    parser.add_argument(
        "--config",
        nargs="?",
        const="",
        metavar="NAME[:SPEC]",
        help="what to run: a file (configs/b16.py), a name (b16, digits, vit), both with a spec "
        "(b16:finetune,cifar10), or a run's config.json",
    )


def add_image_flags(
    parser: argparse.ArgumentParser, batch_size: int | None = 128, usual: str = "128"
) -> None:
    """Adds the flags of a command that goes through the images of a data set once.

    Args:
        parser: gets them.
        batch_size: where the user gives none.
        usual: what --help says of that.
    """
    parser.add_argument("--split", default="", help="to score, in TFDS syntax [validation or test]")
    parser.add_argument("--data_dir", default="", help="where TFDS looks [its default]")
    parser.add_argument(
        "--broken",
        choices=["refuse", "skip"],
        default="refuse",
        help="of a folder or list, files that should be images and are not [refuse]",
    )
    parser.add_argument(
        "--batch_size", type=positive, default=batch_size, metavar="N", help=f"at a time [{usual}]"
    )


def parse_config_flags(
    parser: Parser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the values of a parser's flags, and what is left for `config_files.load`.

    Args:
        parser: has the flags of `add_config_flags`.
        argv: without the program's name.
    """
    argv = sys.argv[1:] if argv is None else argv
    # absl's flags, which these were, may have a single dash.
    return parser.parse_known_args([re.sub(r"^-(?=[a-z]\w)", "--", word) for word in argv])


def keep_programs() -> None:
    """Has JAX keep what it compiles, in `xla` of `files.cache_dir`.

    `JAX_COMPILATION_CACHE_DIR` is another directory, JAX_ENABLE_COMPILATION_CACHE=false keeps
    nothing. Processes may share a directory: JAX finds a program by all that it depends on, its
    versions and flags among them, and compiles anew what it cannot read.
    """
    import jax  # With it --help would take a second.

    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    # Where nothing can be written all is as without.
    with contextlib.suppress(OSError, UserError):
        directory = cache_dir() / "xla" / _processor()
        directory.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    """Names the CPU by what it can do: the program of one may end another that shares a home."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()}-{zlib.crc32(line.encode()):08x}"
    return platform.machine()


def run(main: Callable[[], int]) -> NoReturn:
    """Exits with the code that `main` returns; a user's mistake is one line and code 2.

    A reader of stdout that has gone, as `head` does, ends the command quietly; a signal does in a
    line at most, see `signals.guarding`.
    """
    with signals.guarding() as guard:
        try:
            code = main()
            sys.stdout.flush()
        except UserError as error:
            code = _failed(error)
        except OSError as error:
            code = 141 if isinstance(error, BrokenPipeError) else _failed(error)
            # Python would try once more to write what is left in the buffer, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except SystemExit as error:  # Of --help, and of a run that a signal has ended.
            code = error.code
        except (Exception, KeyboardInterrupt) as error:
            # Libraries make errors of their own of the KeyboardInterrupt that ends them.
            if guard.received is None and not isinstance(error, KeyboardInterrupt):
                raise
            if not isinstance(error, signals.Stopped):
                print("interrupted", file=sys.stderr)
            # What a shell says of a process that the signal has ended.
            code = 128 + (guard.received or signal.SIGINT)
    if isinstance(code, int) and code > 128:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's exit may wait for threads.
    sys.exit(code)


def report(error: Exception) -> None:
    """Prints an error to stderr in one line, whatever a file's name may hold."""
    print("error:", " ".join(map(printable, str(error).splitlines())), file=sys.stderr, flush=True)


def _failed(error: Exception) -> int:
    report(error)
    return 2
