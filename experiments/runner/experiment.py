"""The parts of an experiment: what is run, what is read from it, and what the paper has there.

A file of `experiments/` lists its measurements, each of runs that `runner.setting` makes, and says
how they are laid out. Everything else is the same for all of them:

    def measure(setting: Setting) -> list[Measurement]:
        return [
            Measurement(
                {"task": task, "model": model},
                setting.finetune(setting.pretrain(model, "jft"), task),
                paper=accuracy,
            )
            for (task, model), accuracy in paper.SOME_TABLE.items()
        ]

    EXPERIMENT = Experiment("table0", "Table 0: ...", measure, rows=("task",), column="model")

    if __name__ == "__main__":
        command.run(EXPERIMENT)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from ml_collections import ConfigDict

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run. Those of one name are one run, whichever experiments ask for it.

    Attributes:
        name: of its folder, such as "pretrain-jft-ViT-B-16-7-epochs-seed0".
        config: complete, but for what the two below decide.
        init_from: the run whose best weights it starts from.
        rates: runs with different learning rates, the same otherwise: that of the most accurate,
            the lowest of equals, becomes `config.schedule.base_lr`.
    """

    name: str
    config: "ConfigDict" = dataclasses.field(compare=False)
    init_from: "Run | None" = dataclasses.field(default=None, compare=False)
    rates: "tuple[Run, ...]" = dataclasses.field(default=(), compare=False)

    @property
    def needs(self) -> "tuple[Run, ...]":
        """The runs that must be finished before this one starts."""
        return (*filter(None, [self.init_from]), *self.rates)


@dataclasses.dataclass(frozen=True)
class Task:
    """A computation on what runs have left, or on none: an analysis, a measurement of speed.

    Attributes:
        name: of its folder.
        function: "module:name". Called with `workdir`, its folder, `runs`, the folders of `of`, and
            `arguments` as keywords, it returns scalars by name; arrays it writes to `workdir`.
        arguments: what JSON can hold.
        of: finished before it starts.
        alone: whether no other run of the same command goes on beside it: it measures a speed.
    """

    name: str
    function: str = dataclasses.field(compare=False)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    of: tuple[Run, ...] = dataclasses.field(default=(), compare=False)
    alone: bool = dataclasses.field(default=False, compare=False)

    @property
    def needs(self) -> tuple[Run, ...]:
        """The runs that must be finished before it starts."""
        return self.of


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A number of a table, or a point of a figure.

    Attributes:
        labels: where it belongs, such as {"task": "CIFAR-10", "model": "ViT-B/16"}.
        sources: what it is read from, one for each seed.
        metric: of a run, a name of its metrics.jsonl whose last value counts: "eval_accuracy",
            "fewshot/imagenet2012/5shot"; of a task, one of its scalars.
        at_best: whether it is read at the step of the best evaluation instead.
        paper: the paper's number, in the unit in which it is shown; None if it has none.
        paper_sd: its standard deviation, likewise.
        x: where it stands on the abscissa of a figure, by this run's sizes.
        paper_x: where the paper's point stands.
        percent: whether it is a share, shown in percent.
    """

    labels: Mapping[str, str]
    sources: Sequence[Run | Task]
    metric: str = "eval_accuracy"
    at_best: bool = False
    paper: float | None = None
    paper_sd: float | None = None
    x: float | None = None
    paper_x: float | None = None
    percent: bool = True


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or a figure of the paper.

    Attributes:
        name: of its module, "table5".
        title: "Table 5: ...".
        measure: lists its measurements at a scale, on data sets, with seeds.
        rows: labels that name the rows of its table, from the left.
        column: the label that names its columns; "" has one column of numbers.
        draw: the picture, of what has been measured; None if there is none.
        about: a paragraph for the page: what is compared, and what the paper says of it.
        reference: what `Measurement.paper` is, if it is not the paper's: "published later".
    """

    name: str
    title: str
    measure: "Callable[[Setting], Sequence[Measurement]]"
    rows: tuple[str, ...]
    column: str = ""
    draw: "Callable[[Results], Figure] | None" = None
    about: str = ""
    reference: str = ""
