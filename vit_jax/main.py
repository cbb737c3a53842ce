"""Trains a model: `python -m vit_jax.main --config configs/b16.py`."""

import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from vit_jax import config as config_lib
from vit_jax import tensorflow_env
from vit_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to run: configs/b16.py, configs/b16.py:SPEC, or a run's config.json."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where it goes [runs/<config>-<spec>].")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where there are several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: Sequence[str]) -> None:
    """Runs the config that the flags name."""
    check_arguments(argv)
    distributed = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if None in distributed and any(value is not None for value in distributed):
        raise UserError(
            "--coordinator, --num_processes and --process_id go together: give all three"
        )
    if _COORDINATOR.value:
        jax.distributed.initialize(*distributed)
    workdir = _WORKDIR.value or default_workdir(
        config_flags.get_config_filename(flags.FLAGS["config"])
    )
    tensorflow_env.quiet()
    from vit_jax import train  # TensorFlow takes seconds to import: a wrong flag should not

    if jax.process_index() == 0:
        print(f"workdir: {workdir}", flush=True)
    train.train(_CONFIG.value, workdir)


def check_arguments(argv: Sequence[str]) -> None:
    """Checks what is left of the command line when the flags are parsed, and quietens libraries.

    Raises:
        UserError: there is more than the command's name, or no --config.
    """
    if not flags.FLAGS["verbosity"].present:
        # Libraries log what they raise as well, with its traceback; --verbosity=0 shows it.
        logging.set_verbosity(logging.FATAL)
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag: values go as --config.KEY=VALUE")
    if _CONFIG.value is None:
        raise UserError("--config is missing: for example --config configs/digits.py")


def default_workdir(config: str) -> str:
    """`configs/b16.py:finetune,cifar10` gives `runs/b16-finetune-cifar10`."""
    path, _, spec = config.partition(":")
    if pathlib.Path(path) == pathlib.Path(config_lib.__file__):
        return os.path.dirname(spec) or "."
    words = [pathlib.Path(path).stem, *re.split(r"[^\w.]+", spec)]
    return os.path.join("runs", "-".join(word for word in words if word))


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line.

    Raises:
        UserError: in place of the errors of absl and ml_collections.
    """
    # "--config VALUE" and "-config=VALUE" become "--config=VALUE".
    argv = re.sub(r"\0--?config[\0=]", "\0--config=", "\0".join(argv)).split("\0")
    argv = [_find_config(argument) for argument in argv]
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError) as error:
        cause = error
        while cause:  # What get_config(spec) raised is wrapped twice.
            if isinstance(cause, UserError):
                error = cause
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, UserError):
            raise error from None
        if not isinstance(error, flags.Error):
            _check_overrides(argv)
        raise UserError(str(error).splitlines()[0]) from error


def _find_config(argument: str) -> str:
    """Checks that the config exists, and lets a config.json be read like a config file."""
    match = re.fullmatch(r"--config=([^:]*).*", argument)
    if not match:
        return argument
    path = match[1]
    if not os.path.isfile(path):
        raise UserError(f"config {path} does not exist: for example configs/digits.py")
    return f"--config={config_lib.__file__}:{path}" if path.endswith(".json") else argument


def _check_overrides(argv: Sequence[str]) -> None:
    values = dict(argument.partition("=")[::2] for argument in argv)
    config = flags.FLAGS["config"].parser.parse(values["--config"])
    valid = flatten_dict(config_lib.to_dict(config), sep=".")
    for flag in values:
        key = flag.removeprefix("--config.")
        if key != flag and key not in valid:
            raise config_lib.unknown_key(key, valid)


def _hide_abandoned_writes(unraisable: Any) -> None:
    # When one write of a checkpoint fails, those that orbax abandons complain one by one.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def run(program: Callable[[Sequence[str]], int | None] = main) -> None:
    """Runs a command with these flags: a user's mistake is one line and exit code 2."""
    sys.unraisablehook = _hide_abandoned_writes
    try:
        app.run(program, flags_parser=parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
