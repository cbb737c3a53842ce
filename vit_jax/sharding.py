"""The device mesh, and which array lives where on it."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

AXIS = "data"
MODES = ("replicated", "fsdp")
# Smaller arrays stay whole under FSDP: gathering them costs more than the memory they take.
FSDP_MIN_SIZE = 2**14


def make_mesh() -> Mesh:
    """All devices of all processes in a row."""
    return Mesh(np.asarray(jax.devices()), (AXIS,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis, the batch, over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def state_sharding(state: Any, mesh: Mesh, mode: str) -> Any:
    """The sharding of every leaf of a state.

    Args:
        state: tree of arrays or shapes.
        mesh: from `make_mesh`.
        mode: "replicated" (data parallel) or "fsdp": parameters, their average and the optimizer's
            moments are split along their longest axis that divides evenly over the devices.

    Raises:
        UserError: the mode is unknown.
    """
    if mode not in MODES:
        raise UserError(f"sharding {mode!r} is unknown: use {' or '.join(MODES)}")

    def place(leaf: Any) -> NamedSharding:
        spec = [None] * leaf.ndim
        axes = [i for i in range(leaf.ndim) if leaf.shape[i] % mesh.size == 0]
        if mode == "fsdp" and axes and leaf.size >= FSDP_MIN_SIZE:
            spec[max(axes, key=lambda i: leaf.shape[i])] = AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, state)


def to_devices(
    batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, prefetch: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Sends each process' rows to its devices as global batches, `prefetch` batches ahead."""
    sharding = batch_sharding(mesh)
    queue = collections.deque()
    for batch in batches:
        queue.append(
            {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
        )
        if len(queue) > prefetch:
            yield queue.popleft()
    yield from queue
