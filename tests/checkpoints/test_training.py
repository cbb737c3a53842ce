import contextlib
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.checkpoints.integrity import read_state
from vit_jax.checkpoints.training import CheckpointStore, config_differences, latest_metadata
from vit_jax.errors import UserError
from vit_jax.state import TrainState

# Orbax abandons its other reads where one fails; pytest sees them end before `_restore` hides them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(seed=0, width=64):
    """A state with every kind of leaf: bf16, int32, f32, an average, a typed key, empty states."""
    rng = np.random.default_rng(seed)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16)
    )

    def draw(shapes):
        return jax.tree.map(
            lambda x: jnp.asarray(3 * rng.standard_normal(x.shape, np.float32).astype(x.dtype)),
            shapes,
        )

    sizes = {"head": {"kernel": (width, width), "bias": (width,)}, "cls": (1, 1, 8)}
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        sizes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    opt_state = draw(jax.eval_shape(optimizer.init, shapes))
    step = jnp.asarray(np.int32(seed))
    return TrainState(step, draw(shapes), opt_state, draw(shapes), jax.random.key(seed))


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def assert_identical(actual, expected):
    """Bit for bit, and of the same types."""

    def data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(data(a)).tobytes() == np.asarray(data(b)).tobytes()


def files(directory):
    return sorted((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 0x10
    path.write_bytes(content)


@pytest.fixture
def reports():
    return []


@pytest.fixture
def open_store(tmp_path, reports):
    with contextlib.ExitStack() as stack:

        def open_store(workdir=tmp_path / "run", keep=2):
            store = CheckpointStore(workdir, keep=keep, report=reports.append)
            stack.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def two_saved(open_store):
    """Steps 1 and 2, saved by a store that is closed."""
    store = open_store()
    for step in (1, 2):
        store.save(step, make_state(step), {"step": step})
    store.close()


def test_a_new_store_has_nothing(open_store, tmp_path):
    store = open_store()
    assert store.restore(abstract(make_state())) is None
    assert latest_metadata(tmp_path / "run") is None and store.latest_step() is None


def test_a_state_comes_back_bit_for_bit_with_its_metadata(open_store, tmp_path):
    state, metadata = make_state(), {"config": {"lr": 0.1}, "names": ["a", "b"], "best": None}
    special = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45])
    state = state.replace(params=state.params | {"special": special})
    store = open_store()
    store.save(7, state, metadata)
    store.wait()
    assert latest_metadata(tmp_path / "run") == metadata and store.latest_step() == 7
    restored, restored_metadata = open_store().restore(abstract(state))
    assert_identical(restored, state)
    assert restored_metadata == metadata


def test_a_state_may_be_donated_as_soon_as_save_returns(open_store):
    store, state = open_store(), make_state(width=512)
    expected = jax.tree.map(jnp.copy, state)
    store.save(1, state, {})
    wipe = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), donate_argnums=0)
    jax.block_until_ready(wipe(state.params))
    store.wait()
    assert_identical(store.restore(abstract(expected))[0], expected)


@pytest.mark.usefixtures("two_saved")
def test_restored_arrays_may_be_donated(open_store):
    update = jax.jit(lambda params: jax.tree.map(lambda x: x * 1.5, params), donate_argnums=0)
    expected = jax.device_get(make_state(2).params)
    for _ in range(5):
        state, _ = open_store().restore(abstract(make_state()))
        once = update(state.params)
        twice = update(once)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y * 1.5 * 1.5), twice, expected)


def test_the_newest_are_kept(open_store, tmp_path):
    store = open_store(keep=2)
    for step in (10, 20, 30, 40):
        store.save(step, make_state(step), {"step": step})
    store.wait()
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"30", "40"}


@pytest.mark.usefixtures("two_saved")
def test_a_step_that_is_saved_already_stays(open_store):
    store = open_store()
    store.save(2, make_state(99), {"step": 99})
    store.wait()
    assert_identical(store.restore(abstract(make_state()))[0], make_state(2))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap_rows(step):
    """Exchanges two rows of a kernel inside the data file, which lies in it uncompressed."""
    kernel = np.asarray(make_state(2).params["head"]["kernel"])
    first, second = kernel[3].tobytes(), kernel[4].tobytes()
    for path in files(step / "state"):
        content = path.read_bytes()
        path.write_bytes(content.replace(first + second, second + first))


DAMAGES = {
    "flipped data": lambda step: flip(files(step / "state")[-1]),
    "truncated data": lambda step: truncate(files(step / "state")[-1]),
    "emptied data": lambda step: files(step / "state")[-1].write_bytes(b""),
    "removed data": lambda step: files(step / "state")[-1].unlink(),
    "swapped values": swap_rows,
    "removed state": lambda step: shutil.rmtree(step / "state"),
    "flipped metadata": lambda step: flip(step / "metadata/metadata"),
    "metadata of another step": lambda step: shutil.copy(
        step.parent / "1/metadata/metadata", step / "metadata/metadata"
    ),
    "metadata no JSON object": lambda step: (step / "metadata/metadata").write_text("[]"),
    "removed metadata": lambda step: shutil.rmtree(step / "metadata"),
    "emptied step": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.usefixtures("two_saved")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(
    damage, open_store, reports, tmp_path
):
    damage(tmp_path / "run/checkpoints/2")
    store = open_store()
    state, metadata = store.restore(abstract(make_state()))
    assert_identical(state, make_state(1))
    assert metadata == {"step": 1} and store.latest_step() == 1
    [report] = reports
    assert report.startswith("checkpoint 2 is damaged (") and report.endswith("using step 1")
    assert "\n" not in report

    store.save(2, make_state(3), {"step": "2 again"})
    store.wait()
    assert_identical(store.restore(abstract(make_state()))[0], make_state(3))
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"1", "2", "damaged-2"}


@pytest.mark.usefixtures("two_saved")
@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_damage_to_any_file_is_found_or_harmless(damage, open_store, tmp_path):
    step = tmp_path / "run/checkpoints/2"
    shutil.copytree(step, tmp_path / "intact")
    for path in files(step):
        damage(path)
        state, _ = open_store().restore(abstract(make_state()))
        assert_identical(state, make_state(int(state.step)))
        shutil.rmtree(tmp_path / "run/checkpoints")
        shutil.copytree(tmp_path / "intact", step)
        shutil.copytree(tmp_path / "intact", step.with_name("1"))


@pytest.mark.usefixtures("two_saved")
@pytest.mark.parametrize("step", range(10))
def test_metadata_of_any_other_value_are_damaged(step, tmp_path):
    path = tmp_path / "run/checkpoints/2/metadata/metadata"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document | {"metadata": {"step": step}}))
    expected = {"step": 2 if step == 2 else 1}
    assert latest_metadata(tmp_path / "run") == expected


def fingerprint_reference(x):
    """MurmurHash3's finaliser of each 32-bit word and its flat position, summed."""
    words = x.ravel().view(f"u{min(x.dtype.itemsize, 4)}").astype(np.uint64)
    words += np.arange(words.size, dtype=np.uint64) * np.uint64(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words &= np.uint64(0xFFFFFFFF)
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    words &= np.uint64(0xFFFFFFFF)
    return int((words ^ (words >> np.uint64(16))).sum()) % 2**32


@pytest.mark.usefixtures("two_saved")
def test_a_checkpoint_is_proved_as_by_every_version(tmp_path):
    """One that an earlier version wrote would else be set aside as damaged."""
    document = json.loads((tmp_path / "run/checkpoints/2/metadata/metadata").read_bytes())
    checksum = document.pop("checksum")
    assert checksum == zlib.crc32(json.dumps(document, sort_keys=True).encode())
    for path, x in jax.tree_util.tree_flatten_with_path(make_state(2))[0]:
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert document["fingerprints"][name] == fingerprint_reference(np.asarray(x)), name


@pytest.mark.usefixtures("two_saved")
def test_damaged_metadata_are_passed_over(tmp_path):
    flip(tmp_path / "run/checkpoints/2/metadata/metadata")
    assert latest_metadata(tmp_path / "run") == {"step": 1}


@pytest.mark.usefixtures("two_saved")
def test_nothing_is_moved_if_none_is_intact(open_store, tmp_path):
    for step in (1, 2):
        flip(files(tmp_path / f"run/checkpoints/{step}/state")[-1])
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact \(step 2: .*; step 1: "):
        open_store().restore(abstract(make_state()))
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"1", "2"}


@pytest.mark.usefixtures("two_saved")
def test_a_checkpoint_of_another_model_is_refused_and_left_alone(open_store, tmp_path):
    with pytest.raises(UserError, match=r"params/head/bias: float32\[64\] in the checkpoint, "):
        open_store().restore(abstract(make_state(width=32)))
    with pytest.raises(UserError, match="ema_params/cls: .* in the checkpoint, absent now"):
        open_store().restore(abstract(make_state().replace(ema_params=None)))
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"1", "2"}


def test_the_best_takes_the_place_of_the_best_before_it(open_store, tmp_path):
    store = open_store()
    for step in (1, 4, 8):
        store.save_best(step, make_state(step), {"step": step})
    store.close()
    assert [p.name for p in (tmp_path / "run/best").iterdir()] == ["8"]
    # A resumed run may be at an earlier step than the best of the run that was killed.
    store = open_store()
    store.save_best(8, make_state(0), {"step": 8})
    store.save_best(6, make_state(6), {"step": 6})
    store.close()
    assert [p.name for p in (tmp_path / "run/best").iterdir()] == ["6"]
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize("name", ["flipped data", "removed metadata", "emptied step"])
def test_a_damaged_best_is_replaced(name, open_store, tmp_path):
    store = open_store()
    store.save_best(2, make_state(2), {"step": 2})
    store.close()
    DAMAGES[name](tmp_path / "run/best/2")
    store = open_store()
    store.save_best(2, make_state(2), {"step": "2 again"})
    store.close()
    state, metadata = read_state(tmp_path / "run/best/2", abstract(make_state()))
    assert_identical(state, make_state(2))
    assert metadata == {"step": "2 again"}
    assert [p.name for p in (tmp_path / "run/best").iterdir()] == ["2"]


def test_one_too_many_after_a_kill_is_removed_when_the_run_goes_on(open_store, tmp_path):
    store = open_store(keep=3)
    for step in (1, 2, 3):
        store.save(step, make_state(step), {})
    store.close()
    open_store(keep=2).restore(abstract(make_state()))
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"2", "3"}


@pytest.mark.usefixtures("two_saved")
def test_the_one_that_is_used_is_never_one_too_many(open_store, tmp_path):
    flip(files(tmp_path / "run/checkpoints/2/state")[-1])
    state, _ = open_store(keep=1).restore(abstract(make_state()))
    assert_identical(state, make_state(1))
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"1", "damaged-2"}


def run_python(code, *arguments, devices=1):
    """Starts Python on `code`, with this file imported as `t`."""
    here = pathlib.Path(__file__)
    imports = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import test_training as t"
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {"PATH": "", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", f"{imports}\n{code}", *map(str, arguments)],
        cwd=here.parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SAVE_AND_RESTORE_ON_EIGHT_DEVICES = """
import numpy as np, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("data",))
shard = lambda x: NamedSharding(mesh, P("data") if x.shape[:1] == (64,) else P())
store = t.CheckpointStore(sys.argv[1], keep=2)
restored, _ = store.restore(t.abstract(t.make_state(1)))
t.assert_identical(restored, t.make_state(1))
state = jax.tree.map(lambda x: jax.device_put(x, shard(x)), t.make_state(2))
store.save(2, state, {})
store.wait()
wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
restored, _ = store.restore(wanted)
t.assert_identical(restored, state)
assert restored.params["head"]["kernel"].sharding == shard(np.zeros((64, 64)))
store.close()
"""


def test_states_move_between_device_counts_and_shardings(open_store, tmp_path):
    store = open_store()
    store.save(1, make_state(1), {})
    store.close()
    process = run_python(SAVE_AND_RESTORE_ON_EIGHT_DEVICES, tmp_path / "run", devices=8)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    wanted = abstract(make_state(), NamedSharding(mesh, PartitionSpec()))
    restored, _ = open_store().restore(wanted)
    assert_identical(restored, make_state(2))


SAVE_UNTIL_KILLED = """
store = t.CheckpointStore(sys.argv[1], keep=2)
state = t.make_state(2, width=3072)
store.save(3, state, {})
print("saving", flush=True)
store.wait()
print("saved", flush=True)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(open_store, tmp_path):
    store, state = open_store(), make_state(1, width=3072)
    store.save(1, state, {})
    store.close()
    process = run_python(SAVE_UNTIL_KILLED, tmp_path / "run")
    assert process.stdout.readline() == "saving\n"
    process.kill()
    assert "saved" not in process.communicate()[0]
    directory = tmp_path / "run/checkpoints"
    assert [p.name for p in directory.iterdir() if "tmp" in p.name]
    restored, _ = open_store().restore(abstract(state))
    assert_identical(restored, state)
    assert [p.name for p in directory.iterdir()] == ["1"]


@contextlib.contextmanager
def small_disk(path):
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_one_line_and_the_one_before_survives(open_store, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        store = open_store(disk / "run")
        small = make_state(1, width=8)
        store.save(1, small, {})
        store.wait()
        store.save(2, make_state(2, width=1024), {})
        with pytest.raises(UserError, match="no space left on device; .* last good one is step 1"):
            store.wait()
        assert_identical(open_store(disk / "run").restore(abstract(small))[0], small)


def test_a_save_that_failed_is_raised_by_the_next_one(open_store, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        store = open_store(disk / "run")
        store.save(1, make_state(1, width=1024), {})
        with pytest.raises(UserError, match=r"no space left on device; .* \(none is saved yet\)"):
            store.save(2, make_state(2, width=8), {})


def test_a_file_size_limit_is_one_line(open_store):
    store = open_store()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        store.save(1, make_state(1, width=1024), {})
        with pytest.raises(UserError, match="file too large; free space or choose another"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_read_only_workdir_is_one_line(open_store, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        remount = ["mount", "-o", "remount,ro", str(disk)]
        subprocess.run(remount, check=True, capture_output=True)
        with pytest.raises(UserError, match="read-only file system; free space or choose another"):
            open_store(disk / "run")


def test_configs_are_compared_leaf_by_leaf():
    saved = {"optimizer": {"base_lr": 0.03, "name": "sgd"}, "size": [1, 2], "old": 1, "empty": {}}
    current = {
        "optimizer": {"base_lr": 0.01, "name": "sgd"}, "size": (1, 2), "new": None, "empty": {}
    }  # fmt: skip
    assert config_differences(saved, current) == [
        "new: absent in the checkpoint, None now",
        "old: 1 in the checkpoint, absent now",
        "optimizer.base_lr: 0.03 in the checkpoint, 0.01 now",
    ]


def test_ignored_names_cover_what_is_below_them_but_not_longer_names():
    saved = {"log": {"every": 1}, "log_dir": "a", "size": 1}
    current = {"log": {"every": 2}, "log_dir": "b", "size": 2}
    assert config_differences(saved, current, {"log", "size"}) == [
        "log_dir: a in the checkpoint, b now"
    ]
