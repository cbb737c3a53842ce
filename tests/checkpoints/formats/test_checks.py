import importlib.util
import io
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from vit_jax.checkpoints.arrays import read_arrays
from vit_jax.checkpoints.formats.checks import MAX_ARRAYS

from ..array_files import (
    FORMATS,
    flax_array,
    legacy,
    legacy_torch_bytes,
    npy_bytes,
    npy_header,
    refusal,
    safetensors_bytes,
    state_pickle,
    torch_archive,
    torch_bytes,
    zip_bytes,
)

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


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_array_and_a_folder_of_one_name_are_refused(tmp_path, file_format):
    x = np.ones(2, np.float32)
    content = FORMATS[file_format]({"a/b/c": x, "a/b": x, "d": x})
    assert "both an array and a folder named a/b" in refusal(tmp_path / "a", content)


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    x, y = (npy_bytes(np.full(2, v, np.float32)) for v in (1, 2))
    message = refusal(tmp_path / "a", zip_bytes([("a.npy", x), ("a.npy", y)]))
    assert "several members of one name" in message
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    content = safetensors_bytes(f"{{{entry}, {entry}}}".encode(), bytes(4))
    assert "it has one key twice" in refusal(tmp_path / "a", content)


def test_as_many_arrays_as_any_model_has_are_read_and_more_refused(tmp_path):
    one = npy_bytes(np.ones(1, np.float32))
    (tmp_path / "a").write_bytes(zip_bytes([(f"{i}.npy", one) for i in range(2000)]))
    assert len(read_arrays(tmp_path / "a")) == 2000
    content = zip_bytes([(f"{i}.npy", one) for i in range(MAX_ARRAYS + 1)])
    assert f"holds {MAX_ARRAYS + 1} arrays: at most" in refusal(tmp_path / "a", content)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    content = safetensors_bytes({str(i): entry for i in range(MAX_ARRAYS + 1)})
    assert f"holds {MAX_ARRAYS + 1} arrays: at most" in refusal(tmp_path / "a", content)


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
