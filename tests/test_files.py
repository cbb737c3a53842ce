import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from vit_jax.errors import UserError
from vit_jax.files import (
    atomic_files,
    atomic_folder,
    atomic_write,
    make_folder,
    storage_errors,
    write_json,
)


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


def read_all(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_when_it_is_whole_with_the_mode_of_any_other(tmp_path):
    (tmp_path / "usual").mkdir()
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "a.txt").write_text("a")
        assert not (tmp_path / "new").exists()
    assert read_all(tmp_path) == {"new/a.txt": "a"}
    assert sorted(os.listdir(tmp_path)) == ["new", "usual"]
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_takes_the_place_of_another_only_where_that_is_meant(tmp_path):
    (tmp_path / "a" / "old").mkdir(parents=True)
    with (
        pytest.raises(UserError, match="a cannot be written: Directory not empty; "),
        atomic_folder(tmp_path / "a"),
    ):
        pass
    assert (tmp_path / "a" / "old").is_dir()
    with atomic_folder(tmp_path / "a", replace=True) as folder:
        (folder / "new.txt").touch()
    assert os.listdir(tmp_path / "a") == ["new.txt"]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_folder_that_is_not_finished_leaves_the_old_one_and_no_other(tmp_path, error):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").write_text("old")
    with (
        pytest.raises((KeyboardInterrupt, UserError)) as caught,
        atomic_folder(tmp_path / "a", replace=True) as folder,
    ):
        (folder / "new.txt").touch()
        raise error
    assert read_all(tmp_path) == {"a/old.txt": "old"}
    assert os.listdir(tmp_path) == ["a"]
    if caught.type is UserError:
        assert "a cannot be written: No space left on device; free the disk" in str(caught.value)


def test_a_folder_that_cannot_take_the_old_ones_place_gives_it_back(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").write_text("old")
    rename = pathlib.Path.rename

    def refuse(path, target):
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with (
        pytest.raises(UserError, match="Input/output error"),
        atomic_folder(tmp_path / "a", replace=True),
    ):
        pass
    assert read_all(tmp_path) == {"a/old.txt": "old"}
    assert os.listdir(tmp_path) == ["a"]


def test_files_join_those_of_a_folder_all_or_none(tmp_path):
    folder = tmp_path / "made" / "here"
    with atomic_files(folder) as temporary:
        (temporary / "a.txt").write_text("a")
        (temporary / "b.txt").write_text("b")
    with atomic_files(folder) as temporary:
        (temporary / "b.txt").write_text("new")
    before = {"a.txt": "a", "b.txt": "new"}
    assert read_all(folder) == before
    with pytest.raises(KeyboardInterrupt), atomic_files(folder) as temporary:
        (temporary / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert read_all(folder) == before
    assert sorted(os.listdir(folder)) == ["a.txt", "b.txt"]


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output .*file/b cannot be made: Not a directory"):
        make_folder(tmp_path / "file" / "b")


def test_only_the_storage_errors_that_are_meant_become_a_users_error():
    for number, expected in ((28, UserError), (2, FileNotFoundError)):
        with pytest.raises(expected), storage_errors(lambda reason: f"a: {reason}", errnos={28}):
            raise OSError(number, "something")
    with (
        pytest.raises(UserError, match="^b: without a number$"),
        storage_errors(lambda reason: f"b: {reason}"),
    ):
        raise OSError("without a number")


def test_numbers_that_are_not_finite_are_null_for_every_reader(tmp_path):
    path = tmp_path / "parity.json"
    write_json(path, {"hops": [{"max": float("nan"), "cosine": float("inf"), "mean": 0.5}]})

    def refuse(text):
        raise ValueError(text)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"hops": [{"max": None, "cosine": None, "mean": 0.5}]}


def test_what_a_terminal_would_act_on_is_escaped_in_json_and_read_to_the_same(tmp_path):
    value = {"name": "\x1b]0;\x9b\u202e\udcff\U000e0041 Löwe 👨\u200d👩"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert "Löwe" in text and all(x.isprintable() or x in "\n\u200d" for x in text)


# Writes one thing in each of the three ways; says so when it is half done, and goes on by a line.
WRITER = """
import pathlib, sys
from vit_jax import files
way, path = sys.argv[1], pathlib.Path(sys.argv[2])
options = {"replace": True} if way == "atomic_folder" else {}
with getattr(files, way)(path, **options) as temporary:
    if temporary.is_dir():
        temporary /= "weights"
    with temporary.open("w") as file:
        file.write("half")
        file.flush()
        print("half", flush=True)
        sys.stdin.readline()
        file.write(" and half")
"""
WAYS = ["atomic_write", "atomic_folder", "atomic_files"]


@pytest.fixture
def start_writer(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(way):
            command = [sys.executable, "-c", WRITER, way, str(tmp_path / "out")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(process.kill)
            assert process.stdout.readline() == "half\n"
            return process

        yield start


def finish(process):
    process.communicate("go on\n")
    return process.returncode


@pytest.mark.parametrize("way", WAYS)
def test_what_a_killed_writer_leaves_goes_with_the_next_one(tmp_path, start_writer, way):
    killed = start_writer(way)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    name = "out" if way == "atomic_write" else "out/weights"
    assert not (tmp_path / name).exists()
    assert len(list(tmp_path.rglob(".*.tmp"))) == 1  # It is hidden, and known for what it is.
    assert finish(start_writer(way)) == 0
    assert read_all(tmp_path) == {name: "half and half"}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("way", WAYS)
def test_what_a_living_writer_is_at_stays(tmp_path, start_writer, way):
    slow = start_writer(way)
    assert finish(start_writer(way)) == 0
    assert len(list(tmp_path.rglob(".*.tmp"))) == 1
    assert finish(slow) == 0
    name = "out" if way == "atomic_write" else "out/weights"
    assert read_all(tmp_path) == {name: "half and half"}
    assert not list(tmp_path.rglob(".*"))


def test_files_of_others_that_look_alike_stay(tmp_path):
    names = [".out.0123abcd.tmp", ".out.old.tmp", ".other.0123abcd.tmp", ".out.0123abcd"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    with atomic_write(tmp_path / "out") as temporary:
        temporary.write_text("new")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "out"])


def test_a_folder_whose_writer_was_killed_as_it_took_anothers_place_is_not_lost(tmp_path):
    (tmp_path / "out").mkdir()
    killer = (
        "import os, pathlib, signal\n"
        "rename = pathlib.Path.rename\n"
        "def once(path, target):\n"
        "    rename(path, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path.rename = once\n"
    )
    command = [sys.executable, "-c", killer + WRITER, "atomic_folder", str(tmp_path / "out")]
    assert subprocess.run(command, input=b"\n", check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", replace=True):
        raise KeyboardInterrupt
    assert read_all(tmp_path) == {"out/weights": "half and half"}


@pytest.mark.parametrize("way", [atomic_write, atomic_folder, atomic_files])
def test_an_error_names_the_path_that_was_given(tmp_path, way):
    with pytest.raises(UserError) as error, way(tmp_path / "out") as temporary:
        raise UserError(f"{temporary} is too large")
    assert str(error.value) == f"{tmp_path / 'out'} is too large"
