"""The command of an experiment: `python -m experiments.table5 --scale smoke`."""

import argparse
import functools
import pathlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from experiments.runner.experiment import Experiment, Measurement
from vit_jax import command
from vit_jax.errors import UserError, brief_name, first_line
from vit_jax.files import atomic_write, make_folder
from vit_jax.printable import printable

if TYPE_CHECKING:
    from experiments.runner.execution import Outcome
    from experiments.runner.graph import Job
    from experiments.runner.outcomes import Outcomes
    from experiments.runner.results import Reader, Results
    from experiments.runner.setting import Setting

SCALES = ("paper", "mini", "smoke")
OUTPUT = pathlib.Path("runs/experiments")
# What a user can name another data set for, and how the paper calls it.
_DATASETS = {"jft": "JFT-300M", "imagenet21k": "ImageNet-21k", "imagenet2012": "ImageNet"}
_PICTURE_DPI = 150

_EPILOG = """examples:
  {prog} --scale smoke
  {prog} --scale paper --jft folder:/data/mine --dry_run
  {prog} --scale paper --jft folder:/data/mine --slurm job.sh --shards 16

The same command runs nothing twice: what is finished is read, what was stopped goes on, and what
failed is tried again. Several experiments may share an output folder, at the same time too: a run
that two of them need is one."""


def run(experiment: Experiment) -> NoReturn:
    """Runs the command of an experiment and exits: 0, or 1 if a number is missing."""
    run_all([experiment], f"python -m experiments.{experiment.name}", experiment.title)


def run_all(experiments: Sequence[Experiment], prog: str, title: str) -> NoReturn:
    """Runs the command of several experiments, as `run` does of one."""
    command.run(functools.partial(main, experiments, prog, title))


def build_parser(prog: str, title: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(
        prog=prog, description=printable(title), epilog=_EPILOG.format(prog=prog)
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        required=True,
        help="the sizes of models and data, and the lengths of runs: paper as there, mini for one "
        "GPU or a night of a CPU, smoke for minutes of two cores",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=OUTPUT, metavar="DIR", help=f"all of it [{OUTPUT}]"
    )
    parser.add_argument(
        "--seeds",
        type=command.positive,
        metavar="N",
        help="of what is repeated: fine-tunings, and pre-trainings of Figures 4, 8, 9, 13 and "
        "Table 8 [the scale's]",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print what it would cost, and do nothing else"
    )
    parser.add_argument(
        "--render", action="store_true", help="make tables and pages of what has run, run nothing"
    )
    parser.add_argument(
        "--only",
        type=_labels,
        action="append",
        default=[],
        metavar="LABEL=VALUE,...",
        help="a part of the numbers, by labels of the table: model=ViT-B/32,R50x1",
    )
    _add_execution_flags(parser.add_argument_group("how it runs"))
    _add_data_flags(parser.add_argument_group("data sets, in place of the scale's"))
    _add_cost_flags(parser.add_argument_group("of --dry_run"))
    return parser


def _add_execution_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--jobs",
        type=command.positive,
        metavar="N",
        help="runs at once [1 on an accelerator, else one for each core, at most 8]",
    )
    group.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="part I, from 0, of N: on each machine another, into one --output",
    )
    group.add_argument(
        "--slurm",
        type=pathlib.Path,
        metavar="FILE",
        help="write an array script that runs all parts, and do nothing else",
    )
    group.add_argument(
        "--shards",
        type=command.positive,
        metavar="N",
        help="the parts of --slurm [one for each pre-training, at most 64]",
    )
    group.add_argument(
        "--gpus", type=command.positive, metavar="N", help="of each part of --slurm [1]"
    )
    group.add_argument(
        "--accumulate_steps",
        type=command.positive,
        metavar="N",
        help="go through each batch in N parts, for less memory [1]",
    )
    group.add_argument(
        "--sharding", metavar="TEXT", help="where parameters lie, as config.sharding [replicated]"
    )
    group.add_argument(
        "--remat",
        metavar="POLICY",
        help="what is computed again for less memory, as config.model.remat [the recipe's]",
    )


def _add_data_flags(group: "argparse._ArgumentGroup") -> None:
    for name, title in _DATASETS.items():
        group.add_argument(f"--{name}", metavar="NAME", help=f"for {title}: folder:DIR, a name")
    for name in _DATASETS:
        for what in ("images", "classes"):
            group.add_argument(
                f"--{name}_{what}",
                type=command.positive,
                metavar="N",
                help=f"how many {what} that one has to train on",
            )
    group.add_argument("--objectnet", metavar="DIR", help="the folder of ObjectNet")
    group.add_argument("--data_dir", default="", metavar="DIR", help="where TFDS looks")


def _add_cost_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--device", metavar="NAME", help="the accelerator [H100]")
    group.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="of its peak that training reaches [0.4, an assumption]",
    )


def _shard(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)) or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, as 0/4")
    return int(match[1]), int(match[2])


def _labels(text: str) -> tuple[str, tuple[str, ...]]:
    label, _, values = text.partition("=")
    if not label or not all(found := tuple(values.split(","))):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=VALUE,..., as model=ViT-B/32")
    return label, found


def main(
    experiments: Sequence[Experiment], prog: str, title: str, argv: Sequence[str] | None = None
) -> int:
    """Runs the command of experiments; returns its exit code."""
    begin = time.monotonic()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(prog, title).parse_args(argv)
    _check_flags(args)
    # With JAX they take seconds to import: --help should not.
    from experiments.runner.outcomes import Outcomes

    setting = _setting(args)
    measurements = _measure(experiments, setting)
    if setting.only:
        measurements = _choose(measurements, setting.only)
        experiments = [x for x in experiments if x.name in measurements]
    folder = args.output / setting.scale.name
    if args.dry_run:
        from experiments.runner import checks, cost

        checks.check_configs(_jobs(measurements).values())
        given = {key: x for key in ("device", "mfu") if (x := getattr(args, key)) is not None}
        print(cost.report(measurements, setting, **given))
        return 0
    if not args.render:
        setting.check(_jobs(measurements).values())
    if args.slurm:
        _write_slurm(args, prog, argv, folder, measurements)
        return 0
    outcomes = Outcomes(folder / "runs")
    if not args.render:
        outcome = _execute(args, setting, outcomes, measurements, prog.rpartition(".")[2])
        if outcome.elsewhere:
            print(_parting(outcome))
            return 1 if outcome.failed else 0
    complete = _render(experiments, setting, measurements, outcomes, folder)
    print(f"done in {_format(time.monotonic() - begin)}")
    return 0 if complete else 1


def _check_flags(args: argparse.Namespace) -> None:
    if not args.slurm and args.shards:
        raise UserError("--shards is of --slurm: give --slurm FILE, or --shard I/N for one part")
    if not args.slurm and args.gpus:
        raise UserError(
            "--gpus is of --slurm: give --slurm FILE, or choose by CUDA_VISIBLE_DEVICES"
        )
    given = [name for name in ("dry_run", "render", "slurm") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(
            f"--{given[0]} and --{given[1]} each do nothing else: give one of them at a time"
        )


def _measure(
    experiments: Sequence[Experiment], setting: "Setting"
) -> dict[str, Sequence[Measurement]]:
    from experiments.runner.checks import check_labels

    measurements = {}
    for experiment in experiments:
        measurements[experiment.name] = list(experiment.measure(setting))
        check_labels(experiment, measurements[experiment.name])
    return measurements


def _choose(
    measurements: Mapping[str, Sequence[Measurement]], only: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[Measurement]]:
    """The measurements that have one of the values of each label, of experiments that have such.

    Raises:
        UserError: no measurement has a label or a value.
    """
    every = [x.labels for found in measurements.values() for x in found]
    for label, values in only.items():
        known = list(dict.fromkeys(x[label] for x in every if label in x))
        if unknown := [value for value in values if value not in known]:
            labels = ", ".join(dict.fromkeys(name for x in every for name in x))
            hint = f"use {', '.join(known)}" if known else f"labels are {labels}"
            raise UserError(f"--only {label}={brief_name(unknown[0])} is of no number: {hint}")
    chosen = {
        name: [x for x in found if all(x.labels.get(key) in only[key] for key in only)]
        for name, found in measurements.items()
    }
    if not any(chosen.values()):
        raise UserError(f"--only {' and '.join(only)}: no number has all of them, leave one out")
    return {name: found for name, found in chosen.items() if found}


def _jobs(measurements: Mapping[str, Sequence[Measurement]]) -> "dict[str, Job]":
    from experiments.runner import graph

    return graph.collect(x for found in measurements.values() for x in found)


def _format(seconds: float) -> str:
    from vit_jax.reporting import format_seconds

    return format_seconds(seconds)


def _setting(args: argparse.Namespace) -> "Setting":
    from experiments.runner.scales import SCALES as BY_NAME
    from experiments.runner.setting import Setting

    scale, values = BY_NAME[args.scale], vars(args)

    def given(suffix: str) -> dict[str, int]:
        return {name: x for name in _DATASETS if (x := values[f"{name}{suffix}"])}

    names = (*_DATASETS, "objectnet")
    return Setting(
        scale=scale,
        seeds=args.seeds or scale.seeds,
        datasets={name: values[name] for name in names if values[name]},
        data_dir=args.data_dir,
        images=given("_images"),
        classes=given("_classes"),
        hardware=_hardware(args),
        only=dict(args.only),
    )


def _hardware(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of every config that say how a step is computed, as far as they are given."""
    from vit_jax.models.rematerialization import POLICIES
    from vit_jax.sharding import parse_sharding

    if args.sharding:
        parse_sharding(args.sharding)
    if args.remat and args.remat not in POLICIES:
        raise UserError(f"--remat {brief_name(args.remat)} is not one of {', '.join(POLICIES)}")
    keys = {
        "accumulate_steps": args.accumulate_steps,
        "sharding": args.sharding,
        "model.remat": args.remat,
    }
    return {key: value for key, value in keys.items() if value}


def _write_slurm(
    args: argparse.Namespace,
    prog: str,
    argv: Sequence[str],
    folder: pathlib.Path,
    measurements: Mapping[str, Sequence[Measurement]],
) -> None:
    from experiments.runner import checks, graph, slurm

    jobs = _jobs(measurements)
    checks.check_configs(jobs.values())
    shards = args.shards or min(len(graph.chains(jobs)), 64)
    kept = _without(argv, ("--slurm", "--shards", "--shard", "--gpus"))
    module = prog.split()[-1]
    make_folder(folder)
    slurm.write(
        args.slurm,
        f"{module.rpartition('.')[2]}-{args.scale}",
        [sys.executable, "-m", module, *kept],
        shards,
        folder,
        args.gpus or 1,
    )
    print(printable(f"{args.slurm}: {len(jobs)} runs in {shards} parts; sbatch {args.slurm}"))


def _without(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Arguments without some flags, of which each has a value."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] not in flags:
            kept.append(word)
        skip = not skip and word in flags
    return kept


def _execute(
    args: argparse.Namespace,
    setting: "Setting",
    outcomes: "Outcomes",
    measurements: Mapping[str, Sequence[Measurement]],
    title: str,
) -> "Outcome":
    """Runs what is due."""
    from experiments.runner.execution import execute
    from experiments.runner.placement import default_workers

    return execute(
        [x for found in measurements.values() for x in found],
        outcomes,
        workers=args.jobs or default_workers(),
        runs_per_process=setting.scale.runs_per_process,
        shard=args.shard,
        title=title,
    )


def _parting(outcome: "Outcome") -> str:
    failed = f"{len(outcome.failed)} failed; " if outcome.failed else ""
    return (
        f"this part is done; {failed}{len(outcome.elsewhere)} are left to others, the last of "
        "which makes the pages"
    )


def _render(
    experiments: Sequence[Experiment],
    setting: "Setting",
    measurements: Mapping[str, Sequence[Measurement]],
    outcomes: "Outcomes",
    folder: pathlib.Path,
) -> bool:
    """Makes tables, pictures and pages; returns whether no number is missing in them."""
    from experiments.runner import pages, tables
    from experiments.runner.results import Reader

    reader, found, complete = Reader(outcomes), [], True
    for experiment in experiments:
        results = reader.results(experiment, setting, measurements[experiment.name])
        complete &= _render_one(results, reader, folder) and not results.problems
        found.append(results)
        if len(experiments) == 1:
            print(f"\n{tables.markdown(results)}\n")
        page = pages.write(results, folder)
        missing = f", runs missing: {len(results.problems)}" if results.problems else ""
        print(printable(f"{experiment.name}: {page}{missing}"), flush=True)
    print(printable(f"all of them: {pages.write_index(found, folder)}"))
    return complete


def _render_one(results: "Results", reader: "Reader", folder: pathlib.Path) -> bool:
    """Writes the files of an experiment; returns whether its picture could be drawn."""
    from experiments.runner import tables

    own = folder / results.experiment.name
    make_folder(own)
    reader.write(results, own / "results.jsonl")
    for name, text in (
        ("table.md", tables.markdown(results) + "\n"),
        ("table.csv", tables.csv(results)),
    ):
        with atomic_write(own / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return _draw(results, own / "picture.png")


def _draw(results: "Results", path: pathlib.Path) -> bool:
    from experiments.runner import pictures

    path.unlink(missing_ok=True)  # One of other results would lie.
    try:
        figure = pictures.picture_of(results)
        if figure is None:
            return True
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=_PICTURE_DPI, format="png", bbox_inches="tight")
    except UserError:  # The disk refuses.
        raise
    except Exception as error:  # A picture with points that are missing is no reason for no page.
        kind = type(error).__name__
        print(printable(f"{results.experiment.name}: no picture: {kind}: {first_line(error)}"))
        return False
    return True
