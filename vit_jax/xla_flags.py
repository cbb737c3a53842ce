"""Flags that XLA needs to compute right numbers, which `import vit_jax` sets, and fast ones.

On many CPUs with AVX2, jaxlib before 0.8.2 multiplies by weights that are no longer there: XNNPACK
packs the right side of a product once and finds it again by its address, so that a matrix that is
updated in place, as donated parameters are, counts as what it was at first. Training then learns
nothing, and nothing says so. Measured: 0.7.1, 0.7.2 and 0.8.1 are wrong; 0.8.2, 0.8.3, 0.9.0,
0.9.1, 0.9.2, 0.10.2 and 0.12.0.1 are right. On an AMD EPYC with avx512_bf16 0.7.1 is right as well.
"""

import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from vit_jax.errors import UserError

WITHOUT_XNNPACK = "--xla_cpu_use_xnnpack=false"
_FIRST_RIGHT = (0, 8, 2)
# Programs that come from a compilation cache do not always update in place.
_ROUNDS = 16

# Options of XLA's compiler by the platform of a program; benchmarks/README.md tells what for.
_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    # Products are cuBLAS' from the start, which adds biases and residuals and does GELU itself; of
    # Triton's hardly one was chosen anyway (H200, jax 0.11.2).
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


def compiler_options(platform: str) -> dict[str, bool]:
    """Options with which programs are compiled; what XLA_FLAGS names is left to them.

    Args:
        platform: of the devices, as JAX calls it: "cpu", "gpu", "tpu".
    """
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: x for name, x in _OPTIONS.get(platform, {}).items() if name not in flags}


def avoid_stale_weights() -> None:
    """Keeps XLA's CPU backend from XNNPACK where the installed jaxlib has the fault.

    XLA reads its flags when JAX first asks for devices: what is set before holds, wherever JAX was
    imported. It is set in the environment, so that processes that are started from here have it.

    Raises:
        UserError: it is too late: JAX computes on a CPU already, and wrongly.
    """
    try:
        version = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:  # `export.runtime` needs none.
        return
    if not has_stale_weights(version):
        return
    if not _computes_on_cpu():
        os.environ["XLA_FLAGS"] = without_xnnpack(os.environ.get("XLA_FLAGS", ""))
    elif _multiplies_by_stale_weights():  # Whatever the environment says by now.
        raise UserError(
            f"jaxlib {version} was started before vit_jax was imported, and multiplies by weights "
            "that are no longer there: restart Python and import vit_jax before anything is "
            f"computed, or start it with XLA_FLAGS={WITHOUT_XNNPACK}, or install jax 0.8.2 or newer"
        )


def has_stale_weights(version: str) -> bool:
    """Tells whether a version of jaxlib, such as "0.7.1", has the fault."""
    return tuple(map(int, re.findall(r"\d+", version)[:3])) < _FIRST_RIGHT


def without_xnnpack(flags: str) -> str:
    """XLA_FLAGS with `WITHOUT_XNNPACK` as the last word on XNNPACK; a file of flags is read."""
    if flags.strip() and not flags.lstrip().startswith("-"):
        with contextlib.suppress(OSError):  # XLA says that it cannot read it.
            flags = Path(flags).read_text()
    words = flags.split()
    name = WITHOUT_XNNPACK.partition("=")[0]
    about = [word for word in words if word.partition("=")[0] == name]
    return " ".join(words if about[-1:] == [WITHOUT_XNNPACK] else [*words, WITHOUT_XNNPACK])


def _computes_on_cpu() -> bool:
    if "jax" not in sys.modules:
        return False
    # It is private, but only versions with the fault come here.
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized() and xla_bridge.default_backend() == "cpu"


def _multiplies_by_stale_weights() -> bool:
    import jax
    import numpy as np

    product = jax.jit(lambda a, w: a @ w)
    double = jax.jit(lambda w: 2 * w, donate_argnums=0)
    a, w = (jax.device_put(np.ones(shape, np.float32)) for shape in ((64, 768), (768, 1000)))
    for _ in range(_ROUNDS):
        before = np.asarray(product(a, w))
        w = double(w)
        if not np.array_equal(product(a, w), 2 * before):
            return True
    return False
