"""Configs as a command line names them: found by path or by name, changed by flags, explained.

`configs/b16.py:finetune,cifar10`, or `b16:finetune,cifar10` from anywhere, is a file and what its
`get_config` is asked for; `runs/b16/config.json` is a run's. `--config.KEY=VALUE` changes a value.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import os
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from flax.traverse_util import empty_node, flatten_dict
from ml_collections import ConfigDict, config_dict, config_flags

from vit_jax import command, config, provenance, recipes
from vit_jax.config_migration import complete_sections
from vit_jax.config_rules import text_problem
from vit_jax.errors import UserError, brief, brief_name, first_line, nearest
from vit_jax.evaluation import registry
from vit_jax.image_size import ImageSize, from_text
from vit_jax.printable import printable

# Of ml_collections, for what is no value, or no key.
_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, MemoryError, RecursionError)


class _ImageSizeParser(flags.ArgumentParser):
    """Reads 224 as a number and 224x320 as it is written."""

    def parse(self, argument: str | int) -> ImageSize:
        return from_text(str(argument))


config_flags.register_flag_parser_for_type(ImageSize, _ImageSizeParser())

_PACKAGE = pathlib.Path(__file__).parent
# Where this package is installed the configs are in it, in a clone of the repository beside it.
_DIRECTORY = next(
    (path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()),
    _PACKAGE / "configs",
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A config, and where it came from.

    Attributes:
        name: as the user gave it.
        config: with the values of the command line.
        sources: for every key, such as "schedule.base_lr", who set it.
    """

    name: str
    config: ConfigDict
    sources: dict[str, str]


def load(
    name: str | None, argv: Sequence[str] = (), parser: command.Parser | None = None
) -> Loaded:
    """Loads a config and applies `--config.KEY=VALUE`.

    Args:
        name: see the module; None is a UserError.
        argv: these flags, and absl's own.
        parser: of the command, for whoever misspells one of its flags.

    Raises:
        UserError: there is no such config or key, or a value is of another type.
    """
    if name is None:
        _parse_flags(parser, flags.FlagValues(), argv, ConfigDict())
        raise UserError(f"--config is missing: for example --config digits; {_known()}")
    if not name:
        raise UserError("Missing value for flag --config")
    path, spec = find(name)
    with recipes.recording() as recorded:
        loaded = _read(path, spec)
    sources = _sources(loaded, name, recorded)
    _open_image_size(loaded)
    sources |= _add_evaluators(loaded, argv)
    _check_keys(argv, loaded)
    values = flags.FlagValues()
    try:
        # It parses the flags that it is asked to define.
        holder = config_flags.DEFINE_config_dict(
            "config", loaded, flag_values=values, sys_argv=["", *argv]
        )
    except flags.Error as error:
        raise _bad_value(error, loaded) from error
    except _UNREADABLE as error:
        raise _unreadable(error) from error
    _parse_flags(parser, values, argv, loaded)
    changed = config_flags.get_override_values(values["config"])
    for key in flatten_dict(changed, sep="."):
        sources |= {name: "command line" for name in sources if f"{name}.".startswith(f"{key}.")}
    return Loaded(name, _open_evals(holder.value), sources)


def find(name: str) -> tuple[pathlib.Path, str | None]:
    """The file of a config and the spec for it, None if the name has none.

    A config of this package is found by its name; one that had a file of its own once, such as
    `configs/r50_b16.py`, is a spec of `configs/vit.py` now.

    Raises:
        UserError: there is no such file.
    """
    if problem := text_problem(name):
        raise UserError(f"--config {problem}")
    path, colon, spec = name.partition(":")
    if os.path.isfile(path):
        return pathlib.Path(path), spec if colon else None
    if match := re.fullmatch(r"(?:configs/)?(\w+)(?:\.py)?", path):
        file = _DIRECTORY / f"{match[1]}.py"
        if os.path.isfile(file):  # No file has a name that is too long.
            return file, spec if colon else None
        if recipes.model_name(match[1]) != match[1]:
            return _DIRECTORY / "vit.py", ",".join(filter(None, (match[1], spec)))
    near = nearest(match[1], [*_names(), *_spellings()]) if match else None
    hint = f"did you mean {near}? " if near else ""
    shown = brief_name(path, 200)
    raise UserError(f"config {shown} does not exist: {hint}{_known()}")


def _names() -> list[str]:
    return sorted(path.stem for path in _DIRECTORY.glob("*.py"))


def _spellings() -> list[str]:
    """The models as the official code spells them, `ti16`, which are configs too."""
    return list(recipes.OFFICIAL_NAMES)


def _known() -> str:
    return f"known are {', '.join(_names())}, or give a file"


def default_workdir(name: str) -> str:
    """`configs/b16.py:finetune,cifar10` gives `runs/b16-finetune-cifar10`."""
    path, _, spec = name.partition(":")
    if path.endswith(".json"):
        return os.path.dirname(path) or "."
    words = [pathlib.Path(path).stem, *re.split(r"[^\w.]+", spec)]
    return os.path.join("runs", "-".join(word for word in words if word))


def as_command(loaded: Loaded) -> str:
    """The command that makes the same config on any machine: its name, and a flag for each change.

    Args:
        loaded: whose name is of a file that makes the same config whenever it is asked.
    """
    before, now = (
        flatten_dict(x.to_dict(), sep=".") for x in (load(loaded.name).config, loaded.config)
    )
    changed = {key: x for key, x in now.items() if key not in before or before[key] != x}
    flags_ = [f"--config.{key}={value}" for key, value in changed.items()]
    return shlex.join(["vit-jax", "train", "--config", loaded.name, *flags_])


def explain(loaded: Loaded) -> str:
    """Every value of a config in a line, with who set it."""
    values = flatten_dict(loaded.config.to_dict(), sep=".", keep_empty_nodes=True)
    written = {key: f"config.{key} = {_show(value)}" for key, value in values.items()}
    width = min(max(map(len, written.values())), 60)
    lines = (f"{line:{width}}  # {loaded.sources[key]}" for key, line in written.items())
    return "\n".join(map(printable, lines))


def _show(value: Any) -> str:
    return "{}" if value is empty_node else repr(value)


def _read(path: pathlib.Path, spec: str | None) -> ConfigDict:
    if path.suffix == ".json":
        return config.read_config(str(path))
    module_spec = importlib.util.spec_from_file_location(f"{path.stem}_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config {path} is no Python file: give one that ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise UserError(
            f"config {path} has no get_config: define one that returns the ConfigDict of a run"
        )
    if spec is not None and not inspect.signature(get_config).parameters:
        raise UserError(f"config {path} takes no spec: leave out ':{printable(spec[:200])}'")
    made = get_config() if spec is None else get_config(spec)
    if not isinstance(made, ConfigDict):
        raise UserError(
            f"config {path} makes {brief(made)}: its get_config must return the ConfigDict of a run"
        )
    return complete_sections(made)


def _sources(loaded: ConfigDict, name: str, recorded: Sequence[recipes.Recorded]) -> dict[str, str]:
    """Returns each value's source: a recipe, by its table's row, or the file that changed it."""
    values = flatten_dict(loaded.to_dict(), sep=".", keep_empty_nodes=True)
    path = name.partition(":")[0]
    if not recorded:
        return dict.fromkeys(values, path)
    made = recorded[-1]
    of_recipe = provenance.sources(made)
    given = flatten_dict(made.config.to_dict(), sep=".", keep_empty_nodes=True)
    return {
        key: of_recipe[key] if key in given and given[key] == value else path
        for key, value in values.items()
    }


def _parse_flags(
    parser: command.Parser | None,
    values: flags.FlagValues,
    argv: Sequence[str],
    loaded: ConfigDict,
) -> None:
    """Parses the values of the config and absl's own flags, and quiets libraries."""
    values.append_flag_values(flags.FLAGS)
    try:
        rest = values(["", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        flag = f"--{error.flagname}"
        near = parser.nearest(flag) if parser else None
        hint = f": did you mean {near}?" if near else ""
        raise UserError(f"unrecognized arguments: {flag}{hint} (--help lists all flags)") from error
    except flags.Error as error:
        raise _bad_value(error, loaded) from error
    except _UNREADABLE as error:
        raise _unreadable(error) from error
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    if not flags.FLAGS["verbosity"].present:
        # Libraries log what they raise as well, with its traceback; --verbosity=0 shows it.
        logging.set_verbosity(logging.FATAL)
    if rest:
        raise UserError(f"argument {brief(rest[0])} is not a flag: values go as --config.KEY=VALUE")


def _bad_value(error: flags.Error, loaded: ConfigDict) -> UserError:
    """The error for a value that is not of its key's type."""
    line = _line(error)
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    value = flatten_dict(loaded.to_dict(), sep=".").get(match[1]) if match else None
    if match is None or value is None:
        return UserError(line)
    kind = type(value).__name__
    return UserError(f"config.{match[1]} is {brief(match[2])}: it must be of type {kind}")


def _unreadable(error: Exception) -> UserError:
    return UserError(
        f"a value of --config.KEY=VALUE cannot be read, write it as in Python: {_line(error)}"
    )


def _line(error: BaseException) -> str:
    return printable(first_line(error))


def _open_evals(config: ConfigDict) -> ConfigDict:
    """The same config, to whose section `evals` entries can be added; other keys are fixed."""
    if isinstance(evals := config.get("evals"), ConfigDict):
        evals.unlock()
    return config


def _open_image_size(config: ConfigDict) -> None:
    """Lets a flag replace a number by two, or two by one."""
    data = config.get("dataset")
    if isinstance(data, ConfigDict) and isinstance(size := data.get("image_size"), ImageSize):
        with data.unlocked():
            del data["image_size"]
            data["image_size"] = config_dict.FieldReference(size, field_type=ImageSize)


def _add_evaluators(loaded: ConfigDict, argv: Sequence[str]) -> dict[str, str]:
    """Adds the entries of `evals` whose type is given by a flag, so that other flags can set them.

    Returns:
        The sources of their values.
    """
    sources: dict[str, str] = {}
    evals = _open_evals(loaded).get("evals", {})
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        match = re.fullmatch(r"--config\.evals\.(\w+)\.type", flag)
        if not match or match[1] in evals:
            continue
        kind, name = value if equals else following, match[1]
        if not name.isidentifier() or hasattr(ConfigDict, name):
            raise UserError(f"config.evals.{name} is a name that cannot be given: take another")
        try:
            evals[name] = registry.complete({"type": kind})
        except UserError as error:
            raise UserError(f"config.evals.{name}: {error}") from error
        sources |= {f"evals.{name}.{key}": f"default of type {kind}" for key in evals[name]}
    return sources


def _check_keys(argv: Sequence[str], loaded: ConfigDict) -> None:
    leaves = flatten_dict(loaded.to_dict(), sep=".", keep_empty_nodes=True)
    valid = {*leaves, *(key.partition(".")[0] for key in leaves)}
    for argument in argv:
        flag = argument.partition("=")[0]
        key = flag.removeprefix("--config.")
        entry = re.fullmatch(r"evals\.(\w+)\.\w+", key)
        if entry and entry[1] not in loaded.evals:
            raise UserError(
                f"config.evals.{entry[1]} is no evaluator of the config: to add one give its type, "
                f"--config.evals.{entry[1]}.type={'|'.join(registry.EVALUATORS)}"
            )
        if key != flag and key not in valid:
            raise config.unknown_key(key, leaves)
