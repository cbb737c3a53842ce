import os
import resource

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from vit_jax.checkpoints.arrays import read_arrays
from vit_jax.checkpoints.formats.npz import write_npz
from vit_jax.checkpoints.formats.safetensors import write_safetensors
from vit_jax.errors import UserError

from ..array_files import assert_equal, example

WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_is_written_is_read_again(tmp_path, suffix):
    arrays = example() | {"file": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))}
    WRITERS[suffix](tmp_path / f"a{suffix}", arrays)
    assert_equal(read_arrays(tmp_path / f"a{suffix}"), arrays)


def test_what_is_written_is_read_by_numpy_and_safetensors(tmp_path):
    arrays = example() | {"a": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))}
    write_npz(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz") as archive:
        assert_equal(dict(archive), arrays)
    write_safetensors(tmp_path / "a.safetensors", arrays)
    assert_equal(safetensors.numpy.load_file(tmp_path / "a.safetensors"), arrays)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers insists


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_arrays_make_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        WRITERS[suffix](tmp_path / f"{name}{suffix}", example())
    contents = [(tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "b")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_is_as_readable_for_others_as_any_new_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, example())
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, example())
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"a{suffix} cannot be written: .*File too large"):
            WRITERS[suffix](path, {"a": np.ones(1_000_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("write", WRITERS.values())
def test_a_missing_folder_is_one_line(tmp_path, write):
    with pytest.raises(UserError, match=r"a cannot be written: folder .*none does not exist"):
        write(tmp_path / "none/a", example())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a cannot be written: folder .*file does not exist"):
        write(tmp_path / "file/a", example())
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder cannot be written: Is a directory"):
        write(tmp_path / "folder", example())
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        write(tmp_path / ("a" * 256), example())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("write", WRITERS.values())
def test_names_that_could_not_be_read_again_are_not_written(tmp_path, write):
    with pytest.raises(UserError, match="a has arrays named ../b: a name is"):
        write(tmp_path / "a", {"../b": np.ones(1)})
    assert not os.listdir(tmp_path)
