"""The runs and tasks of experiments, each after what it needs, and parts for many machines."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.runner.experiment import Measurement, Run, Task
from vit_jax.errors import UserError, brief

Job = Run | Task


def collect(measurements: Iterable[Measurement]) -> dict[str, Job]:
    """All that measurements need, by name, each after what it needs.

    What begins with the same run lies together, and in it a sweep with its final runs.

    Raises:
        UserError: two that differ have one name.
    """
    found: dict[str, Job] = {}
    for measurement in measurements:
        for source in measurement.sources:
            _add(source, found)
    places = {name: place for place, name in enumerate(found)}
    jobs = sorted(found.values(), key=lambda job: places[root(job).name])
    return {job.name: job for job in jobs}


def _add(job: Job, found: dict[str, Job]) -> None:
    if job.name in found:
        difference = _difference(found[job.name], job)
        if difference:
            raise UserError(
                f"two that differ are named {job.name} ({difference}): give the one with changes "
                "a variant, or another name"
            )
        return
    for needed in job.needs:
        _add(needed, found)
    found[job.name] = job


def _difference(first: Job, second: Job) -> str:
    """What two of one name differ in, "" if in nothing."""
    if first is second:
        return ""
    if type(first) is not type(second):
        return "one is a Run, the other a Task"
    ours, others = _content(first), _content(second)
    return "; ".join(
        f"{key} is {brief(ours.get(key))} or {brief(others.get(key))}"
        for key in sorted(ours.keys() | others.keys())
        if ours.get(key) != others.get(key)
    )


def _content(job: Job) -> dict[str, Any]:
    """What makes a job what it is, by dotted names."""
    needs = {"needs": [needed.name for needed in job.needs]}
    if isinstance(job, Task):
        asked = {"function": job.function, "arguments": dict(job.arguments), "alone": job.alone}
        return asked | needs
    return _flat(job.config.to_dict(), "config") | needs


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    parts = (_flat(x, f"{name}.{key}") for key, x in value.items())
    return {key: x for part in parts for key, x in part.items()}


def root(job: Job) -> Job:
    """The first of the runs that a job goes back to: the pre-training of a fine-tuning."""
    while True:
        before = job.init_from if isinstance(job, Run) else next(iter(job.of), None)
        if before is None:
            break
        job = before
    # What trains from scratch has no pre-training, but a sweep.
    return root(job.rates[0]) if isinstance(job, Run) and job.rates else job


def part(jobs: Mapping[str, Job], index: int, number: int) -> list[str]:
    """The names of a part of jobs, of about as many as the other parts.

    The parts are the same wherever they are asked for. What begins with the same run is in one part
    as long as that is no longer than the others, a sweep with its final runs nearly always.

    Args:
        jobs: of `collect`.
        index: of the part, from 0.
        number: of parts.
    """
    names: list[str] = []
    size, done = len(jobs) / number, 0
    for chain in chains(jobs):
        # A long chain is cut where the next part begins, a short one lies where its middle does.
        for piece in [chain] if len(chain) <= size else sweeps(chain):
            middle = done + len(piece) / 2
            if min(int(middle / size), number - 1) == index:
                names += [job.name for job in piece]
            done += len(piece)
    return names


def chains(jobs: Mapping[str, Job]) -> list[list[Job]]:
    """What begins with the same run, together."""
    return _groups(jobs.values(), [root(job).name for job in jobs.values()])


def sweeps(jobs: Sequence[Job]) -> list[list[Job]]:
    """Each sweep with its final runs together, all else alone; in the order of `jobs`."""
    of = {rate.name: rate.name for job in jobs if isinstance(job, Run) for rate in job.rates}
    for job in jobs:
        if isinstance(job, Run) and job.rates:
            first = job.rates[0].name
            of |= {job.name: first} | {rate.name: first for rate in job.rates}
    return _groups(jobs, [of.get(job.name, job.name) for job in jobs])


def _groups(jobs: Iterable[Job], names: Iterable[str]) -> list[list[Job]]:
    groups: dict[str, list[Job]] = {}
    for job, name in zip(jobs, names, strict=True):
        groups.setdefault(name, []).append(job)
    return list(groups.values())
