"""The harness notices what a reader must not do: each of these would be a hole in one."""

import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import strategies as st

from vit_jax.errors import UserError

from . import conftest


def swallowing(act):
    """A reader that hides behind its error what it did."""

    def read(path):
        try:
            act(path)
        except Exception as error:
            raise UserError(f"{path} is damaged: fetch it again") from error

    return read


def refuse(message):
    class Raw(UserError):
        """One that shows what it is given."""

        def __str__(self):
            return message

    def read(_):
        raise Raw("")

    return read


def spin(_):
    began = time.process_time()
    while time.process_time() - began < 0.6:
        pass


def out_of_memory(path):
    try:
        bytearray(2 << 30)
    except MemoryError as error:
        raise UserError(f"{path} does not fit in memory: use a smaller file") from error


BAD = {
    "raises": (lambda _: {}["a"], "KeyError"),
    "two lines": (refuse("a\nb"), "no printable line"),
    "escape": (refuse("a\x1b[2J"), "no printable line"),
    "exec": (swallowing(lambda _: exec("1")), "exec of <string>"),
    "eval": (swallowing(lambda _: eval("1")), "exec of <string>"),
    "pickle": (swallowing(lambda _: pickle.loads(b"cos\nmkdir\n.")), "pickle.find_class"),
    "system": (swallowing(lambda _: os.system("true")), "os.system"),
    "process": (swallowing(lambda _: subprocess.run([sys.executable])), "subprocess.Popen"),
    "network": (swallowing(lambda _: socket.create_connection(("127.0.0.1", 9))), "socket."),
    "write": (swallowing(lambda path: (path.parents[1] / "x").write_text("")), "open of "),
    "folder": (swallowing(lambda path: (path.parents[1] / "x").mkdir()), "os.mkdir of "),
    "remove": (swallowing(lambda path: os.remove(pathlib.Path(__file__))), "os.remove of "),
    "memory": (out_of_memory, "it allocates without a bound"),
    "time": (spin, "of processor time"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_reader_must_not_do_is_seen(fuzz, monkeypatch, what):
    monkeypatch.setattr(conftest, "CASE_SECONDS", 0.5)
    monkeypatch.setattr(conftest, "SECONDS", 0.1)
    read, expected = BAD[what]
    with pytest.raises(AssertionError, match=r"repeat it: FUZZ_CASE=") as caught:
        fuzz("harness", st.just(b"x"), read)
    assert expected in str(caught.value)


def test_a_case_can_be_repeated_from_what_is_printed(fuzz, monkeypatch):
    monkeypatch.setattr(conftest, "SECONDS", 0.1)

    def read(path):
        assert path.read_bytes() != b"bad"

    with pytest.raises(AssertionError) as caught:
        fuzz("harness", st.just(b"bad"), read)
    saved = str(caught.value).partition("FUZZ_CASE=")[2].split()[0]
    assert pathlib.Path(saved).read_bytes() == b"bad"
    monkeypatch.setenv("FUZZ_CASE", saved)
    with pytest.raises(AssertionError, match=r"repeat it: FUZZ_CASE="):
        fuzz("harness", st.just(b"good"), read)


def test_a_folder_of_its_own_may_be_made_and_removed(fuzz, monkeypatch):
    monkeypatch.setattr(conftest, "SECONDS", 0.1)

    def read(path):
        folder = path.parent / "temporary"
        folder.mkdir()
        (folder / "a").write_text("a")
        shutil.rmtree(folder)

    fuzz("harness", st.just(b"x"), read)


def test_a_sound_reader_passes_and_is_counted(fuzz, monkeypatch):
    monkeypatch.setattr(conftest, "SECONDS", 3)
    seen = []
    fuzz("harness", st.binary(max_size=4), lambda path: seen.append(path.read_bytes()))
    assert len(set(seen)) > 2
