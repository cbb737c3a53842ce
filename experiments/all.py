"""All tables and figures of the paper: `python -m experiments.all --scale smoke`."""

import importlib
import pathlib
import re

import experiments
from experiments.runner import command
from experiments.runner.experiment import Experiment

_TITLE = "Every table and every figure of the paper. What several of them need runs once."


def find() -> list[Experiment]:
    """The experiments: those of the modules beside this one that have an EXPERIMENT."""
    folder = pathlib.Path(experiments.__file__).parent
    sources = {path.stem: path.read_text() for path in folder.glob("*.py")}
    names = [name for name, text in sources.items() if re.search("^EXPERIMENT =", text, re.M)]
    modules = [importlib.import_module(f"experiments.{name}") for name in sorted(names, key=_place)]
    return [module.EXPERIMENT for module in modules]


def _place(name: str) -> tuple[int, str, int]:
    """Tables come first, then figures, each by number, then what has neither."""
    match = re.fullmatch(r"(table|figure)(\d+)", name)
    return (("table", "figure").index(match[1]), "", int(match[2])) if match else (2, name, 0)


if __name__ == "__main__":
    command.run_all(find(), "python -m experiments.all", _TITLE)
