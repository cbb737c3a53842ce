import json
import os

import pytest

from vit_jax.errors import UserError
from vit_jax.files import atomic_write, write_json


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": "Löwe"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "Löwe"}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="no/such.json cannot be written: folder .*no does not"):
        write_json(tmp_path / "no/such.json", {})


def test_what_is_interrupted_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(UserError, match="No space left on device; free the disk"),
        atomic_write(tmp_path / "a.txt"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert not os.listdir(tmp_path)


def test_numbers_that_are_not_finite_are_null_for_every_reader(tmp_path):
    path = tmp_path / "parity.json"
    write_json(path, {"hops": [{"max": float("nan"), "cosine": float("inf"), "mean": 0.5}]})

    def refuse(text):
        raise ValueError(text)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"hops": [{"max": None, "cosine": None, "mean": 0.5}]}
