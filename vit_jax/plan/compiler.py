"""Compiles the train step of a config for accelerators that need not be here.

XLA compiles for a described GPU with the wheels of jax[cuda12] and for a slice of TPUs with those
of jax[tpu]; what it needs to be told before JAX is imported is told to a process of its own, which
`run` starts and which this module is: `python -m vit_jax.plan.compiler < request.json`.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit_jax.errors import UserError
from vit_jax.plan.accelerators import Target, parse_target
from vit_jax.xla_flags import compiler_options

if TYPE_CHECKING:
    import jax

_WHEELS = {
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "cuda12"),
    "tpu": (("libtpu",), "tpu"),
    "cpu": ((), ""),
}
# Without a GPU there is nothing to tune on: the choice of GEMM kernels is then not the real one;
# memory, fusions, attention kernels and collectives are.
_UNTUNED = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
_COLLECTIVE = re.compile(
    r"\s*(?:ROOT )?%?\S+ = (\(?.*?) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_PART = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)
_CALLED = re.compile(r"\b(?:body|calls|to_apply)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|c64)\[([\d,]*)\]")
_HBM = re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")


def missing_wheels(target: Target) -> str | None:
    """Says what has to be installed before `run` can compile for a target, None if nothing has."""
    modules, extra = _WHEELS[target.accelerator.platform]
    if not modules or any(importlib.util.find_spec(name) for name in modules):
        return None
    version = importlib.metadata.version("jax")
    return f"no compiler for {target.name} is installed: pip install 'jax[{extra}]=={version}'"


def run(config: Mapping[str, Any], num_classes: int, target: Target) -> dict[str, Any]:
    """Compiles a config's train step.

    Args:
        config: of the run, plain.
        num_classes: of its data set.
        target: to compile for.

    Returns:
        "memory", bytes a device: "arguments", "temporaries", "outputs" (that take no argument's
        place), "code"; "collectives", see there; "custom_calls", their numbers in the program;
        "optimal_seconds", the compiler's estimate, None where it has none; "seconds" of compiling.
        Where the program does not fit and the compiler says so instead: "needs", bytes.

    Raises:
        UserError: the compiler refuses for another reason.
    """
    request = {"config": config, "num_classes": num_classes, "target": target.name}
    done = subprocess.run(
        [sys.executable, "-m", "vit_jax.plan.compiler"],
        input=json.dumps(request),
        env={**os.environ, **_environment(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    answer = done.stdout.rstrip().rpartition("\n")[2]
    if done.returncode == 0:
        return json.loads(answer)
    if used := _HBM.search(done.stderr):
        return {"needs": float(used[1]) * 1024 ** (1 + "KMGT".index(used[2]))}
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
    raise UserError(f"compiling for {target.name} failed: {lines[-1][:300]}")


def _environment(target: Target) -> dict[str, str]:
    if target.accelerator.platform == "cuda":
        return {
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_UNTUNED}".strip(),
        }
    if target.accelerator.platform == "tpu":
        return {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    count = f"--xla_force_host_platform_device_count={target.devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": count}


def main() -> None:
    """Answers the request on stdin with a line of JSON."""
    request = json.load(sys.stdin)
    target = parse_target(request["target"])
    print(json.dumps(_compile(request["config"], request["num_classes"], target)), flush=True)


def _compile(config: Mapping[str, Any], num_classes: int, target: Target) -> dict[str, Any]:
    import time

    from ml_collections import ConfigDict

    from vit_jax.plan.estimate import describe

    described = describe(ConfigDict(config), num_classes, _devices(target))
    platform = {"cuda": "gpu"}.get(target.accelerator.platform, target.accelerator.platform)
    begin = time.monotonic()
    compiled = described.lower().compile(compiler_options(platform))
    return {**_look_at(compiled), "seconds": time.monotonic() - begin}


def _devices(target: Target) -> list["jax.Device"]:
    import jax
    from jax.experimental import topologies

    platform = target.accelerator.platform
    if platform == "cpu":
        return jax.devices("cpu")
    if platform == "tpu":
        return list(topologies.get_topology_desc(target.name, platform="tpu").devices)
    return list(
        topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x1x{target.devices}",
            target_config=target.accelerator.described,
        ).devices
    )


def _look_at(compiled: "jax.stages.Compiled") -> dict[str, Any]:
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    costs = compiled.cost_analysis() or {}
    seconds = costs.get("optimal_seconds", 0)
    assert memory is not None
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        "collectives": collectives(text),
        "custom_calls": _count(re.findall(r'custom_call_target="([^"]+)"', text)),
        "optimal_seconds": seconds if seconds > 0 else None,
    }


def collectives(text: str) -> dict[str, dict[str, int]]:
    """The collectives that a compiled program does, and the bytes that they leave a device.

    Args:
        text: the program; what stands in the body of a loop counts as often as that is gone
            through, where the compiler knows it.
    """
    parts = {x[1]: text[x.end() : text.find("\n}", x.end())] for x in _PART.finditer(text)}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    found: dict[str, dict[str, int]] = {}

    def add(name: str, times: int) -> None:
        for line in parts.get(name, "").splitlines():
            if match := _COLLECTIVE.match(line):
                each = found.setdefault(match[2], {"count": 0, "bytes": 0})
                each["count"] += times
                sizes = [_size(*array) for array in _ARRAY.findall(match[1])]
                # What starts one holds its operands before its results.
                each["bytes"] += times * sum(sizes[len(sizes) // 2 :] if match[3] else sizes)
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                add(called, times * int(trips[1]) if trips else times)

    if entry:
        add(entry[1], 1)
    return found


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    size = bits // 8
    for side in filter(None, shape.split(",")):
        size *= int(side)
    return size


def _count(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main()
