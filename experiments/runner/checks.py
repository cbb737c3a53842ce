"""Checks of what experiments ask for, before anything runs and without opening a data set."""

from collections import Counter
from collections.abc import Iterable, Sequence

from experiments.runner.experiment import Experiment, Measurement, Run
from experiments.runner.graph import Job
from vit_jax.config import check_config
from vit_jax.errors import UserError, brief, nearest


def check_labels(experiment: Experiment, measurements: Sequence[Measurement]) -> None:
    """Checks that every measurement has a place of its own in the experiment's table.

    Raises:
        UserError: one lacks a label that names rows or columns, or two have the same.
    """
    names = (*experiment.rows, *filter(None, [experiment.column]))
    for measurement in measurements:
        for name in names:
            if name not in measurement.labels:
                near = nearest(name, measurement.labels)
                hint = f": did you mean {near!r}?" if near else ""
                raise UserError(
                    f"{experiment.name}: a measurement has no label {name!r}, which names rows or "
                    f"columns, but {brief(dict(measurement.labels))}{hint}"
                )
    labels = Counter(tuple(measurement.labels.items()) for measurement in measurements)
    for found, times in labels.items():
        if times > 1:
            raise UserError(
                f"{experiment.name}: {times} measurements have the labels {brief(dict(found))}: "
                "give each its own"
            )


def check_configs(jobs: Iterable[Job]) -> None:
    """Checks the configs of runs, as far as can be told without their data sets.

    Raises:
        UserError: one cannot run.
    """
    for job in jobs:
        if isinstance(job, Run):
            try:
                check_run(job)
            except UserError as error:
                raise UserError(f"{job.name}: {error}") from error


def check_run(run: Run) -> None:
    """Checks the config of a run, as far as can be told without its data set.

    Raises:
        UserError: it cannot run.
    """
    config = run.config.copy_and_resolve_references()
    if run.init_from is not None:
        config.init_from = run.init_from.name
    check_config(config)
    if config.batch_size % config.accumulate_steps:
        raise UserError(
            f"batch_size {config.batch_size} cannot be divided by {config.accumulate_steps} "
            "accumulate_steps: choose a divisor, such as a power of two"
        )
