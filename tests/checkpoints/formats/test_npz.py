import os
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from vit_jax.checkpoints.arrays import read_arrays

from ..array_files import (
    Executed,
    assert_equal,
    npy_bytes,
    npy_header,
    npz_bytes,
    refusal,
    zip_bytes,
)


@pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", "<f8", ">f8", ml_dtypes.bfloat16])
def test_other_floats_become_float32_of_the_same_value(tmp_path, dtype):
    values = np.array([[1.5, -0.25], [3.0, 65280.0]])
    (tmp_path / "a.npz").write_bytes(npz_bytes({"a": values.astype(dtype)}))
    assert_equal(read_arrays(tmp_path / "a.npz"), {"a": values.astype(np.float32)})


def test_fortran_order_becomes_c_order(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "a.npz").write_bytes(npz_bytes({"a": np.asfortranarray(values)}))
    assert_equal(read_arrays(tmp_path / "a.npz"), {"a": values})


def test_fresh_parameters_compress_to_nothing_and_are_read(tmp_path):
    zeros = np.zeros((768, 21843), np.float32)  # the head of ViT-B/16 on ImageNet-21k
    np.savez_compressed(tmp_path / "a.npz", head=zeros)
    assert (tmp_path / "a.npz").stat().st_size < 200_000
    assert_equal(read_arrays(tmp_path / "a.npz"), {"head": zeros})


def test_an_archive_behind_something_else_is_no_npz(tmp_path):
    content = b"\x7fELF" + npz_bytes({"a": np.ones(2, np.float32)})
    assert "truncated or not an .npz file" in refusal(tmp_path / "a.npz", content)


def test_pickled_objects_in_an_npz_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = npz_bytes({"head/kernel": np.array([Executed()], dtype=object)})
    assert "holds pickled Python objects" in refusal(tmp_path / "a.npz", content)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_an_archive_whose_directory_points_before_the_file_is_damaged(tmp_path):
    content = bytearray(npz_bytes({"a": np.ones(2, np.float32)}))
    at = content.rindex(b"PK\x05\x06") + 16
    content[at : at + 4] = b"\xff\xff\xff\x7f"  # the offset of the directory
    assert "is damaged (" in refusal(tmp_path / "a.npz", content)  # zipfile raises an OSError


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


def test_members_that_are_no_arrays_are_refused(tmp_path):
    for name in ("a.txt", "folder/", "a"):
        content = zip_bytes([("b.npy", npy_bytes(np.ones(1))), (name, b"")])
        assert f"holds {name}, no .npy arrays" in refusal(tmp_path / "a.npz", content)


def test_an_encrypted_archive_is_refused(tmp_path):
    content = bytearray(npz_bytes({"a": np.ones(2)}))
    content[6] |= 1  # the flags of the local header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and of the directory
    assert "a.npz is encrypted: unpack it" in refusal(tmp_path / "a.npz", content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_is_inflated_without_a_bound_is_refused(tmp_path, compression):
    content = zip_bytes([("a.npy", npy_bytes(np.ones(2)))], compression)
    assert "is compressed, but not by deflate" in refusal(tmp_path / "a.npz", content)


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
