"""Draws the training curves of runs from their metrics.jsonl.

python -m experiments.training_curves runs/digits [runs/other ...] [--output curves.png]
"""

import json
import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from vit_jax import command
from vit_jax.errors import UserError
from vit_jax.printable import printable

TRAIN, EVALUATION = "#9aa5b1", "#0b6bcb"


def read_curve(path: pathlib.Path, key: str) -> tuple[list[int], list[float]]:
    """The steps and values of one metric in a metrics.jsonl."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [value for _, value in points]


def draw(runs: list[pathlib.Path], output: pathlib.Path) -> None:
    """Draws loss and accuracy of every run, one row a run."""
    figure, rows = plt.subplots(
        len(runs), 2, figsize=(9, 3.2 * len(runs)), squeeze=False, layout="constrained"
    )
    for run, (loss, accuracy) in zip(runs, rows, strict=True):
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            axes.plot(*read_curve(run / "metrics.jsonl", name), color=TRAIN, label="training")
            evaluation = read_curve(run / "metrics.jsonl", f"eval_{name}")
            axes.plot(*evaluation, color=EVALUATION, marker="o", ms=3, label="evaluation")
            axes.set(xlabel="step", ylabel=name)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        # Pixels that are predicted have no accuracy.
        final = f": {evaluation[1][-1]:.2%}" if evaluation[1] else ""
        title = printable(f"{run.name}{final}")
        style = {"fontsize": 10, "color": EVALUATION, "parse_math": False}
        accuracy.set_title(title, loc="right", **style)
        loss.legend(frameon=False)
    figure.savefig(output, dpi=110)


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=pathlib.Path, metavar="RUN", help="workdirs of runs"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="PNG",
        help="the picture [RUN/curves.png]",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser("python -m experiments.training_curves").parse_args(argv)
    if missing := [run for run in args.runs if not (run / "metrics.jsonl").is_file()]:
        raise UserError(f"{missing[0]} has no metrics.jsonl: give the workdir of a run")
    output = args.output or args.runs[0] / "curves.png"
    draw(args.runs, output)
    print(printable(f"training curves: {output}"))
    return 0


if __name__ == "__main__":
    command.run(main)
