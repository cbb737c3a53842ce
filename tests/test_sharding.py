import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.sharding import AXES, make_mesh, mesh_shape, parse_sharding, state_sharding, to_devices

SHAPES = {
    "wide": (256, 1024),
    "heads": (768, 12, 64),
    "odd": (257, 1023),
    "bias": (64,),
    "step": (),
}


def specs(data, fsdp):
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    placed = state_sharding(state, AbstractMesh((data, fsdp), AXES))
    return {name: s.spec for name, s in placed.items()}


@pytest.mark.parametrize("data", [1, 2])
def test_fsdp_splits_the_longest_axis_that_divides(data):
    assert specs(data, 8) == {
        "wide": PartitionSpec(None, "fsdp"),
        "heads": PartitionSpec("fsdp", None, None),
        "odd": PartitionSpec(None, None),
        "bias": PartitionSpec("fsdp"),
        "step": PartitionSpec(),
    }


def test_data_parallel_replicates_everything():
    assert all(set(spec) <= {None} for spec in specs(8, 1).values())


@pytest.mark.parametrize(
    ("sharding", "shape"),
    [
        ("replicated", (8, 1)),
        ("fsdp", (1, 8)),
        ("fsdp:4", (2, 4)),
        ("fsdp:8", (1, 8)),
        ("data:2,fsdp:4", (2, 4)),
        ("fsdp:4, data:2", (2, 4)),
        ("data:4,fsdp", (4, 2)),
        ("data:8", (8, 1)),
    ],
)
def test_axes_take_the_devices_that_are_left(sharding, shape):
    assert mesh_shape(sharding, 8) == shape


@pytest.mark.parametrize("sharding", ["zero", "", "fsdp:0", "fsdp:2,fsdp:4", "data,fsdp", "fsdp:x"])
def test_an_unknown_sharding_is_refused(sharding):
    with pytest.raises(UserError, match="is unknown: use replicated, fsdp, or axes and their dev"):
        parse_sharding(sharding)


@pytest.mark.parametrize(
    ("sharding", "needs"),
    [
        ("fsdp:3", "3 devices or a multiple"),
        ("fsdp:16", "16 "),
        ("data:2,fsdp:2", "4 devices, but"),
    ],
)
def test_what_does_not_multiply_up_to_the_devices_is_refused(sharding, needs):
    with pytest.raises(UserError, match=f"is for {needs}.*there are 8"):
        mesh_shape(sharding, 8)


# Three steps of a model with dropout on some of eight devices, and what the compiled step moves.
LOSSES = """
import functools, json, re
import jax, numpy as np, optax
from vit_jax import sharding, state as states, steps
from vit_jax.models import create_model, model_config
sizes = {"hidden_size": 64, "mlp_dim": 256, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.1}
fields = {"architecture": "vit", **model_config("ViT-Ti/4"), **sizes, "scan_layers": True}
model = create_model(fields, num_classes=10)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
init = functools.partial(
    states.init_train_state, model, optimizer, seed=0, image_size=8, average=True
)
rng = np.random.default_rng(0)
batch = {"image": rng.normal(size=(16, 8, 8, 3)).astype(np.float32), "label": np.arange(16) % 10}
found = {}
for name, count in RUNS:
    mesh = sharding.make_mesh(name, jax.devices()[:count])
    places = sharding.state_sharding(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=places)()
    objective = sharding.gathering(steps.classification(model, "softmax"), mesh)
    step = functools.partial(
        steps.train_step, objective=objective, optimizer=optimizer, ema_decay=0.9
    )
    rows = jax.device_put(batch, sharding.batch_sharding(mesh))
    step = jax.jit(step, out_shardings=(places, None)).lower(state, rows).compile()
    losses = []
    for _ in range(3):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    kernel = state.params["Transformer"]["encoderblock_0"]["MlpBlock_3"]["Dense_0"]["kernel"]
    found[f"{name} on {count}"] = {
        "losses": losses,
        "part": kernel.addressable_shards[0].data.size / kernel.size,
        "moves": sorted(set(re.findall(r"(all-to-all|collective-permute)", step.as_text()))),
    }
print(json.dumps(found))
"""
RUNS = [("replicated", 1), ("fsdp", 2), ("fsdp:2", 4), ("fsdp", 8)]


@pytest.mark.slow
def test_every_mesh_gives_the_losses_of_one_device_and_moves_no_activations():
    code = LOSSES.replace("RUNS", repr(RUNS))
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [run["part"] for run in found.values()] == [1, 1 / 2, 1 / 2, 1 / 8]
    one = found["replicated on 1"]["losses"]
    assert one[0] > one[1] > one[2]
    for name, run in found.items():
        np.testing.assert_allclose(run["losses"], one, atol=1e-5, err_msg=name)
        assert run["moves"] == [], name


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
