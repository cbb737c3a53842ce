import importlib.util
import io
import json
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax.serialization import to_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit_jax.checkpoints.arrays import (
    MAX_ARRAYS,
    read_arrays,
    read_sharded,
    write_npz,
    write_safetensors,
)
from vit_jax.errors import UserError

PEERS = "needs the peers extra: pip install -e '.[peers]'"


def import_torch():
    return pytest.importorskip("torch", reason=PEERS, exc_type=ImportError)


@pytest.fixture
def torch():
    return import_torch()


def example():
    rng = np.random.default_rng(0)
    shapes = {"cls": (1, 1, 6), "head/kernel": (6, 3), "head/bias": (3,), "scale": (), "é": (2, 0)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def npz_bytes(arrays, save=np.savez):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(descr, shape, version=1):
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text


def zip_bytes(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def safetensors_bytes(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    import_torch().save(value, buffer, **options)
    return buffer.getvalue()


def legacy_torch_bytes(value):
    return torch_bytes(value, _use_new_zipfile_serialization=False)


def tensors(arrays):
    torch = import_torch()
    return {name: torch.tensor(x) for name, x in arrays.items()}


def torch_archive(data_pkl, *storages):
    numbered = [(f"archive/data/{i}", storage) for i, storage in enumerate(storages)]
    members = [("archive/data.pkl", data_pkl), ("archive/version", b"3\n"), *numbered]
    return zip_bytes(members)


KINDS = {
    "npz": npz_bytes,
    "compressed npz": lambda arrays: npz_bytes(arrays, np.savez_compressed),
    "safetensors": safetensors.numpy.save,
    "torch": lambda arrays: torch_bytes(tensors(arrays)),
    "legacy torch": lambda arrays: legacy_torch_bytes(tensors(arrays)),
    "flax": lambda arrays: to_bytes(dict(arrays)),
}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(actual[name], x, strict=True)
        assert actual[name].flags.c_contiguous and actual[name].flags.writeable


def refusal(path, content=None, read=read_arrays):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000, message
    assert str(path.parent if read is read_sharded else path) in message
    return message


# Sound files.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weights", "weights.pth"])
def test_a_file_is_recognized_by_its_content(tmp_path, kind, name):
    (tmp_path / name).write_bytes(KINDS[kind](example()))
    assert_equal(read_arrays(tmp_path / name), example())


@pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", "<f8", ">f8", ml_dtypes.bfloat16])
def test_other_floats_become_float32_of_the_same_value(tmp_path, dtype):
    values = np.array([[1.5, -0.25], [3.0, 65280.0]])
    (tmp_path / "a.npz").write_bytes(npz_bytes({"a": values.astype(dtype)}))
    assert_equal(read_arrays(tmp_path / "a.npz"), {"a": values.astype(np.float32)})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy torch"])
def test_torchs_other_floats_become_float32_of_the_same_value(tmp_path, torch, kind, dtype):
    values = np.array([[1.5, -0.25], [3.0, 65280.0]], np.float32)
    tensor = torch.tensor(values).to(getattr(torch, dtype))
    from safetensors.torch import save

    write = {"safetensors": save, "torch": torch_bytes, "legacy torch": legacy_torch_bytes}[kind]
    (tmp_path / "a").write_bytes(write({"a": tensor}))
    assert_equal(read_arrays(tmp_path / "a"), {"a": values})


def test_fortran_order_becomes_c_order(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "a.npz").write_bytes(npz_bytes({"a": np.asfortranarray(values)}))
    assert_equal(read_arrays(tmp_path / "a.npz"), {"a": values})


def test_transposed_tensors_and_parameters_are_read_as_they_look(tmp_path, torch):
    values = torch.arange(6.0).reshape(2, 3)
    state = {"a": values.T, "b": torch.nn.Parameter(values[:, 1:])}
    for write in (torch_bytes, legacy_torch_bytes):
        (tmp_path / "a").write_bytes(write(state))
        expected = {"a": values.numpy().T, "b": values.numpy()[:, 1:]}
        assert_equal(read_arrays(tmp_path / "a"), expected)


@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("write", [torch_bytes, legacy_torch_bytes])
def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path, torch, key, write):
    module = torch.nn.Linear(2, 3)
    (tmp_path / "a.pth").write_bytes(write({key: module.state_dict(), "epoch": 7}))
    expected = {name: x.numpy() for name, x in module.state_dict().items()}
    assert_equal(read_arrays(tmp_path / "a.pth"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_do_not_depend_on_their_file_any_more(tmp_path, kind):
    (tmp_path / "a").write_bytes(KINDS[kind](example()))
    arrays = read_arrays(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:
        file.write(bytes((tmp_path / "a").stat().st_size))
    assert_equal(arrays, example())


def test_fresh_parameters_compress_to_nothing_and_are_read(tmp_path):
    zeros = np.zeros((768, 21843), np.float32)  # the head of ViT-B/16 on ImageNet-21k
    np.savez_compressed(tmp_path / "a.npz", head=zeros)
    assert (tmp_path / "a.npz").stat().st_size < 200_000
    assert_equal(read_arrays(tmp_path / "a.npz"), {"head": zeros})


# Writing.


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


# Shards.


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


# What is no file of arrays.


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


def test_an_archive_behind_something_else_is_no_npz(tmp_path):
    content = b"\x7fELF" + npz_bytes({"a": np.ones(2, np.float32)})
    assert "truncated or not an .npz file" in refusal(tmp_path / "a.npz", content)


@pytest.mark.parametrize(
    "content",
    [npz_bytes({}), safetensors_bytes({}), safetensors_bytes({"__metadata__": {"a": "b"}})],
)
def test_a_file_without_arrays_is_refused(tmp_path, content):
    assert "holds no parameters" in refusal(tmp_path / "a", content)


# Code.


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickled_objects_in_an_npz_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = npz_bytes({"head/kernel": np.array([Executed()], dtype=object)})
    assert "holds pickled Python objects" in refusal(tmp_path / "a.npz", content)
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin", ""])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_under_any_name_is_never_loaded(tmp_path, monkeypatch, suffix, protocol):
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / f"a{suffix}", pickle.dumps({"a": Executed()}, protocol))
    # The first two protocols have no mark to be recognized by.
    assert ("is a pickle, which may hold code" if protocol >= 2 else "or not a") in message
    assert os.listdir(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize("write", [torch_bytes, legacy_torch_bytes])
def test_code_in_a_torch_file_is_never_executed(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / "a.pth", write({"a": Executed()}))
    assert "holds code or objects (posix.mkdir)" in message
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("write", [torch_bytes, legacy_torch_bytes])
def test_a_whole_torch_module_is_never_loaded(tmp_path, torch, write):
    message = refusal(tmp_path / "a.pth", write(torch.nn.Linear(2, 3)))
    assert "holds code or objects (torch.nn.modules.linear.Linear)" in message


def test_torchscript_is_never_loaded(tmp_path, torch):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), buffer)
    refusal(tmp_path / "a.pt", buffer.getvalue())


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_the_oldest_torch_files_tar_archives_are_never_loaded(tmp_path, monkeypatch, tar_format):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Executed())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert "is a pickle, which may hold code" in refusal(tmp_path / "a.pth", buffer.getvalue())
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("kind", ["torch", "legacy torch"])
def test_a_name_that_promises_plain_arrays_never_leads_into_a_pickle(tmp_path, kind, suffix):
    message = refusal(tmp_path / f"a{suffix}", KINDS[kind](example()))
    assert f"is a PyTorch pickle and no {suffix} file" in message


@pytest.mark.parametrize("kind", ["torch", "legacy torch"])
def test_without_torch_the_message_says_how_to_go_on(tmp_path, monkeypatch, kind):
    content = KINDS[kind](example())
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refusal(tmp_path / "a.pth", content)
    assert "pip install -e '.[peers]', or convert the file to .safetensors" in message


# Damage.


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_at_any_byte_is_refused(tmp_path, kind):
    content = KINDS[kind]({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)})
    for length in range(len(content)):
        refusal(tmp_path / "a", content[:length])


def test_an_archive_whose_directory_points_before_the_file_is_damaged(tmp_path):
    content = bytearray(npz_bytes({"a": np.ones(2, np.float32)}))
    at = content.rindex(b"PK\x05\x06") + 16
    content[at : at + 4] = b"\xff\xff\xff\x7f"  # the offset of the directory
    assert "is damaged (" in refusal(tmp_path / "a.npz", content)  # zipfile raises an OSError


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "torch"])
def test_a_flipped_bit_in_the_values_is_refused(tmp_path, kind):
    arrays = {"a": np.random.default_rng(0).normal(size=1000).astype(np.float32)}
    content = bytearray(KINDS[kind](arrays))
    content[len(content) // 2] ^= 1
    assert "is damaged" in refusal(tmp_path / "a", content)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, kind, value):
    arrays = {"head.bias": np.array([0, value], np.float32), "a": np.ones(2, np.float32)}
    assert "has NaN or infinite values in head.bias (" in refusal(
        tmp_path / "a", KINDS[kind](arrays)
    )


@pytest.mark.filterwarnings("error")
def test_values_beyond_float32_are_refused_by_name(tmp_path):
    assert "infinite values in b (as float32)" in refusal(
        tmp_path / "a", npz_bytes({"b": np.array([1e300])})
    )


@pytest.mark.parametrize(
    "values",
    [
        np.arange(3),
        np.array([1 + 2j]),
        np.array([True]),
        np.array(["text"]),
        np.array([b"text"]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, [("a", "<f2")]),
        np.zeros(2, [("a" * 5000, "<f2")]),
        np.zeros(2, "V3"),
        np.zeros(2, np.longdouble),
    ],
    ids=lambda values: str(values.dtype)[:20],
)
def test_arrays_that_are_no_floats_are_refused_by_name(tmp_path, values):
    assert "has head/bias of type " in refusal(tmp_path / "a.npz", npz_bytes({"head/bias": values}))


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bool", "uint8", "float8_e4m3fn"])
def test_tensors_that_are_no_floats_are_refused_by_name(tmp_path, torch, dtype):
    from safetensors.torch import save

    state = {"bn.num_batches_tracked": torch.zeros(2).to(getattr(torch, dtype))}
    for write in (save, torch_bytes, legacy_torch_bytes):
        message = refusal(tmp_path / "a", write(state))
        assert "num_batches_tracked of type" in message or "holds code or objects" in message


def test_what_is_no_state_dict_is_refused(tmp_path, torch):
    for write in (torch_bytes, legacy_torch_bytes):
        path = tmp_path / "a.pth"
        assert "holds no state dict" in refusal(path, write([torch.ones(2)]))
        assert "has epoch, no tensors" in refusal(path, write({"a": torch.ones(2), "epoch": 1}))
        assert "has arrays named 3: " in refusal(path, write({3: torch.ones(2)}))


# Names.


NAMES = ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\nb", "a\x1b[31m", "\u202ea", "a" * 2000]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_make_no_tree_are_refused(tmp_path, name):
    x = np.ones(2, np.float32)
    for content in (
        zip_bytes([(f"{name}.npy", npy_bytes(x))]),
        safetensors_bytes({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    ):
        assert "has arrays named " in refusal(tmp_path / "a", content)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tensors_that_make_no_tree_are_refused(tmp_path, torch, name):
    for write in (torch_bytes, legacy_torch_bytes):
        assert "has arrays named " in refusal(tmp_path / "a", write({name: torch.ones(2)}))


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_and_a_folder_of_one_name_are_refused(tmp_path, kind):
    x = np.ones(2, np.float32)
    content = KINDS[kind]({"a/b/c": x, "a/b": x, "d": x})
    assert "both an array and a folder named a/b" in refusal(tmp_path / "a", content)


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    x, y = (npy_bytes(np.full(2, v, np.float32)) for v in (1, 2))
    message = refusal(tmp_path / "a", zip_bytes([("a.npy", x), ("a.npy", y)]))
    assert "several members of one name" in message
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    content = safetensors_bytes(f"{{{entry}, {entry}}}".encode(), bytes(4))
    assert "it has one key twice" in refusal(tmp_path / "a", content)


def test_members_that_are_no_arrays_are_refused(tmp_path):
    for name in ("a.txt", "folder/", "a"):
        content = zip_bytes([("b.npy", npy_bytes(np.ones(1))), (name, b"")])
        assert f"holds {name}, no .npy arrays" in refusal(tmp_path / "a.npz", content)


def test_as_many_arrays_as_any_model_has_are_read_and_more_refused(tmp_path):
    one = npy_bytes(np.ones(1, np.float32))
    (tmp_path / "a").write_bytes(zip_bytes([(f"{i}.npy", one) for i in range(2000)]))
    assert len(read_arrays(tmp_path / "a")) == 2000
    content = zip_bytes([(f"{i}.npy", one) for i in range(MAX_ARRAYS + 1)])
    assert f"holds {MAX_ARRAYS + 1} arrays: at most" in refusal(tmp_path / "a", content)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    content = safetensors_bytes({str(i): entry for i in range(MAX_ARRAYS + 1)})
    assert f"holds {MAX_ARRAYS + 1} arrays: at most" in refusal(tmp_path / "a", content)


# Archives.


def test_an_encrypted_archive_is_refused(tmp_path):
    content = bytearray(npz_bytes({"a": np.ones(2)}))
    content[6] |= 1  # the flags of the local header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and of the directory
    assert "a.npz is encrypted: unpack it" in refusal(tmp_path / "a.npz", content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_is_inflated_without_a_bound_is_refused(tmp_path, compression):
    content = zip_bytes([("a.npy", npy_bytes(np.ones(2)))], compression)
    assert "is compressed, but not by deflate" in refusal(tmp_path / "a.npz", content)


def test_a_torch_file_that_was_compressed_again_is_refused(tmp_path, torch):
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"a": torch.zeros(1000)}))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    message = refusal(tmp_path / "a.pth", zip_bytes(members, zipfile.ZIP_DEFLATED))
    assert "was compressed, which PyTorch does not do" in message


@pytest.mark.parametrize(
    "header",
    [
        npy_header("<f4", (2**40,)),
        npy_header("<f4", (3,)),
        npy_header("<f4", (1,)),
        npy_header("<f4", (-1, -2)),
        npy_header("<f4", (2**63, 0, 2**63)),
        npy_header("<f4", (1,) * 70 + (2,)),
        npy_header("<f4", (True, 2)),
        npy_header("<f4", (2,), version=2),
        npy_header("<f4", (2,), version=3),
        npy_header("<f4", "2"),
        npy_header("no", (2,)),
        npy_header("", (2,)),
        npy_header([("a", "|O")], (2,)),
        npy_header(None, (2,)),
        npy_header("<f4", (2,))[:-20],
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100_000,
        b"\x93NUMPY\x01\x00\xff\x20" + b"(" * 9000,
        b"\x93NUMPY\x01\x00\xff\x20" + b"-" * 9000,
        b"\x93NUMPY\x01\x00\xff\x20" + b"9" * 9000,
        b"\x93NUMPY",
        b"",
    ],
    ids=lambda header: ascii(header[:60]),
)
def test_a_hostile_npy_header_is_one_line(tmp_path, header):
    content = zip_bytes([("a.npy", header + np.array([1, 2], np.float32).tobytes())])
    path = tmp_path / "a.npz"
    if b"(2,)" in header and header[6] in (1, 2) and b"<f4" in header and header[-1:] == b"\n":
        path.write_bytes(content)
        np.testing.assert_array_equal(read_arrays(path)["a"], [1, 2])
    else:
        refusal(path, content)


def test_a_long_npy_header_is_not_read_whole(tmp_path):
    path = tmp_path / "a.npz"
    header = b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * (16 << 20)
    path.write_bytes(zip_bytes([("a.npy", header)], zipfile.ZIP_DEFLATED))
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes({"a": entry()}, bytes(8), length=2**63),
        safetensors_bytes({"a": entry()}, bytes(8), length=2**64 - 1),
        safetensors_bytes({"a": entry()}, bytes(8), length=10**9),
        safetensors_bytes({"a": entry()}, bytes(8), length=10),
        safetensors_bytes({"a": entry()}, bytes(7)),
        safetensors_bytes({"a": entry()}, bytes(9)),
        safetensors_bytes({"a": entry(offsets=(0, 2**40))}, bytes(8)),
        safetensors_bytes({"a": entry(offsets=(8, 0))}, bytes(8)),
        safetensors_bytes({"a": entry(offsets=(-8, 0))}, bytes(8)),
        safetensors_bytes({"a": entry(offsets=(4, 12))}, bytes(12)),
        safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)),
        safetensors_bytes({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
        safetensors_bytes({"a": entry(shape=(2**32, 2**32, 0), offsets=(0, 0))}),
        safetensors_bytes({"a": entry(shape=(-2,))}, bytes(8)),
        safetensors_bytes({"a": entry(shape=(1.5,))}, bytes(8)),
        safetensors_bytes({"a": entry(dtype="F33")}, bytes(8)),
        safetensors_bytes({"a": entry(dtype="I64", shape=(1,))}, bytes(8)),
        safetensors_bytes({"a": entry(dtype="F4", shape=(16,))}, bytes(8)),
        safetensors_bytes({"a": 3}),
        safetensors_bytes({"__metadata__": {"a": ["b"]}}),
        safetensors_bytes(b"{" + b'"a":{' * 50_000),
        safetensors_bytes(b'{"a":' + b"[" * 100_000),
        safetensors_bytes(b'{"a":' + b"1" * 100_000),
        safetensors_bytes(b"{\xff}"),
        safetensors_bytes(b"{}" + b" " * (5 << 20)),
    ],
    ids=lambda content: ascii(content[8:68]),
)
def test_a_hostile_safetensors_header_is_one_line(tmp_path, content):
    refusal(tmp_path / "a.safetensors", content)


# Memory.

BUILD_TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%(numel)stQK\x00(%(size)st(%(stride)st\x89"
    b"ccollections\nOrderedDict\n)RtR"
)


def state_pickle(numel=2, size=(2,), stride=(1,)):
    def integers(*values):
        return b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values)

    tensor = BUILD_TENSOR % {
        b"numel": integers(numel), b"size": integers(*size), b"stride": integers(*stride)
    }  # fmt: skip
    return b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."


@pytest.mark.usefixtures("torch")
def test_the_hand_written_torch_file_is_sound(tmp_path):
    values = np.array([1.5, 2], np.float32)
    (tmp_path / "a.pth").write_bytes(torch_archive(state_pickle(), values.tobytes()))
    assert_equal(read_arrays(tmp_path / "a.pth"), {"a": values})


def legacy(pickled, key=b"0", data=b""):
    prefix = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    keys = b"\x80\x02]X\x01\x00\x00\x00" + key + b"a."
    return prefix + pickled.replace(b"tQK", b"NtQK") + keys + data


TORCH_BOMBS = {
    "bytearray": torch_archive(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "constructor": torch_archive(b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R."),
    "storage": torch_archive(state_pickle(numel=2**40, size=(2**40,)), bytes(8)),
    "storage of the next member": torch_archive(state_pickle(numel=2**20, size=(2**20,)), bytes(8)),
    "view": torch_archive(state_pickle(size=(2**30,)), bytes(8)),
    "negative": torch_archive(state_pickle(numel=-1, size=(-1,)), bytes(8)),
    "stride 0": torch_archive(state_pickle(size=(2**30,), stride=(0,)), bytes(8)),
    "legacy storage": legacy(state_pickle(2**32, (2**32,)), data=struct.pack("<q", 2**32)),
    "legacy view": legacy(state_pickle(2, (2**30,)), data=struct.pack("<q", 2) + bytes(8)),
    "legacy stride 0": legacy(
        state_pickle(2, (2**30,), (0,)), data=struct.pack("<q", 2) + bytes(8)
    ),
    # 2**60 leaves to hash, in 200 bytes.
    "tuples": torch_archive(b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s."),
    "long pickle": torch_archive(b"\x80\x02" + b"]" * (5 << 20)),
}


def deflate_bomb(nbytes, header):
    """An array of zeros."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(header)
        for _ in range(nbytes >> 24):
            member.write(bytes(1 << 24))
    return buffer.getvalue()


def with_declared_size(archive, size):
    """An archive of one member, of which the central directory declares another size."""
    at = archive.rindex(b"PK\x01\x02") + 24
    return archive[:at] + struct.pack("<I", size) + archive[at + 4 :]


def flax_array(*parts):
    extension = msgpack.ExtType(1, msgpack.packb(parts))
    return msgpack.packb({"a": extension})


@pytest.mark.parametrize(
    "content",
    [
        flax_array([2], "object", bytes(16)),
        flax_array([3], "float32", bytes(8)),
        flax_array([2], "float999", bytes(8)),
        flax_array("2", "float32", bytes(8)),
        flax_array([2], "float32"),
        msgpack.packb({"a": 1.0}),
        msgpack.packb({"a": msgpack.ExtType(9, b"x")}),
        msgpack.packb({1: 2}),
        b"\x82\xa1a\x80\xa1a\x80",
    ],
)
def test_a_hostile_flax_file_is_one_line(tmp_path, content):
    refusal(tmp_path / "a", content)


def test_bombs_are_refused_in_little_memory(tmp_path):
    nbytes = 288 << 20
    deflated = deflate_bomb(nbytes, npy_header("<f4", (nbytes // 4,)))
    small = npy_header("<f4", (6,))
    bombs = {
        "deflate": deflated,
        "directory that lies": with_declared_size(deflated, 1000),
        "directory and header that lie": with_declared_size(
            deflate_bomb(nbytes, small), len(small) + 24
        ),
        "json": safetensors_bytes(b'{"a":[' + b"{},[]," * 600_000),
        "flax lists": b"\x81\xa1a" + b"\x9f" * 100 + b"\x90" * (32 << 20),
        "flax maps": b"\x81\xa1a" + b"\x8f\xa1a" * 400 + b"\x80" * (32 << 20),
        "flax length": b"\x81\xa1a\xdd\xff\xff\xff\xff" + bytes(32 << 20),
        "flax nested": b"\x81\xa1a" + b"\xdc\x00\x20" * (8 << 20),
        "flax shape": flax_array([1 << 40, 0, 1 << 40], "float32", b""),
    }
    if importlib.util.find_spec("torch"):
        bombs |= TORCH_BOMBS
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    program = """
import pathlib, resource, sys
from vit_jax.checkpoints.arrays import read_arrays
from vit_jax.errors import UserError
try:
    import torch
except ImportError:
    pass
size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), -1))
for path in sys.argv[1:]:
    try:
        read_arrays(path)
    except UserError as error:
        print(error)
"""
    paths = [str(tmp_path / name) for name in bombs]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(path) for line, path in zip(lines, paths, strict=True))
    assert not [line for line in lines if "does not fit in memory" in line]
    assert "long pickle" not in bombs or "does not hold one small data.pkl" in lines[-1]


# Anything else.


SOUND = {"a/b": np.ones((2, 3), np.float32), "c": np.arange(3, dtype=np.float32)}
HOSTILE = [
    b"0", b"1", b"-1", b"4294967295", b"9223372036854775807", b"1e9", b"null", b"[]", b"{", b"}",
    b"<f4", b">f8", b"|O", b"<i8", b"F32", b"BF16", b"I64", b"True", b"(", b")", b",", b"'", b'"',
    b"/", b"..", b"\x00", b"\xff" * 4, b"\xff" * 8, b"\x7f", b"\n", b"PK\x01\x02", b"PK\x05\x06",
    b"h\x00", b"q\x00", b"R", b"b", b"Q", b"t", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"K\x00",
]  # fmt: skip


@st.composite
def mutated(draw, content, start=0):
    """`content` after a few cuts, flips and splices at or behind `start`."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        i, j = (draw(st.integers(min(start, len(content)), len(content))) for _ in range(2))
        match draw(st.sampled_from(["cut", "flip", "splice", "token", "drop"])):
            case "cut":
                del content[i:]
            case "flip" if i < len(content):
                content[i] ^= draw(st.integers(1, 255))
            case "splice":
                content[i:i] = content[j : j + draw(st.integers(1, 64))]
            case "token":
                content[i : i + draw(st.integers(0, 10))] = draw(st.sampled_from(HOSTILE))
            case "drop":
                del content[i : i + draw(st.integers(1, 16))]
    return bytes(content)


def mutated_members(draw, content):
    """An archive with sound checksums of which one member is mutated."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    # Of a torch file the pickle is the first.
    i = draw(st.sampled_from([0, 0, *range(len(members))]))
    name, member = members[i]
    members[i] = (name, draw(mutated(member)))
    compression = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    if any(name.endswith("data.pkl") for name, _ in members):
        compression = zipfile.ZIP_STORED
    return zip_bytes(members, compression)


@st.composite
def hostile_file(draw, kind):
    content = KINDS[kind](SOUND)
    if content.startswith(b"PK") and draw(st.booleans()):
        return mutated_members(draw, content)
    if kind == "safetensors" and draw(st.booleans()):
        length = int.from_bytes(content[:8], "little")
        header = draw(mutated(content[8 : 8 + length]))
        return safetensors_bytes(header, content[8 + length :])
    return draw(mutated(content, 15 if kind == "legacy torch" else 0))


EXAMPLES = 150


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES, deadline=5000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_file_holds_reading_it_gives_arrays_or_one_line(tmp_path, kind, data):
    if "torch" in kind:
        import_torch()
    path = tmp_path / "a"
    path.write_bytes(data.draw(hostile_file(kind)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            arrays = read_arrays(path)
        except UserError as error:
            message = str(error)
            assert message.isprintable() and str(path) in message
            assert "does not fit in memory" not in message
            return
    for name, array in arrays.items():
        assert name and array.dtype == np.float32 and np.isfinite(array).all()
