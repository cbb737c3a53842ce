"""A plan as text: each number says whether it was compiled or estimated."""

from collections.abc import Mapping
from typing import Any

from vit_jax.plan.planning import peak
from vit_jax.printable import printable

GIB = 2**30
_WAYS = {
    "roofline": "at least: the longest of these",
    "assumed": "at {mfu:.0%} of the peak, which is assumed",
    "compiler": "the compiler's own estimate",
}
_BOUNDS = {
    "arithmetic": "the model's products at {peak} TFLOP/s",
    "memory": "state and gradients through memory",
    "links": "parameters and gradients over the links",
}


def render(found: Mapping[str, Any]) -> str:
    """The plan that `planning.plan` found, with "config", its name."""
    head = (
        f"{printable(found['config'])} on {found['devices']} x {found['kind']} "
        f"({found['source']}): batch {found['batch_size']:,}, sharding {found['sharding']}"
    )
    parts = [_memory(found), _batch(found), _remat(found), _collectives(found), _time(found)]
    return "\n\n".join([head, *("\n".join(part) for part in parts if part), "\n".join(_run(found))])


def _row(name: str, number: str, how: str) -> str:
    return f"  {name:46}{number:>12}  {how}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _memory(found: Mapping[str, Any]) -> list[str]:
    kept, compiled = found["memory"], found.get("compiled")
    lines = ["memory of a device"]
    lines += [_row(kind, _gib(size), "estimated") for kind, size in kept.items() if size]
    if compiled is None:
        lines.append(_row("activations and other temporaries", "?", "needs the compiler"))
    elif "needs" in compiled:
        lines.append(_row("all together", _gib(compiled["needs"]), "compiled"))
    else:
        memory = compiled["memory"]
        lines += [
            _row("these together", _gib(memory["arguments"]), "compiled"),
            _row("activations and other temporaries", _gib(memory["temporaries"]), "compiled"),
            _row("all together", _gib(peak(compiled)), "compiled"),
        ]
    if found["usable"]:
        fits = {True: "it fits", False: "it does not fit", None: ""}[found.get("fits")]
        lines.append(_row("usable", _gib(found["usable"]), fits))
    return lines


def _batch(found: Mapping[str, Any]) -> list[str]:
    largest = found.get("largest_batch")
    if largest is None:
        return []
    if not largest["batch_size"]:
        return ["no batch fits: shard more, rematerialize more or take more devices  (estimated)"]
    size = largest["batch_size"]
    each = f"{size:,}, {size // found['devices']:,} a device"
    return [f"largest batch that fits: {each}, {_gib(largest['peak'])}  ({largest['how']})"]


def _remat(found: Mapping[str, Any]) -> list[str]:
    if not found.get("remat"):
        return []
    lines = ["model.remat, all together"]
    for policy, compiled in found["remat"].items():
        how = "compiled"
        if found["usable"]:
            how += ", fits" if peak(compiled) <= found["usable"] else ", does not fit"
        lines.append(_row(policy, _gib(peak(compiled)), how))
    return lines


def _collectives(found: Mapping[str, Any]) -> list[str]:
    compiled = found.get("compiled") or {}
    if "collectives" not in compiled:
        return []
    lines = ["collectives of a step, and what they leave a device"]
    for kind, each in compiled["collectives"].items():
        name = f"{each['count']} {kind}"
        lines.append(_row(name, f"{each['bytes'] / 2**20:,.1f} MiB", "compiled"))
    return lines if len(lines) > 1 else ["no collectives  (compiled)"]


def _time(found: Mapping[str, Any]) -> list[str]:
    given = found["peak_flops"]
    words = {"peak": f"{given / 1e12:.0f}" if given else ""}
    rows = [
        _row(_BOUNDS[name].format(**words), _milliseconds(seconds), "estimated")
        for name, seconds in found["bounds"].items()
        if seconds
    ]
    return ["time of a step, each alone", *rows] if rows else []


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def _run(found: Mapping[str, Any]) -> list[str]:
    run = found["run"]
    lines = [
        f"the whole run: {run['steps']:,} steps, {run['images']:,} images, "
        f"{run['exaflops']:,.4g} exaFLOPs  (estimated)"
    ]
    for way, each in run["by"].items():
        name = _WAYS[way].format(mfu=run["mfu"])
        rate = found["batch_size"] / each["step"]
        how = f"{_milliseconds(each['step'])} a step, {rate:,.0f} images/s"
        if "cost" in each:
            how += f", costs {each['cost']:,.2f}"
        lines.append(_row(name, f"{each['days']:.4g} days", how))
    return lines
