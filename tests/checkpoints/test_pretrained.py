import os
import pathlib
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.training import CheckpointStore
from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.state import TrainState


@pytest.fixture
def params():
    model = VisionTransformer(
        patch_size=8, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=2, num_classes=3
    )
    return jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])


def save_npz(path, params):
    np.savez(path, **flatten_dict(params, sep="/"))
    return path


def save_run(workdir, params, ema_params=None, steps=(1,)):
    store = CheckpointStore(workdir, keep=3)
    for step in steps:
        scaled = jax.tree.map(lambda x, step=step: jnp.asarray(x) * step, params)
        state = TrainState(jnp.int32(step), scaled, (), ema_params, jax.random.key(0))
        store.save(step, state, {"class_names": ["a", "b", "c"]})
        if step == 1:
            store.save_best(step, state, {})
    store.close()


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_official_npz_is_read_as_its_tree(tmp_path, params):
    pretrained = load_pretrained(save_npz(tmp_path / "ViT.npz", params))
    assert_equal_trees(pretrained.params, params)
    assert pretrained.source == str(tmp_path / "ViT.npz") and pretrained.metadata == {}


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_become_float32_without_a_change_of_value(tmp_path, dtype):
    values = np.array([[1.5, -0.25], [3.0, 65280.0]]).astype(dtype)
    pretrained = load_pretrained(save_npz(tmp_path / "a.npz", {"head": {"kernel": values}}))
    kernel = pretrained.params["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, values.astype(np.float64))


@pytest.mark.parametrize("where", [".", "checkpoints", "checkpoints/2"])
def test_the_newest_step_of_a_run_is_read_from_any_of_its_directories(tmp_path, params, where):
    save_run(tmp_path, params, steps=(1, 2))
    pretrained = load_pretrained(tmp_path / where)
    assert_equal_trees(pretrained.params, jax.tree.map(lambda x: x * 2, params))
    assert pretrained.source == str(tmp_path / "checkpoints/2")
    assert pretrained.metadata == {"class_names": ["a", "b", "c"]}


@pytest.mark.parametrize("where", ["best", "checkpoints/1"])
def test_the_best_and_any_named_step_are_read(tmp_path, params, where):
    save_run(tmp_path, params, steps=(1, 2))
    assert_equal_trees(load_pretrained(tmp_path / where).params, params)


def test_the_average_is_read_where_the_run_averaged(tmp_path, params):
    average = jax.tree.map(lambda x: jnp.asarray(x) + 1, params)
    save_run(tmp_path, params, average)
    assert_equal_trees(load_pretrained(tmp_path).params, jax.device_get(average))


def test_a_damaged_step_is_refused_in_one_line(tmp_path, params):
    save_run(tmp_path, params)
    data = max((p for p in (tmp_path / "checkpoints/1/state").rglob("*") if p.is_file()),
               key=lambda p: p.stat().st_size)  # fmt: skip
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="checkpoints/1 is damaged: ") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist_says_what_is_accepted(tmp_path):
    with pytest.raises(UserError, match=r"none.npz does not exist: give an .npz file .* workdir"):
        load_pretrained(tmp_path / "none.npz")


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint: give"):
        load_pretrained(tmp_path)


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="truncated or not an .npz file"):
        load_pretrained(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_archive_is_refused(tmp_path, params, kept):
    path = save_npz(tmp_path / "a.npz", params)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(UserError, match="a.npz is truncated or not an .npz file"):
        load_pretrained(path)


def test_an_altered_archive_is_refused(tmp_path, params):
    path = save_npz(tmp_path / "a.npz", params)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.npz is damaged"):
        load_pretrained(path)


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


def test_pickled_objects_are_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **{"head/kernel": np.array([Bomb()], dtype=object)})
    with pytest.raises(UserError, match="a.npz holds pickled Python objects"):
        load_pretrained("a.npz")
    pathlib.Path("b.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="b.npz is truncated or not an .npz file"):
        load_pretrained("b.npz")
    assert not pathlib.Path("executed").exists()


def test_an_archive_without_parameters_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz")
    with pytest.raises(UserError, match="holds no parameters"):
        load_pretrained(tmp_path / "a.npz")


@pytest.mark.parametrize("values", [np.array(["text"]), np.arange(3), np.array([1 + 2j])])
def test_arrays_that_are_no_floats_are_refused_by_name(tmp_path, values):
    np.savez(tmp_path / "a.npz", **{"head/bias": values})
    with pytest.raises(UserError, match="has head/bias of type"):
        load_pretrained(tmp_path / "a.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, params, value):
    params["head"]["bias"] = np.array([0, value, 0], np.float32)
    with pytest.raises(UserError, match="has NaN or infinite values in head/bias"):
        load_pretrained(save_npz(tmp_path / "a.npz", params))
