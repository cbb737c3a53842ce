"""What tests look at in the workdir of a run, and a run that is interrupted."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vit_jax import train


def read_metrics(workdir):
    """metrics.jsonl without what the clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    timed = ("images_per_second", "device_days")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def read_costs(workdir):
    """The lines of metrics.jsonl that account for time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "device_days" in record]


def read_losses(workdir):
    return [r["loss"] for r in read_metrics(workdir) if "loss" in r]


def read_arrays(workdir, step, kind="checkpoints"):
    """Every array of a checkpoint, or of the "best" one, by its name, whatever devices saved it."""
    path = workdir / kind / str(step) / "state"
    here = ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        state = checkpointer.restore(path, restore_args=jax.tree.map(lambda _: here, saved))
    state["rng"] = jax.random.key_data(state["rng"])
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(first, second, step):
    expected, found = read_arrays(first, step), read_arrays(second, step)
    assert any("opt_state" in name for name in expected)
    assert any("ema_params" in name for name in expected)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name
    best, same_best = ([path.name for path in (run / "best").iterdir()] for run in (first, second))
    assert best == same_best
    assert read_metrics(first) == read_metrics(second)
    assert (first / "metrics.json").read_text() == (second / "metrics.json").read_text()


def train_until(config, workdir, step):
    """Trains and is interrupted by Ctrl-C before the update of a step."""
    original, calls = train.to_devices, []

    def interrupted(batches, mesh):
        for batch in original(batches, mesh):
            if "mask" not in batch:
                calls.append(None)
            if len(calls) == step:
                raise KeyboardInterrupt
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "to_devices", interrupted)
        train.train(config, workdir)


def checkpoint_steps(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


WIDE = {"model.hidden_size": 64, "model.mlp_dim": 256, "model.dropout_rate": 0.1}
