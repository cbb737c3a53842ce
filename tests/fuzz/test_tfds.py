"""A folder that TFDS has prepared, or somebody else: its documents, records and offsets."""

import contextlib
import importlib
import io
import json
import struct
import sys

import google_crc32c
import numpy as np
import pytest
from hypothesis import strategies as st

from vit_jax.data.datasets import open_evaluation
from vit_jax.errors import UserError

from .conftest import put
from .mutations import JSON, NUMBERS, message, mutated, mutated_json
from .test_images import COLOR, encode

FOLDER = "toy/1.0.0/"
RECORDS = f"{FOLDER}toy-train.tfrecord-00000-of-00001"
OFFSETS = f"{FOLDER}.offsets/toy-train.tfrecord-00000-of-00001.npy"
CLASSES = ("a", "b", "c")
INFO = {
    "fileFormat": "tfrecord",
    "moduleName": "__main__",
    "name": "toy",
    "splits": [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": "train",
            "numBytes": "1000",
            "shardLengths": ["2"],
        }
    ],
    "version": "1.0.0",
}
CORE = "tensorflow_datasets.core.features"
FEATURES = {
    "featuresDict": {
        "features": {
            "image": {
                "image": {
                    "dtype": "uint8",
                    "encodingFormat": "png",
                    "shape": {"dimensions": ["-1", "-1", "3"]},
                },
                "pythonClassName": f"{CORE}.image_feature.Image",
            },
            "label": {
                "classLabel": {"numClasses": "3"},
                "pythonClassName": f"{CORE}.class_label_feature.ClassLabel",
            },
        }
    },
    "pythonClassName": f"{CORE}.features_dict.FeaturesDict",
}
VALUES = st.one_of(
    st.sampled_from(
        [
            *("../toy", "/etc/passwd", "{DATASET}", "array_record", "riegeli", "antigravity.a"),
            *("this.zen", "os.path", "train[:1]", ["2", "3"], ["-1"], ["9" * 30], "1", "0"),
        ]
    ),
    JSON,
)


def example(image, label):
    """A record of TensorFlow's, with its checksums."""
    features = {"image": message((1, image)), "label": message((1, bytes([label])))}
    kinds = {"image": 1, "label": 3}
    entries = [(1, message((1, n), (2, message((kinds[n], x))))) for n, x in features.items()]
    return message((1, message(*entries)))


def checksum(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data):
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def saved(numbers):
    file = io.BytesIO()
    np.save(file, np.array(numbers))
    return file.getvalue()


EXAMPLES = [example(encode(COLOR, "PNG"), 0), example(encode(COLOR, "PNG"), 2)]
FILES = {
    f"{FOLDER}dataset_info.json": json.dumps(INFO).encode(),
    f"{FOLDER}features.json": json.dumps(FEATURES).encode(),
    f"{FOLDER}label.labels.txt": "\n".join(CLASSES).encode(),
    RECORDS: b"".join(map(record, EXAMPLES)),
}


@st.composite
def folders(draw):
    match draw(st.sampled_from(["info", "features", "labels", "file", "example", "offsets"])):
        case "info":
            return FILES | {f"{FOLDER}dataset_info.json": draw(mutated_json(INFO, VALUES))}
        case "features":
            return FILES | {f"{FOLDER}features.json": draw(mutated_json(FEATURES, VALUES))}
        case "labels":
            name = f"{FOLDER}label.labels.txt"
            return FILES | {name: draw(mutated(FILES[name]))}
        case "file":
            return FILES | {RECORDS: draw(mutated(FILES[RECORDS]))}
        case "example":  # Its checksums are right.
            return FILES | {RECORDS: record(EXAMPLES[0]) + record(draw(mutated(EXAMPLES[1])))}
        case "offsets":
            end = len(FILES[RECORDS])
            numbers = st.one_of(NUMBERS, st.integers(-2, end + 2)).map(lambda x: min(x, 2**63 - 1))
            offsets = draw(st.lists(numbers, min_size=0, max_size=6))
            return FILES | {OFFSETS: draw(st.one_of(st.just(saved(offsets)), mutated(saved([0]))))}


def read(folder):
    source = open_evaluation("toy", data_dir=str(folder), split="train")
    assert source.num_examples > 0
    for index in {0, min(1, source.num_examples - 1), source.num_examples - 1}:
        found = source[index]
        assert isinstance(found["image"], bytes)
        assert -1 <= int(found["label"]) < len(source.class_names)


def test_tfds(fuzz):
    # TFDS asks it about numbers of an unknown type, and its import sets variables.
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorflow")
    fuzz("tfds", folders(), read, sound=[FILES])


def refused(folder, name, content):
    """The error to the data set with another file."""
    put(FILES | {name: content}, folder, "")
    with pytest.raises(UserError) as error:
        read(folder)
    return str(error.value)


def test_a_module_that_features_name_is_not_imported(tmp_path):
    hostile = json.dumps(FEATURES).replace(f"{CORE}.class_label_feature.", "antigravity.")
    error = refused(tmp_path, f"{FOLDER}features.json", hostile.encode())
    assert "has a feature of 'antigravity.ClassLabel', which is none of TFDS" in error
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([EXAMPLES[0], example(encode(COLOR, "PNG"), 7)], "record 1 is damaged (its label is 7)"),
        ([EXAMPLES[0], message((1, b""))], "record 1 is damaged"),
        (EXAMPLES[:1], "it has 1 records, not 2"),
    ],
)
def test_a_record_that_is_none_of_the_data_set_is_named(records, reason, tmp_path):
    assert reason in refused(tmp_path, RECORDS, b"".join(map(record, records)))


def test_names_and_classes_are_as_many(tmp_path):
    error = refused(tmp_path, f"{FOLDER}label.labels.txt", b"a\nb")
    assert error == "data set 'toy' names 2 classes and has 3: prepare it again"


@pytest.mark.parametrize("offsets", [[0, -1], [0, 2**62], [5, 9], [0, 16, 8]])
def test_offsets_of_somebody_else_are_made_anew(offsets, tmp_path):
    put(FILES, tmp_path, "")
    file = tmp_path / RECORDS
    status = file.stat()
    (tmp_path / OFFSETS).parent.mkdir()
    forged = [status.st_size, status.st_mtime_ns, *offsets, status.st_size]
    (tmp_path / OFFSETS).write_bytes(saved(forged))
    read(tmp_path)
    assert np.load(tmp_path / OFFSETS).tolist() != forged
