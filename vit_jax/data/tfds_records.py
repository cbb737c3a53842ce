"""Examples of a data set that TFDS has prepared, each read without the others and TensorFlow."""

import bisect
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format, message
from tensorflow_datasets.core.example_parser import ExampleParserNp

from vit_jax.data.source import Example
from vit_jax.data.tfrecord import damaged, read_record, record_offsets, unreadable
from vit_jax.errors import UserError, first_line

# What comes of documents and records that are not as TFDS writes them.
MALFORMED = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(OSError, ImportError, RuntimeError, json_format.Error, message.Error),
)


class RecordExamples:
    """The examples of a split. An id is what TFDS calls it: the file's name and the place in it."""

    def __init__(
        self,
        info: tfds.core.DatasetInfo,
        split: str,
        features: Mapping[str, Any],
        example: Callable[[Mapping[str, Any]], Example],
    ):
        """Looks up where the examples are; reads nothing.

        Args:
            info: of the data set.
            split: in the syntax of TFDS.
            features: that are wanted, nested as in `info.features`, each with True.
            example: makes the image, as bytes, and the label of these features.

        Raises:
            ValueError: there is no such split, or it is empty.
            UserError: the files are of a format that cannot be read.
        """
        self._parts = info.splits[split].file_instructions
        if not self._parts:
            raise ValueError("it selects no image")
        self._starts = [0, *itertools.accumulate(_take(part) for part in self._parts)]
        # TFDS's own PartialDecoding imports TensorFlow.
        specs = {name: info.features[name].get_serialized_info() for name in features}
        self._parser = ExampleParserNp(_pick(specs, features))
        self._example = example
        self._files = _open_files(info, {part.filename: part for part in self._parts})

    def __len__(self) -> int:
        """Returns the number of examples."""
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        """Reads one.

        Raises:
            UserError: its file is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._starts, index) - 1
        part = self._parts[which]
        place = part.skip + index - self._starts[which]
        record = self._files[part.filename].read(place)
        try:
            example = self._example(self._parser.parse_example(record))
            if not isinstance(example["image"], bytes):
                raise ValueError("it has no image")
        except MALFORMED as error:
            reason = f"record {place} is damaged ({first_line(error)})"
            raise damaged(part.filename, reason) from error
        return example | {"id": _id(part, place)}

    def ids(self) -> list[str]:
        """Returns the ids of all."""
        return [
            _id(part, place)
            for part in self._parts
            for place in range(part.skip, part.skip + _take(part))
        ]


def _pick(specs: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: specs[name] if inner is True else _pick(specs[name], inner)
        for name, inner in wanted.items()
    }


def _take(part: Any) -> int:
    return part.take if part.take >= 0 else part.examples_in_shard - part.skip


def _id(part: Any, place: int) -> str:
    return f"{os.path.basename(part.filename)}__{place}"


def _open_files(info: tfds.core.DatasetInfo, parts: Mapping[str, Any]) -> dict[str, Any]:
    file_format = info.file_format or tfds.core.FileFormat.TFRECORD  # Old ones do not say.
    formats = {
        tfds.core.FileFormat.TFRECORD: _TFRecordFile,
        tfds.core.FileFormat.ARRAY_RECORD: _ArrayRecordFile,
    }
    if file_format not in formats:
        known = " or ".join(x.value for x in formats)
        raise UserError(
            f"data set {info.full_name!r} is stored as {file_format}: prepare it as {known}"
        )
    return {
        name: formats[file_format](name, part.examples_in_shard) for name, part in parts.items()
    }


class _TFRecordFile:
    def __init__(self, path: str, count: int):
        self._path = str(path)
        self._count = count
        self._offsets: np.ndarray | None = None

    def read(self, place: int) -> bytes:
        # Of several threads that come here first each makes the index, the same one.
        if self._offsets is None:
            offsets = record_offsets(self._path)
            _check_count(self._path, len(offsets) - 1, self._count)
            self._offsets = offsets
        begin, end = self._offsets[place : place + 2].tolist()
        return read_record(self._path, begin, end)


class _ArrayRecordFile:
    def __init__(self, path: str, count: int):
        self._path = str(path)
        self._count = count
        self._reader: Any = None

    def __getstate__(self) -> dict[str, Any]:  # A worker process opens it anew.
        return {**self.__dict__, "_reader": None}

    def read(self, place: int) -> bytes:
        # ty finds nothing in a compiled module.
        from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
            ArrayRecordReader,
        )

        with unreadable(self._path):
            os.stat(self._path)  # The reader's own message for a missing file is a stack of them.
        try:
            if self._reader is None:
                reader = ArrayRecordReader(self._path, options="readahead_buffer_size:0")
                _check_count(self._path, reader.num_records(), self._count)
                self._reader = reader
            (record,) = self._reader.read([place])
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise damaged(self._path, f"record {place} is damaged") from error
        return record


def _check_count(path: str, found: int, expected: int) -> None:
    if found != expected:
        raise damaged(path, f"it has {found:,} records, not {expected:,}")
