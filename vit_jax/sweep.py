"""Sweeps the learning rate as the paper does (Table 4), then trains the final runs.

`vit-jax sweep --config b16:finetune,cifar10 --config.init_from=B_16`

Every rate of the data set's row trains without a held-out part of train and is evaluated on it.
The rate that does best, the lowest of equals, then trains on all of train with several seeds and
is evaluated on test. A recipe that names a part of train (`transfer`) keeps it for these final
runs; what is held out is always of the whole of train. The same command continues a sweep that was
stopped. The table goes to stdout, every number to sweep.json.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_jax import command, runner
from vit_jax.errors import UserError
from vit_jax.files import write_json

if TYPE_CHECKING:
    from ml_collections import ConfigDict

NUM_SEEDS = 3
# What a rate is judged by: the first of these that there is.
_SCORES = ("AP", "mIoU", "mAP", "accuracy")

_EPILOG = """examples:
  %(prog)s --config b16:finetune,cifar10 --config.init_from=B_16
  %(prog)s --config b16:finetune,folder:/data/flowers --config.init_from=B_16 --seeds 1 \\
      --learning_rates 0.003,0.01

The same command continues a sweep that was stopped."""


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    description = (__doc__ or "").split("\n\n")
    parser = command.Parser(
        prog=prog, description=f"{description[0]}\n\n{description[2]}", epilog=_EPILOG
    )
    command.add_config_flags(parser)
    add_seeds(parser, NUM_SEEDS)
    parser.add_argument(
        "--learning_rates", metavar="LR,...", help="to try [those of Table 4's row]"
    )
    return parser


def add_seeds(parser: command.Parser, default: int) -> None:
    """Adds the flag that says how many seeds an experiment has."""
    parser.add_argument(
        "--seeds",
        type=command.positive,
        default=default,
        metavar="N",
        help=f"how many, from config.seed on [{default}]",
    )


def main(argv: Sequence[str] | None = None, prog: str = "python -m vit_jax.sweep") -> int:
    """Runs the command; returns its exit code.

    Args:
        argv: without the program's name.
        prog: how the command was typed.
    """
    parser = build_parser(prog)
    args, values = command.parse_config_flags(parser, argv)
    from vit_jax import config_files

    loaded = config_files.load(args.config, values, parser)
    given = None if args.learning_rates is None else args.learning_rates.split(",")
    rates = learning_rates(given, loaded.config.dataset.name)
    workdir = pathlib.Path(args.workdir or f"{config_files.default_workdir(loaded.name)}-sweep")
    result = sweep(loaded.config, rates, args.seeds, workdir)
    write_json(workdir / "sweep.json", result)
    print(f"\n{table(result)}\n\n{summary(result)}")
    return int(result["failed"] > 0)


def learning_rates(given: Sequence[str] | None, dataset: str) -> list[float]:
    """The rates to try, ascending: those given, or else those of the data set in Table 4.

    Raises:
        UserError: one of them is not a positive number, or is there twice.
    """
    from vit_jax import recipes

    try:
        rates = sorted(map(float, given or recipes.finetuning_row(dataset).base_lrs))
    except ValueError:
        rates = []
    names = {f"{rate:g}" for rate in rates}  # As the runs are named.
    if not rates or not all(0 < rate < math.inf for rate in rates) or len(names) < len(rates):
        raise UserError(
            f"--learning_rates {','.join(given or ())} are not positive numbers, each once "
            "in its first six digits: for example 0.003,0.01"
        )
    return rates


def sweep(
    config: "ConfigDict", rates: Sequence[float], num_seeds: int, workdir: pathlib.Path
) -> dict[str, Any]:
    """Chooses the learning rate on held-out images, and trains with it on all of train.

    Args:
        config: of the final run, which has its splits; its learning rate is replaced, and its seed
            is the first. The splits of the held-out runs are those of `dataset.development`.
        rates: ascending; of a single one there is nothing to choose.
        num_seeds: of the final run: `config.seed` and those after it.
        workdir: of all runs.

    Returns:
        "held_out" and "final": accuracies by rate and by seed, None where the run failed;
        "learning_rate", the chosen one; "mean" and "sd" (sample, n - 1) of the final runs, None
        where there are none; "examples", that they were evaluated on; "failed", how many failed.

    Raises:
        UserError: as `runner.run_all` does.
    """
    held_out: dict[float, float | None] = {}
    if len(rates) > 1:
        names = {rate: f"held-out-lr{rate:g}" for rate in rates}
        runs = [
            runner.Run(name, variant(config, rate, config.seed, development=True))
            for rate, name in names.items()
        ]
        metrics = runner.run_all(runs, workdir)
        held_out = {rate: _accuracy(metrics[name]) for rate, name in names.items()}
        rates = [rate for rate in rates if held_out[rate] is not None]
    result: dict[str, Any] = {
        "dataset": config.dataset.name,
        "held_out": held_out,
        "learning_rate": None,
        "final": {},
        "mean": None,
        "sd": None,
        "examples": None,
    }
    if rates:
        best = max(rates, key=lambda rate: held_out.get(rate) or 0.0)
        result |= {"learning_rate": best} | _final(config, best, num_seeds, workdir)
    result["failed"] = [*held_out.values(), *result["final"].values()].count(None)
    return result


def _final(
    config: "ConfigDict", rate: float, num_seeds: int, workdir: pathlib.Path
) -> dict[str, Any]:
    names = {
        seed: f"final-lr{rate:g}-seed{seed}" for seed in range(config.seed, config.seed + num_seeds)
    }
    runs = [
        runner.Run(name, variant(config, rate, seed, development=False))
        for seed, name in names.items()
    ]
    metrics = runner.run_all(runs, workdir)
    final = {seed: _accuracy(metrics[name]) for seed, name in names.items()}
    finished = [accuracy for accuracy in final.values() if accuracy is not None]
    if not finished:
        return {"final": final}
    mean, sd = runner.mean_and_sd(finished)
    examples = next(found["examples"] for found in metrics.values() if found)
    return {"final": final, "mean": mean, "sd": sd, "examples": examples}


def variant(config: "ConfigDict", rate: float, seed: int, *, development: bool) -> "ConfigDict":
    """The config of a run of a sweep, held out or final.

    Args:
        config: of the final run.
        rate: its base learning rate.
        seed: of the run.
        development: whether it is evaluated on a held-out part of train.
    """
    config = config.copy_and_resolve_references()
    config.schedule.base_lr = rate
    config.seed = seed
    config.dataset.development = development
    if development:  # Which chooses both, as "dev" does in a spec.
        config.dataset.train_split = config.dataset.eval_split = ""
    return config


def _accuracy(metrics: dict[str, Any] | None) -> float | None:
    """The accuracy, or of several labels the mAP, of masks the mIoU, of boxes the AP."""
    return None if metrics is None else next((metrics[x] for x in _SCORES if x in metrics), None)


def table(result: dict[str, Any]) -> str:
    """The sweep in Markdown, in percent: a row for each rate, the chosen one with its seeds."""
    chosen, final = result["learning_rate"], result["final"]
    rows = []
    for rate in result["held_out"] or [chosen]:
        cells = [_cell(result["held_out"].get(rate, ""))]
        if rate == chosen:
            cells = [f"**{cells[0]}**" if cells[0] else "", *map(_cell, final.values())]
            cells += [runner.percent(result["mean"], result["sd"])]
        rows.append([f"{rate:g}", *cells, *[""] * (2 + len(final) - len(cells))])
    seeds = [f"seed {seed}" for seed in final]
    return runner.markdown(["learning rate", "held out", *seeds, "mean ± sd"], rows)


def _cell(accuracy: float | str | None) -> str:
    if accuracy is None:
        return "failed"
    return accuracy if isinstance(accuracy, str) else runner.percent(accuracy)


def summary(result: dict[str, Any]) -> str:
    """Describes the numbers of the table in a line or two."""
    if result["learning_rate"] is None:
        return "No learning rate was left to choose: every held-out run failed."
    final = result["final"].values()
    finished = sum(accuracy is not None for accuracy in final)
    text = (
        f"{result['dataset']} at learning rate {result['learning_rate']:g}: accuracy in percent on "
        f"{result['examples']} images, mean and sample standard deviation (n - 1) of {finished} "
        f"of {len(final)} seeds."
    )
    return text if finished else "Every final run failed."


if __name__ == "__main__":
    command.run(main)
