import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.sharding import make_mesh, state_sharding, to_devices

SHAPES = {
    "wide": (256, 1024),
    "heads": (768, 12, 64),
    "odd": (257, 1023),
    "small": (64, 64),
    "count": (),
}
EIGHT = AbstractMesh((8,), ("data",))


def specs(mode):
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    return {name: s.spec for name, s in state_sharding(state, EIGHT, mode).items()}


def test_fsdp_splits_the_longest_axis_that_divides():
    assert specs("fsdp") == {
        "wide": PartitionSpec(None, "data"),
        "heads": PartitionSpec("data", None, None),
        "odd": PartitionSpec(None, None),
        "small": PartitionSpec(None, None),
        "count": PartitionSpec(),
    }


def test_data_parallel_replicates_everything():
    assert all(set(spec) <= {None} for spec in specs("replicated").values())


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="sharding 'zero' is unknown: use replicated or fsdp"):
        specs("zero")


def test_batches_keep_their_order_and_are_read_ahead():
    read = []

    def batches():
        for i in range(5):
            read.append(i)
            yield {"label": np.full(2, i)}

    out = []
    for batch in to_devices(batches(), make_mesh(), prefetch=2):
        out.append(int(batch["label"][0]))
        assert len(read) == min(len(out) + 2, 5)
    assert out == [0, 1, 2, 3, 4]
