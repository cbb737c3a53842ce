"""What experiments cost before anything runs: steps, images, exaFLOPs, hours of an accelerator."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from experiments.runner import graph
from experiments.runner.experiment import Measurement, Run
from experiments.runner.setting import Setting, Trained
from vit_jax.analysis.flops import PEAK_FLOPS
from vit_jax.errors import UserError, brief, nearest
from vit_jax.runner import markdown

DEVICE = "H100"
# Of a device's peak: an assumption, not measured.
MFU = 0.4

_RECIPES = {
    "pretrain": "pre-training",
    "masked": "masked patches",
    "held out": "fine-tuning, held out",
    "finetune": "fine-tuning",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What runs cost together.

    Attributes:
        runs: how many.
        steps: of them all.
        images: that they go through.
        flops: of training, forward and backward.
    """

    runs: int = 0
    steps: int = 0
    images: int = 0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, others, strict=True)))


def cost_of(run: Run, setting: Setting) -> Cost:
    """The cost of a run alone, without those that it needs."""
    assert isinstance(run, Trained)
    return Cost(1, *setting.count(run))


def report(
    named_measurements: Mapping[str, Sequence[Measurement]],
    setting: Setting,
    device: str = DEVICE,
    mfu: float = MFU,
) -> str:
    """The costs of experiments as Markdown; nothing is opened whose size is known.

    Args:
        named_measurements: by the experiment's name.
        setting: that they were made with.
        device: a name of `PEAK_FLOPS`.
        mfu: the share of its peak that training reaches.

    Raises:
        UserError: the device is unknown, the share is none, or nobody knows how large a data set
            is.
    """
    if device not in PEAK_FLOPS:
        near = nearest(device, PEAK_FLOPS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(PEAK_FLOPS)}"
        raise UserError(f"--device {brief(device)} has no known peak: {hint}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is no share of the peak: it must be above 0 and at most 1")
    speed = mfu * PEAK_FLOPS[device]
    by_experiment = {name: _runs(found) for name, found in named_measurements.items()}
    runs = {name: run for found in by_experiment.values() for name, run in found.items()}
    costs = {name: cost_of(run, setting) for name, run in runs.items()}
    hours = f"{device}-hours"
    head = ["runs", "steps", "images", "exaFLOPs", hours]
    parts = [markdown(["experiment", *head], _experiments(by_experiment, costs, speed))]
    rows = _groups(runs, costs, speed)
    parts.append(markdown(["recipe", "data set", "model", *head], rows))
    return "\n\n".join([setting.scale.summary, *parts, _explain(by_experiment, device, mfu)])


def _runs(measurements: Iterable[Measurement]) -> dict[str, Run]:
    jobs = graph.collect(measurements)
    return {name: job for name, job in jobs.items() if isinstance(job, Run)}


def _experiments(
    by_experiment: Mapping[str, Mapping[str, Run]], costs: Mapping[str, Cost], speed: float
) -> list[list[str]]:
    """A row for each experiment, with all that it needs, and rows of what all need together."""
    rows = [
        [name, *_cells(_total(costs[run] for run in found), speed)]
        for name, found in by_experiment.items()
    ]
    if len(by_experiment) > 1:
        rows.append(["all, each run once", *_cells(_total(costs.values()), speed)])
    held_out = {
        rate.name
        for found in by_experiment.values()
        for run in found.values()
        for rate in run.rates
    }
    return [*rows, ["of these held out", *_cells(_total(costs[run] for run in held_out), speed)]]


def _groups(runs: Mapping[str, Run], costs: Mapping[str, Cost], speed: float) -> list[list[str]]:
    """A row for the runs of a recipe, data set and model, in the order of `_RECIPES`."""
    held_out = {rate.name for run in runs.values() for rate in run.rates}
    groups: dict[tuple[str, str, str], Cost] = collections.defaultdict(Cost)
    for name, run in runs.items():
        assert isinstance(run, Trained)
        recipe = "held out" if name in held_out else name.partition("-")[0]
        groups[recipe, run.dataset, run.model] += costs[name]
    order = list(_RECIPES)
    return [
        [_RECIPES[recipe], dataset, model, *_cells(groups[recipe, dataset, model], speed)]
        for recipe, dataset, model in sorted(groups, key=lambda key: order.index(key[0]))
    ]


def _total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _cells(cost: Cost, speed: float) -> list[str]:
    return [
        f"{cost.runs:,}",
        f"{cost.steps:,}",
        f"{cost.images:.3g}",
        f"{cost.flops / 1e18:.4g}",
        _hours(cost.flops / speed / 3600),
    ]


def _hours(hours: float) -> str:
    return f"{hours:.4g}" if hours >= 0.01 or not hours else "< 0.01"


def _explain(by_experiment: Mapping[str, Mapping[str, Run]], device: str, mfu: float) -> str:
    shared = sum(len(found) for found in by_experiment.values())
    shared -= len({name for found in by_experiment.values() for name in found})
    lines = [
        "ExaFLOPs are 6 a multiply-add and image, products alone; evaluations are not counted, nor "
        "analyses, and a run that may stop early is counted whole. Fine-tuning is with its "
        f"held-out runs. Hours are of one {device} at {mfu:.0%} of its {PEAK_FLOPS[device]:.4g} "
        "FLOP/s, a share that is assumed."
    ]
    if shared:
        lines.append(
            f"An experiment's row has every run that it needs; {shared:,} times another "
            "experiment needs the same run, which runs once."
        )
    return " ".join(lines)
