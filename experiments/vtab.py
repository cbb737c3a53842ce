"""VTAB-1k: all 19 tasks under the paper's one setting, beside the paper's Table 9.

python -m experiments.vtab --config b16:finetune,vtab --config.init_from=B_16

Learning rate 0.01, 2,500 steps, 384 px; 1,000 images to train on, the full test set to evaluate
on. A task whose data set is not prepared is named and left out. The same command continues. The
table goes to stdout, every number to vtab.json.
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import paper
from vit_jax import command
from vit_jax.data.vtab import GROUPS, PREFIX, TASKS, get_task
from vit_jax.errors import UserError
from vit_jax.files import write_json
from vit_jax.runner import Run, markdown, mean_and_sd, percent, run_all
from vit_jax.sweep import add_seeds

if TYPE_CHECKING:
    from ml_collections import ConfigDict

COLUMNS = {
    "H/14 JFT": ("ViT-H/14", "jft"),
    "L/16 JFT": ("ViT-L/16", "jft"),
    "L/16 I21k": ("ViT-L/16", "imagenet21k"),
}


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(prog=prog, description=__doc__)
    command.add_config_flags(parser)
    add_seeds(parser, 1)
    parser.add_argument(
        "--tasks", default=",".join(TASKS), metavar="TASK,...", help="such as svhn,dtd [all 19]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = build_parser("python -m experiments.vtab")
    args, values = command.parse_config_flags(parser, argv)
    from vit_jax import config_files

    loaded = config_files.load(args.config, values, parser)
    config = loaded.config
    if config.dataset.name != "vtab":
        raise UserError(
            f"--config {loaded.name} is of data set {config.dataset.name!r}: give the setting of "
            "all tasks, for example configs/b16.py:finetune,vtab"
        )
    tasks = [task.strip() for task in args.tasks.split(",")]
    if not all(tasks) or len({*tasks}) < len(tasks):
        raise UserError(f"--tasks {args.tasks} is not a list of tasks, each once: svhn,dtd")
    seeds = range(config.seed, config.seed + args.seeds)
    runs = {(task, seed): _run(config, task, seed) for task in tasks for seed in seeds}
    workdir = pathlib.Path(args.workdir or config_files.default_workdir(loaded.name))
    metrics = run_all(list(runs.values()), workdir)
    found = {key: metrics[run.name] for key, run in runs.items()}
    accuracies = {task: [_accuracy(found[task, seed]) for seed in seeds] for task in tasks}
    write_json(workdir / "vtab.json", {"seeds": list(seeds), "accuracies": accuracies})
    print(f"\n{table(accuracies)}\n\n{summary(accuracies)}")
    return int(None in found.values())


def _accuracy(metrics: Mapping[str, Any] | None) -> float | None:
    return None if metrics is None else metrics["accuracy"]


def _run(config: "ConfigDict", task: str, seed: int) -> Run:
    facts = get_task(f"{PREFIX}{task}")
    config = config.copy_and_resolve_references()
    config.seed = seed
    config.dataset.name = f"{PREFIX}{task}"
    config.dataset.random_crop &= facts.random_crop
    config.dataset.random_flip &= facts.random_flip
    return Run(f"{task}-seed{seed}", config)


def table(accuracies: Mapping[str, Sequence[float | None]]) -> str:
    """Per-task accuracies in Markdown beside Table 9, then means of groups and of all.

    Args:
        accuracies: of each task by seed, None where the run failed. A mean is of the tasks that
            have one, and that of the paper of the same tasks.
    """
    means = {task: _mean(accuracies[task]) for task in TASKS if task in accuracies}
    rows = [
        [task, TASKS[task].group, _cell(accuracies[task]), *map(str, _paper(task))]
        for task in means
    ]
    finished = [task for task, mean in means.items() if mean is not None]
    for group in (*GROUPS, "all"):
        members = [task for task in finished if group in (TASKS[task].group, "all")]
        if members:
            seeds = zip(*(accuracies[task] for task in members), strict=True)
            own = [_mean(seed) for seed in seeds if None not in seed]
            columns = zip(*map(_paper, members), strict=True)
            means_of_paper = [f"{_mean(column):.1f}" for column in columns]
            cell = _cell(own or [_mean([means[task] for task in members])])
            rows.append([f"mean of {len(members)}", group, cell, *means_of_paper])
    return markdown(["task", "group", "accuracy", *COLUMNS], rows)


def _paper(task: str) -> list[float]:
    return [paper.TABLE_9[task, *column] for column in COLUMNS.values()]


def _cell(accuracies: Sequence[float | None]) -> str:
    finished = [accuracy for accuracy in accuracies if accuracy is not None]
    return percent(*mean_and_sd(finished)) if finished else "failed"


def _mean(values: Sequence[float | None]) -> float | None:
    finished = [value for value in values if value is not None]
    return statistics.fmean(finished) if finished else None


def summary(accuracies: Mapping[str, Sequence[float | None]]) -> str:
    """What the numbers of the table are, and what they lack."""
    lines = ["Accuracy in percent; H/14 JFT, L/16 JFT and L/16 I21k are the paper's (Table 9)."]
    finished = [task for task, values in accuracies.items() if _mean(values) is not None]
    if len(finished) < len(TASKS):
        lines.append(
            f"Only {len(finished)} of the {len(TASKS)} tasks have run: the means are over those, "
            "also the paper's."
        )
    num_seeds = len(next(iter(accuracies.values())))
    if num_seeds > 1:
        lines.append(
            f"Mean and sample standard deviation (n - 1) of {num_seeds} seeds, less those that "
            "failed."
        )
    return " ".join(lines)


if __name__ == "__main__":
    command.run(main)
