"""The device mesh, and which array lives where on it.

The batch is split over all devices. The axis "data" holds copies of the state, over "fsdp" each of
them is split: a parameter is gathered where the model asks for it, and its gradient is summed into
the part that each device keeps (ZeRO stage 3, Rajbhandari et al., 2020, arXiv 1910.02054). What a
step computes is the same for every mesh.
"""

import collections
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

# With one that is abstract, devices are only counted.
AnyMesh = Mesh | AbstractMesh
# The fastest links are between neighbors: the last axis, which moves parameters, is theirs.
AXES = ("data", "fsdp")
MODES = {"replicated": "data", "fsdp": "fsdp"}


def parse_sharding(sharding: str) -> dict[str, int | None]:
    """The devices along each axis of `AXES`, None for those that the others leave.

    Args:
        sharding: "replicated" (all along data), "fsdp" (all along fsdp), or for example
            "data:4,fsdp:8"; an axis without a number, or data where it is not named, takes what is
            left.

    Raises:
        UserError: it is of neither form.
    """
    words = MODES.get(sharding, sharding).split(",")
    matches = [re.fullmatch(r"\s*(data|fsdp)(?::([1-9]\d*))?\s*", word) for word in words]
    sizes = {x[1]: int(x[2]) if x[2] else None for x in matches if x}
    if len(sizes) < len(words) or list(sizes.values()).count(None) > 1:
        raise UserError(
            f"sharding {sharding!r} is unknown: use replicated, fsdp, or axes and their devices, "
            "for example data:4,fsdp:8; one axis may go without a number and takes the rest"
        )
    takes_rest = None in sizes.values()
    return {"data": 1 if takes_rest else None, "fsdp": 1, **sizes}


def mesh_shape(sharding: str, num_devices: int) -> tuple[int, ...]:
    """The devices along each axis of `AXES`.

    Raises:
        UserError: they do not multiply up to num_devices.
    """
    sizes = parse_sharding(sharding)
    given = int(np.prod([size for size in sizes.values() if size]))
    rest = num_devices // given
    if given * rest != num_devices or (rest > 1 and None not in sizes.values()):
        raise UserError(
            f"sharding {sharding!r} is for {given} devices"
            + (" or a multiple" if None in sizes.values() else "")
            + f", but there are {num_devices}: use numbers whose product is that"
        )
    return tuple(sizes[axis] or rest for axis in AXES)


def make_mesh(sharding: str = "replicated", devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices along `AXES`.

    Args:
        sharding: see `parse_sharding`.
        devices: all devices of all processes, in JAX's order, if None.

    Raises:
        UserError: their number does not fit.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(mesh_shape(sharding, len(devices))), AXES)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The first axis, the batch, over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(state: Any, mesh: AnyMesh) -> Any:
    """The sharding of every leaf of a state, a tree of arrays or shapes.

    Parameters, their average and the optimizer's moments are split over the axis "fsdp", along the
    longest of their own axes that divides evenly. Biases as well: their gradients then travel with
    those of the kernels, where they would need a sum of their own otherwise.
    """
    return jax.tree.map(lambda leaf: _place(leaf, mesh), state)


def _place(leaf: Any, mesh: AnyMesh) -> NamedSharding:
    spec: list[str | None] = [None] * leaf.ndim
    parts = mesh.shape["fsdp"]
    axes = [i for i in range(leaf.ndim) if leaf.shape[i] % parts == 0]
    if parts > 1 and axes:
        spec[max(axes, key=lambda i: leaf.shape[i])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def gathering(
    objective: Callable[..., Any], mesh: AnyMesh, compute_dtype: Any = np.float32
) -> Callable[..., Any]:
    """The same objective of parameters that `state_sharding` has split.

    Left to itself the partitioner splits activations as the parameters are, and moves those. Here
    each parameter is gathered where a module asks for it, in a loop over layers one layer at a
    time.

    Args:
        objective: a `steps.Objective`, or another function whose first argument is the parameters.
        mesh: from `make_mesh`.
        compute_dtype: in which a Transformer's kernels are multiplied: they are sent in it.
    """
    if mesh.shape["fsdp"] == 1:
        return objective

    @functools.wraps(objective)
    def gathered(params: Any, *args: Any, **options: Any) -> Any:
        return objective(jax.tree_util.tree_map_with_path(box, params), *args, **options)

    def box(path: tuple[Any, ...], x: Any) -> _Split:
        # The layers round their kernels to it themselves. Norms and heads compute in 32 bits.
        names = [key.key for key in path]
        rounded = "Transformer" in names and names[-1] == "kernel"
        return _Split(x, _place(x, mesh), np.dtype(compute_dtype if rounded else x.dtype))

    return gathered


class _Split(flax.struct.PyTreeNode, meta.AxisMetadata):
    """A parameter that `flax.linen.Module.param` gathers: it unboxes what it finds boxed."""

    value: Any
    sharding: NamedSharding = flax.struct.field(pytree_node=False)
    dtype: np.dtype = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        return _gather(self.value.astype(self.dtype), self.sharding).astype(self.value.dtype)

    def replace_boxed(self, val: Any) -> "_Split":
        return self.replace(value=val)

    # In a loop over layers the value has an axis more; the sharding is always that of one layer.
    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Split":
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Split":
        del index, params
        return self


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns x, whole on every device; its gradient has the sharding of x."""
    x = jax.lax.with_sharding_constraint(x, sharding)
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _gather_forward(x: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, None]:
    return _gather(x, sharding), None


def _gather_backward(sharding: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, sharding),)


_gather.defvjp(_gather_forward, _gather_backward)


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
