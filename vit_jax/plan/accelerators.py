"""The accelerators that a run can be planned for, each with the source of its numbers."""

import math
import re
from typing import NamedTuple

from vit_jax.errors import UserError, nearest


class Accelerator(NamedTuple):
    """One device, as its maker describes it. Its peak is `analysis.flops.peak_flops` of its kind.

    Attributes:
        kind: JAX's `device_kind`.
        platform: that compiles for it, "cuda", "tpu" or "cpu".
        memory: bytes of its own memory; 0 if that is the machine's.
        bandwidth: bytes a second from and to that memory.
        links: bytes a second that it sends to its neighbors, and as many that it receives.
        source: of these numbers.
        described: for XLA, which compiles for a GPU that it is told of.
    """

    kind: str
    platform: str
    memory: float
    bandwidth: float
    links: float
    source: str
    described: str = ""


def _gpu(
    name: str, *, major: int, cores: int, shared: int, l2: int, clock: float, memory: int, rate: int
) -> str:
    """XLA's description of an NVIDIA GPU, a GpuTargetConfigProto in text.

    Args:
        name: JAX's `device_kind`.
        major: compute capability, of which the minor is 0.
        cores: streaming multiprocessors.
        shared: bytes of shared memory of each of them; a block may have all but 1024.
        l2: bytes of its cache.
        clock: in GHz.
        memory: bytes.
        rate: bytes a second.
    """
    fpus = 64 if major == 8 else 128
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared - 1024}
  shared_memory_per_core: {shared} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {rate} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


_HOPPER = {"major": 9, "cores": 132, "shared": 233472, "l2": 52428800, "clock": 1.98}
_AMPERE = {"major": 8, "cores": 108, "shared": 167936, "l2": 41943040, "clock": 1.41}
_H100, _H200, _A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"

# The memory of GPUs is what the driver reports; that of TPUs, their data sheets' powers of two.
ACCELERATORS = {
    "h100": Accelerator(
        _H100,
        "cuda",
        memory=84_929_347_584,
        bandwidth=3.35e12,
        links=450e9,
        source="NVIDIA's data sheet, H100 SXM",
        described=_gpu(_H100, **_HOPPER, memory=84_929_347_584, rate=3_352_320_000_000),
    ),
    "h200": Accelerator(
        _H200,
        "cuda",
        memory=150_110_011_392,
        bandwidth=4.8e12,
        links=450e9,
        source="NVIDIA's data sheet, H200 SXM",
        described=_gpu(_H200, **_HOPPER, memory=150_110_011_392, rate=4_800_000_000_000),
    ),
    "a100": Accelerator(
        _A100,
        "cuda",
        memory=84_974_239_744,
        bandwidth=2.039e12,
        links=300e9,
        source="NVIDIA's data sheet, A100 80GB SXM",
        described=_gpu(_A100, **_AMPERE, memory=84_974_239_744, rate=2_039_000_000_000),
    ),
    "v4": Accelerator("TPU v4", "tpu", 32 * 2**30, 1.228e12, 300e9, "cloud.google.com/tpu/docs/v4"),
    "v5e": Accelerator(
        "TPU v5 lite", "tpu", 16 * 2**30, 0.819e12, 200e9, "cloud.google.com/tpu/docs/v5e"
    ),
    "v5p": Accelerator(
        "TPU v5", "tpu", 95 * 2**30, 2.765e12, 600e9, "cloud.google.com/tpu/docs/v5p"
    ),
    "v6e": Accelerator(
        "TPU v6 lite", "tpu", 32 * 2**30, 1.64e12, 448e9, "cloud.google.com/tpu/docs/v6e"
    ),
    # Simulated devices: what is compiled and how it is split can be seen on any machine.
    "cpu": Accelerator("cpu", "cpu", 0, 0, 0, "none"),
}
# Of a device's memory, what is left for a program beside the runtime's own.
USABLE = 0.92


class Target(NamedTuple):
    """Some accelerators, as `--on` names them.

    Attributes:
        name: as it was given.
        accelerator: each of them.
        shape: how they are arranged: one number, or the sides of a TPU slice.
    """

    name: str
    accelerator: Accelerator
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)


def parse_target(text: str) -> Target:
    """The target that "h100:8", "h100" (one) or "v5e:4x4" names.

    Raises:
        UserError: it names none.
    """
    name, _, shape = text.partition(":")
    if name not in ACCELERATORS:
        near = nearest(name, ACCELERATORS)
        hint = f"did you mean {near}?" if near else f"use {', '.join(ACCELERATORS)}"
        raise UserError(f"accelerator {name!r} is unknown: {hint}")
    accelerator = ACCELERATORS[name]
    tpu = accelerator.platform == "tpu"
    pattern = r"[1-9]\d*(x[1-9]\d*){1,2}" if tpu else r"([1-9]\d*)?"
    if not re.fullmatch(pattern, shape):
        way = f"{name}:2x2x1" if name in ("v4", "v5p") else f"{name}:4x4"
        raise UserError(
            f"--on {text!r} names no "
            + (f"slice of TPUs: give its shape, for example {way}" if tpu else "number of devices")
            + ("" if tpu else f": for example {name}:8")
        )
    return Target(text, accelerator, tuple(int(x) for x in (shape or "1").split("x")))
