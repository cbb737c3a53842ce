"""Tells what a run needs: `python -m vit_jax.plan`, or `vit-jax plan`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from vit_jax import command

_DESCRIPTION = """Compiles a run's train step for accelerators that need not be here, and tells what
it takes: memory, collectives, time and money."""

_EPILOG = """examples:
  %(prog)s --config b16 --on h100:8
  %(prog)s --config h14 --on h100:8 --config.sharding=fsdp --config.batch_size=512 \\
      --config.model.scan_layers=True --price 2.5
  %(prog)s --config l16:pretrain,imagenet21k --on v5e:4x4 --json plan.json
  %(prog)s --config b16 --on a100:4 --estimate

Accelerators: a100, h100, h200, v4, v5e, v5p, v6e; cpu:8 is 8 simulated devices. GPUs need the
wheels of jax[cuda12], TPUs those of jax[tpu], and no device. Without them, or with --estimate,
it tells what needs no compiler. A compilation takes a minute or so, with scan_layers less."""


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command; `--config.KEY=VALUE` is left to `config_files`."""
    parser = command.Parser(prog=prog, description=_DESCRIPTION, epilog=_EPILOG)
    command.add_config_flag(parser)
    parser.add_argument(
        "--on", metavar="KIND[:N]", required=True, help="which devices: h100:8, v5e:4x4"
    )
    parser.add_argument(
        "--price", type=float, metavar="P", help="of a device for an hour, in any currency"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the peak that a run is assumed to reach [%(default)s]",
    )
    parser.add_argument("--classes", type=command.positive, metavar="N", help="of the data set")
    parser.add_argument("--images", type=command.positive, metavar="N", help="to train on")
    parser.add_argument("--estimate", action="store_true", help="compile nothing")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there as well")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 1 where the compiler is missing."""
    parser = build_parser("python -m vit_jax.plan")
    args, values = command.parse_config_flags(parser, argv)
    from vit_jax.plan.accelerators import parse_target

    target = parse_target(args.on)
    # With JAX they take a second to import: --help should not.
    from vit_jax import config_files
    from vit_jax.config import check_config
    from vit_jax.files import write_json
    from vit_jax.plan import compiler, estimate, planning, report

    loaded = config_files.load(args.config, values, parser)
    check_config(loaded.config, may_lack=True)
    config = planning.with_defaults(loaded.config)
    classes, images = estimate.dataset_size(config, args.classes or 0, args.images or 0)
    missing = None if args.estimate else compiler.missing_wheels(target)
    run = None if args.estimate or missing else compiler.run
    found = planning.plan(config, classes, images, target, run, mfu=args.mfu, price=args.price)
    print(report.render({"config": loaded.name, **found}))
    if args.json:
        write_json(Path(args.json), {"config": loaded.name, **found})
    if missing:
        print(f"error: {missing}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    command.run(main)
