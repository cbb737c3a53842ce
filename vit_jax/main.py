"""Trains a model: `python -m vit_jax.main --config configs/b16.py`, or `vit-jax train`."""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax import command, processes, tensorflow_env
from vit_jax.errors import UserError
from vit_jax.printable import printable

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_EPILOG = """examples:
  %(prog)s --data photos/ --init B_16
  %(prog)s --config digits
  %(prog)s --config b16:pretrain,imagenet21k --workdir runs/b16
  %(prog)s --config b16:finetune,cifar10 --config.init_from=B_16 --config.batch_size=128
  %(prog)s --config b16:finetune,folder:/data/flowers --config.init_from=B_16
  %(prog)s --config vit:R50+ViT-B/16,finetune,cifar10 --print_config
  %(prog)s --config runs/b16/config.json

Every value of the config can be changed: --config.KEY=VALUE; --print_config lists them. The same
command continues a run that was stopped."""


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command; `--config.KEY=VALUE` is left to `config_files`."""
    parser = command.Parser(
        prog=prog, description="Pre-trains or fine-tunes a model.", epilog=_EPILOG
    )
    command.add_config_flags(parser)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="in place of --config: images to fine-tune on, a folder of folders of classes, or a "
        "list; the rest is chosen to suit them, and said",
    )
    parser.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="with --data: what to begin with, as --config.init_from: a file, a run, B_16, hf:...",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print every value with where it comes from, and do nothing else",
    )
    parser.add_argument(
        "--track",
        default="",
        metavar="NAME[:PROJECT]",
        help="show the run there too: wandb[:PROJECT] or mlflow[:EXPERIMENT] [tensorboard]",
    )
    parser.add_argument(
        "--profile",
        default="",
        metavar="FIRST:LAST",
        help="write a trace of these steps, 10:20 for example, for TensorBoard or Perfetto",
    )
    group = parser.add_argument_group(
        "several processes, each started with all three; none under Slurm, Open MPI, Kubernetes"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0; auto lets JAX find all three"
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which this is, from 0")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the config that the flags name; returns the exit code."""
    parser = build_parser("python -m vit_jax.main")
    args, values = command.parse_config_flags(parser, argv)
    if args.data is not None or args.init is not None:
        return _train_on(args, values, parser)
    # With JAX they take a second to import: --help should not.
    from vit_jax import config_files
    from vit_jax.config import check_config

    loaded = config_files.load(args.config, values, parser)
    processes.check_flags(*_several(args))
    check_config(loaded.config, may_lack=args.print_config)
    if args.print_config:
        print(config_files.explain(loaded))
        return 0
    workdir = args.workdir or config_files.default_workdir(loaded.name)
    processes.join(*_several(args), workdir)
    with processes.ending_together():
        _train(loaded.config, workdir, args.track, args.profile)
    return 0


def _several(args: argparse.Namespace) -> tuple[str | None, int | None, int | None]:
    return args.coordinator, args.num_processes, args.process_id


def _train_on(args: argparse.Namespace, values: Sequence[str], parser: command.Parser) -> int:
    """Runs what is chosen for the images of `--data` and the weights of `--init`."""
    if args.data is None:
        raise UserError("--init goes with --data; with --config it is --config.init_from=WEIGHTS")
    if args.config is not None:
        raise UserError("--data chooses a config, and --config names one: give one of them")
    from vit_jax import config_files, own_images
    from vit_jax.config import check_config
    from vit_jax.terminal import say

    processes.check_flags(*_several(args))
    workdir = args.workdir or own_images.default_workdir(args.data)
    processes.join(*_several(args), workdir)  # First: what is chosen depends on all devices.
    with processes.ending_together():
        loaded, lines = own_images.choose(args.data, args.init, values, workdir, parser)
        check_config(loaded.config)
        if args.print_config:
            print(config_files.explain(loaded))
            return 0
        for line in lines:
            say(line)
        _train(loaded.config, workdir, args.track, args.profile)
    return 0


def _train(config: "ConfigDict", workdir: str, track: str, profile: str) -> None:
    _check_inputs(config.init_from, config.dataset.name, workdir)
    tensorflow_env.quiet()
    import jax

    command.keep_programs()
    if jax.process_index() == 0:
        print(printable(f"workdir: {workdir}"), flush=True)
    from vit_jax import train  # It takes seconds to import: a wrong flag should not.

    sys.unraisablehook = functools.partial(_hide_abandoned_writes, sys.unraisablehook)
    train.run_checked(config, workdir, train.Shown(track, profile))


def _check_inputs(init_from: str, dataset: str, workdir: str) -> None:
    """Raises a UserError if weights or files of images are not there, before either is read."""
    from vit_jax.checkpoints.pretrained import check_exists
    from vit_jax.checkpoints.training import saved_steps

    has_begun = saved_steps(pathlib.Path(workdir, "checkpoints"))
    if init_from and not has_begun:  # What has begun goes on without them.
        check_exists(init_from)
    if pathlib.Path(workdir, "metrics.json").exists():  # A finished run needs no images.
        return
    kind, _, path = dataset.partition(":")
    if kind in ("folder", "list") and not os.path.exists(os.path.expanduser(path)):
        raise UserError(
            f"{kind} {path!r} does not exist: name the images with --config.dataset.name"
        )


def _hide_abandoned_writes(previous: Callable[[Any], Any], unraisable: Any) -> None:
    # When one write of a checkpoint fails, those that orbax abandons complain one by one.
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)


if __name__ == "__main__":
    command.run(main)
