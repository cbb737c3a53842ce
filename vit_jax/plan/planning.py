"""The plan of a run: every number with how it was come by, "estimated" or "compiled"."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.analysis import flops
from vit_jax.config import take_from_weights, to_dict
from vit_jax.models import model_fields, prediction_defaults
from vit_jax.plan import estimate
from vit_jax.plan.accelerators import USABLE, Target
from vit_jax.plan.estimate import Described

# `compiler.run`: what a config's train step is when it has been compiled.
Run = Callable[[Mapping[str, Any], int, Target], dict[str, Any]]
DAY = 24 * 60 * 60


def with_defaults(config: ConfigDict) -> ConfigDict:
    """The config with the model's defaults for what it would take from its weights."""
    return take_from_weights(config, prediction_defaults(config.model.architecture))


def plan(
    config: ConfigDict,
    classes: int,
    images: int,
    target: Target,
    run: Run | None,
    *,
    mfu: float,
    price: float | None,
) -> dict[str, Any]:
    """Plans a run.

    Args:
        config: checked and complete.
        classes: of its data set.
        images: to train on, 0 where its duration is in steps.
        target: the devices.
        run: compiles, None for estimates alone.
        mfu: the share of the peak that is assumed where nothing better is known.
        price: of a device for an hour.

    Returns:
        What `report.render` prints; bytes, seconds and FLOPs.

    Raises:
        UserError: the config does not go with the devices, or the compiler refuses it.
    """
    described = estimate.describe(config, classes, target.devices)
    found: dict[str, Any] = {
        "on": target.name,
        "devices": target.devices,
        "kind": target.accelerator.kind,
        "source": target.accelerator.source,
        "batch_size": config.batch_size,
        "sharding": config.sharding,
        "memory": described.memory(),
        "usable": USABLE * target.accelerator.memory,
        "peak_flops": flops.peak_flops(target.accelerator.kind),
        "bounds": estimate.bounds(described, target)._asdict(),
    }
    if run is not None:
        compile_with = _Compiler(config, classes, target, run)
        found["compiled"] = compile_with()
        found["fits"] = _fits(found["compiled"], found["usable"])
        found["largest_batch"] = _largest_batch(compile_with, found["compiled"], found["usable"])
        found["remat"] = _policies(compile_with, found["compiled"])
    return {**found, "run": _whole_run(described, images, target, found, mfu, price)}


class _Compiler:
    """Compiles a config with another batch or model; tells what it is at."""

    def __init__(self, config: ConfigDict, classes: int, target: Target, run: Run):
        self.config = config
        self.unit = target.devices * config.accumulate_steps
        self._classes, self._target, self._run = classes, target, run

    def __call__(self, **changes: Any) -> dict[str, Any]:
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        words = ", ".join(f"{key} {value}" for key, value in changes.items()) or "the config"
        print(f"compiling {words} for {self._target.name}", file=sys.stderr, flush=True)
        return self._run(to_dict(config), self._classes, self._target)


def peak(compiled: Mapping[str, Any]) -> float:
    """The bytes of a device that a compiled program needs."""
    if "needs" in compiled:
        return compiled["needs"]
    memory = compiled["memory"]
    return memory["arguments"] + memory["temporaries"] + max(memory["outputs"], 0)


def _fits(compiled: Mapping[str, Any], usable: float) -> bool | None:
    return peak(compiled) <= usable if usable else None


def _largest_batch(
    compile_with: _Compiler, compiled: Mapping[str, Any], usable: float
) -> dict[str, Any] | None:
    """The largest batch that fits: memory is about a constant and so much for each image.

    The line through two batches says where it meets what is usable; the batch there is compiled,
    and if it does not fit, the one where the line through it and the nearest does.
    """
    if not usable:
        return None
    unit, batch = compile_with.unit, compile_with.config.batch_size
    other = max(batch // unit // 2, 1) * unit
    other = 2 * unit if other == batch else other
    peaks = {batch: peak(compiled), other: peak(compile_with(batch_size=other))}
    for _ in range(2):
        largest = _meeting(peaks, usable) // unit * unit
        if largest < unit:
            return {"batch_size": 0, "peak": min(peaks.values()), "how": "estimated"}
        if largest not in peaks:
            peaks[largest] = peak(compile_with(batch_size=largest))
        if peaks[largest] <= usable:
            break
    fitting = [size for size, needs in peaks.items() if needs <= usable]
    if not fitting:
        return {"batch_size": int(largest), "peak": usable, "how": "estimated"}
    return {"batch_size": max(fitting), "peak": peaks[max(fitting)], "how": "compiled"}


def _meeting(peaks: Mapping[int, float], usable: float) -> int:
    """The batch at which the line through the two peaks that are nearest to `usable` meets it."""
    (a, at_a), (b, at_b) = sorted(peaks.items(), key=lambda item: abs(item[1] - usable))[:2]
    slope = (at_b - at_a) / (b - a)
    return int(a + (usable - at_a) / slope) if slope > 0 else max(a, b)


def _policies(compile_with: _Compiler, compiled: Mapping[str, Any]) -> dict[str, Any]:
    """The programs of all values of `model.remat`, the config's own among them."""
    model = compile_with.config.model
    field = model_fields(model.architecture)["remat"]
    choices = field.metadata.get("choices") or (False, True)
    return {
        str(choice): compiled if choice == model.remat else compile_with(**{"model.remat": choice})
        for choice in choices
    }


def _whole_run(
    described: Described,
    images: int,
    target: Target,
    found: Mapping[str, Any],
    mfu: float,
    price: float | None,
) -> dict[str, Any]:
    """The arithmetic, days and price of all steps, by each of the times of a step."""
    config = described.config
    steps, seen = estimate.count_images(config, images)
    work, arithmetic = described.train_flops * seen, found["bounds"]["arithmetic"]
    times = {
        "roofline": estimate.Bounds(**found["bounds"]).least,
        "assumed": arithmetic / mfu if arithmetic else None,
        "compiler": found.get("compiled", {}).get("optimal_seconds"),
    }
    ways = {}
    for way, seconds in times.items():
        if seconds is None:
            continue
        hours = seconds * steps / 3600 * target.devices
        ways[way] = {"step": seconds, "days": seconds * steps / DAY, "device_hours": hours}
        if price is not None:
            ways[way]["cost"] = hours * price
    return {"steps": steps, "images": seen, "exaflops": work / 1e18, "mfu": mfu, "by": ways}
