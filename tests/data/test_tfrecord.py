"""TFRecord files against TensorFlow, which writes and reads them."""

import os
import struct

import numpy as np
import pytest
import tensorflow as tf

from vit_jax.data import tfrecord
from vit_jax.data.tfrecord import read_record, record_offsets
from vit_jax.errors import UserError

RECORDS = [
    np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    for size in (0, 1, 7, 100_000, 12, 5_000)
]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = str(tmp_path / "data" / "x.tfrecord-00000-of-00001")
    with tf.io.TFRecordWriter(path) as writer:
        for record in RECORDS:
            writer.write(record)
    return path


def read(path):
    offsets = record_offsets(path).tolist()
    return [read_record(path, begin, end) for begin, end in zip(offsets, offsets[1:], strict=False)]


def test_records_are_those_that_tensorflow_wrote(path):
    assert read(path) == list(tf.data.TFRecordDataset(path).as_numpy_iterator()) == RECORDS
    assert read(path) == RECORDS  # by the index


def test_a_file_without_records(tmp_path):
    (tmp_path / "empty").touch()
    assert record_offsets(str(tmp_path / "empty")).tolist() == [0]


def forbid(monkeypatch):
    def scan(path, size):  # noqa: ARG001
        raise AssertionError(f"{path} is scanned")

    monkeypatch.setattr(tfrecord, "_scan", scan)


@pytest.mark.parametrize("writable", [True, False])
def test_a_file_is_scanned_once_wherever_the_index_lies(path, tmp_path, monkeypatch, writable):
    if not writable:  # A file where the folder would be: that stops root as well.
        (tmp_path / "data" / ".offsets").touch()
    before = record_offsets(path)
    assert (tmp_path / "cache").exists() != writable
    forbid(monkeypatch)
    np.testing.assert_array_equal(record_offsets(path), before)


@pytest.mark.parametrize("change", ["size", "time", "index"])
def test_an_index_of_what_was_there_before_does_not_count(path, tmp_path, change):
    record_offsets(path)
    (index,) = (tmp_path / "data" / ".offsets").iterdir()
    status = os.stat(path)
    if change == "index":
        index.write_bytes(index.read_bytes()[:-9])
        assert read(path) == RECORDS
        return
    with tf.io.TFRecordWriter(path) as writer:
        for record in RECORDS[::-1] if change == "time" else RECORDS[:3]:
            writer.write(record)
    nanoseconds = status.st_mtime_ns + (change == "time")
    os.utime(path, ns=(nanoseconds, nanoseconds))
    assert read(path) == (RECORDS[::-1] if change == "time" else RECORDS[:3])


def test_no_place_for_the_index_is_no_mistake(path, tmp_path, monkeypatch):
    (tmp_path / "data" / ".offsets").touch()
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "file"))
    assert read(path) == RECORDS


@pytest.mark.parametrize("where", ["length", "its checksum", "data", "checksum", "cut off"])
def test_every_damage_is_one_line_that_names_the_file(path, where):
    offsets = record_offsets(path).tolist()
    begin, end = offsets[3:5]
    with open(path, "r+b") as file:
        content = file.read()
        place = {"length": begin, "its checksum": begin + 8, "data": begin + 5_000}
        place = place.get(where, end - 1)
        if where == "cut off":
            file.truncate(place)
        else:
            file.seek(place)
            file.write(bytes([content[place] ^ 4]))
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match=f"the data cannot be read: {path}: .*; restore") as error:
        read(path)
    assert f"at byte {begin}" in str(error.value) and "\n" not in str(error.value)
    if where == "data":  # The others can be read.
        assert read_record(path, *offsets[4:6]) == RECORDS[4]


def test_a_length_beyond_all_bounds_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge"
    length = struct.pack("<Q", 2**60)
    crc = tfrecord._masked_crc(length)
    path.write_bytes(length + struct.pack("<I", crc) + bytes(100))
    with pytest.raises(UserError, match="it is cut off at byte 0"):
        record_offsets(str(path))


def test_a_file_that_has_gone_is_named(tmp_path):
    for call in (record_offsets, lambda path: read_record(path, 0, 20)):
        with pytest.raises(UserError, match="none: No such file or directory; restore the file"):
            call(str(tmp_path / "none"))
