"""The command line: `vit-jax COMMAND`, each of which is a module that runs alone as well."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from vit_jax import __version__, command
from vit_jax.errors import UserError, nearest


class Command(NamedTuple):
    """A module with `build_parser(prog)` and `main(argv)`, and what it does in a line."""

    module: str
    purpose: str


COMMANDS = {
    "train": Command("vit_jax.main", "pre-train or fine-tune a model"),
    "probe": Command("vit_jax.probe", "fit a linear classifier to a model's features"),
    "evaluate": Command("vit_jax.evaluate", "score a model on a data set"),
    "predict": Command("vit_jax.predict", "tell the classes of images"),
    "segment": Command("vit_jax.segment", "tell the class of every pixel of images"),
    "detect": Command("vit_jax.detect", "find objects in images and draw their boxes"),
    "restore": Command("vit_jax.restore", "mask patches of images and restore them"),
    "features": Command("vit_jax.features", "write features of every patch of images"),
    "convert": Command("vit_jax.convert", "write weights in Google's, timm's or HF's format"),
    "export": Command("vit_jax.export.__main__", "make a SavedModel, ONNX file or TensorRT engine"),
    "serve": Command("vit_jax.serving.__main__", "answer over HTTP with an exported model"),
    "analyze": Command("vit_jax.analysis.__main__", "draw what a model looks at and has learned"),
    "weights": Command("vit_jax.checkpoints.__main__", "find and fetch published weights"),
    "sweep": Command("vit_jax.sweep", "choose the learning rate, then train with several seeds"),
    "plan": Command("vit_jax.plan.__main__", "tell what a run needs of devices that are not here"),
    "doctor": Command("vit_jax.doctor.__main__", "check this machine and what is installed"),
}

_EPILOG = """examples:
  vit-jax predict --checkpoint ViT-B_16-224 photo.jpg
  vit-jax train --data photos/ --init B_16
  vit-jax train --config digits
  vit-jax train --config b16:finetune,cifar10 --config.init_from=B_16
  vit-jax evaluate --checkpoint runs/b16-finetune-cifar10 --dataset cifar10
  vit-jax export --checkpoint runs/digits --output digits
  vit-jax serve --model digits

`vit-jax COMMAND --help` has the flags of each, and its examples.

exit codes:
  0  done
  1  done in part: each lack is one line on stderr
  2  a mistake, told in one line that says the way out
  130, 143  ended by Ctrl-C, SIGTERM: training saves first, a second Ctrl-C does not wait"""


def main() -> NoReturn:
    """Runs the command line, and exits."""
    command.run(lambda: _run(sys.argv[1:]))


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        print(f"vit_jax {__version__}")
        return 0
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else f"use {', '.join(COMMANDS)}"
        raise UserError(f"command {name!r} is unknown: {hint}")
    module = importlib.import_module(COMMANDS[name].module)
    if "-h" in rest or "--help" in rest:
        module.build_parser(f"vit-jax {name}").print_help()
        return 0
    return module.main(rest)


def _help() -> str:
    commands = "\n".join(f"  {name:10}{each.purpose}" for name, each in COMMANDS.items())
    return (
        "usage: vit-jax COMMAND ...\n\nVision Transformers in JAX, from pre-training to a TensorRT "
        f"engine.\n\ncommands:\n{commands}\n\n{_EPILOG}"
    )
