import json
import os
import pathlib
import pickle

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from vit_jax.checkpoints.arrays import read_arrays, read_sharded

from .array_files import (
    FORMATS,
    Executed,
    assert_equal,
    example,
    npz_bytes,
    refusal,
    safetensors_bytes,
)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ["weights", "weights.pth"])
def test_a_file_is_recognized_by_its_content(tmp_path, file_format, name):
    (tmp_path / name).write_bytes(FORMATS[file_format](example()))
    assert_equal(read_arrays(tmp_path / name), example())


@pytest.mark.parametrize("file_format", FORMATS)
def test_arrays_do_not_depend_on_their_file_any_more(tmp_path, file_format):
    (tmp_path / "a").write_bytes(FORMATS[file_format](example()))
    arrays = read_arrays(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:
        file.write(bytes((tmp_path / "a").stat().st_size))
    assert_equal(arrays, example())


def save_shards(directory, weight_map=None, metadata=None):
    arrays = example()
    names = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for shard in set(names.values()):
        part = {name: x for name, x in arrays.items() if names[name] == shard}
        (directory / shard).write_bytes(safetensors.numpy.save(part))
    index = {"metadata": metadata or {}, "weight_map": names | (weight_map or {})}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_shards_are_read_together(tmp_path):
    assert_equal(read_sharded(save_shards(tmp_path, metadata={"total_size": 1})), example())


def test_a_missing_shard_is_named(tmp_path):
    path = save_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "missing: put model-00002-of-00002.safetensors there" in refusal(path, read=read_sharded)


def test_a_damaged_shard_is_named(tmp_path):
    path = save_shards(tmp_path)
    os.truncate(tmp_path / "model-00002-of-00002.safetensors", 50)
    assert "/model-00002-of-00002.safetensors is damaged" in refusal(path, read=read_sharded)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "", ".", "..", "a\\b", "a\nb", 3,
                                  ["a"], None])  # fmt: skip
def test_a_shard_outside_the_folder_is_refused(tmp_path, name):
    path = save_shards(tmp_path, {"cls": name})
    assert ": they must lie in its own folder" in refusal(path, read=read_sharded)


@pytest.mark.parametrize(
    "weight_map",
    [{"new": "model-00001-of-00002.safetensors"}, {"cls": "model-00002-of-00002.safetensors"}],
)
def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path, weight_map):
    message = refusal(save_shards(tmp_path, weight_map), read=read_sharded)
    assert f"does not agree with its shards about {next(iter(weight_map))}" in message


def test_an_array_in_two_shards_is_refused(tmp_path):
    path = save_shards(tmp_path)
    for i in (1, 2):
        shard = tmp_path / f"model-0000{i}-of-00002.safetensors"
        shard.write_bytes(safetensors.numpy.save({"cls": np.ones(1)}))
    assert "repeats cls of another shard" in refusal(path, read=read_sharded)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": {"a": "b", "a": "b"}}',
        b"[" * 100_000,
        b"1" * 10_000,
        b" " * (5 << 20),
    ],
    ids=lambda content: ascii(content[:40]),
)
def test_a_broken_index_is_one_line(tmp_path, content):
    refusal(tmp_path / "model.safetensors.index.json", content, read_sharded)


def test_a_path_without_a_file_is_one_line(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.npz")
    (tmp_path / "file").touch()
    assert "does not exist" in refusal(tmp_path / "file/none.npz")
    os.symlink("none", tmp_path / "link")
    assert "does not exist" in refusal(tmp_path / "link")
    os.symlink("loop", tmp_path / "loop")
    assert "cannot be read: Too many levels" in refusal(tmp_path / "loop")


def test_directories_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", pathlib.Path("/dev/zero")):
        assert "is a directory or a device: give a file" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused(tmp_path, content):
    assert "truncated or not an .npz file" in refusal(tmp_path / "a.npz", content)
    assert "truncated or not a .safetensors file" in refusal(tmp_path / "a.safetensors", content)
    assert "truncated or not an .npz, .safetensors" in refusal(tmp_path / "a.bin", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "is a Git LFS pointer to"),
        (b"<!DOCTYPE html>", "is a web page: fetch the file itself"),
        (b"\x89HDF\r\n\x1a\n" + bytes(32), "is an HDF5 file"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_is_often_in_the_place_of_weights_is_named(tmp_path, content, message, suffix):
    assert message in refusal(tmp_path / f"a{suffix}", content)


@pytest.mark.parametrize(
    "content",
    [npz_bytes({}), safetensors_bytes({}), safetensors_bytes({"__metadata__": {"a": "b"}})],
)
def test_a_file_without_arrays_is_refused(tmp_path, content):
    assert "holds no parameters" in refusal(tmp_path / "a", content)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin", ""])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_under_any_name_is_never_loaded(tmp_path, monkeypatch, suffix, protocol):
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / f"a{suffix}", pickle.dumps({"a": Executed()}, protocol))
    # The first two protocols have no mark to be recognized by.
    assert ("is a pickle, which may hold code" if protocol >= 2 else "or not a") in message
    assert os.listdir(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("file_format", ["torch", "legacy torch"])
def test_a_name_that_promises_plain_arrays_never_leads_into_a_pickle(tmp_path, file_format, suffix):
    message = refusal(tmp_path / f"a{suffix}", FORMATS[file_format](example()))
    assert f"is a PyTorch pickle and no {suffix} file" in message


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_cut_at_any_byte_is_refused(tmp_path, file_format):
    content = FORMATS[file_format]({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)})
    for length in range(len(content)):
        refusal(tmp_path / "a", content[:length])


@pytest.mark.parametrize("file_format", ["npz", "compressed npz", "torch"])
def test_a_flipped_bit_in_the_values_is_refused(tmp_path, file_format):
    arrays = {"a": np.random.default_rng(0).normal(size=1000).astype(np.float32)}
    content = bytearray(FORMATS[file_format](arrays))
    content[len(content) // 2] ^= 1
    assert "is damaged" in refusal(tmp_path / "a", content)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, file_format, value):
    arrays = {"head.bias": np.array([0, value], np.float32), "a": np.ones(2, np.float32)}
    assert "has NaN or infinite values in head.bias (" in refusal(
        tmp_path / "a", FORMATS[file_format](arrays)
    )
