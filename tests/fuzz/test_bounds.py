"""Files that would keep a reader for long, or make it allocate without an end: each is one line.

They are read in another process, with a gigabyte of memory and some seconds for each.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zipfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorstore

from vit_jax.checkpoints import integrity

from ..checkpoints.array_files import npy_bytes, npy_header, npz_bytes, zip_bytes
from .mutations import message, varint
from .test_augreg import ROW, written
from .test_engine import DESCRIPTION
from .test_models import VIT, tensors_of
from .test_onnx import model, value

SECONDS = 15

READ = """
import json, pathlib, resource, sys, time
from vit_jax.checkpoints.arrays import read_arrays, read_sharded
from vit_jax.checkpoints.augreg import read_index
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.errors import UserError
from vit_jax.export.engine import read_description
from vit_jax.export.onnx_file import read_onnx
import orbax.checkpoint
readers = {
    "npz": read_arrays, "index.json": read_sharded, "csv": read_index,
    "onnx": read_onnx, "engine": lambda path: read_description(pathlib.Path(path)),
    "model": load_pretrained,
}
for path in sys.argv[1:]:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))
    began = time.process_time()
    try:
        readers[path.partition(".")[2]](path)
        said = ""
    except UserError as error:
        said = str(error)
    print(json.dumps([said, time.process_time() - began]), flush=True)
"""


def vit(**others):
    """The names of a small ViT of one layer."""
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    arrays = {
        "embedding/kernel": np.ones((4, 4, 3, 8), np.float32),
        query: np.ones((8, 2, 4), np.float32),
        "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": np.ones((8, 16), np.float32),
        "Transformer/posembed_input/pos_embedding": np.ones((1, 4, 8), np.float32),
    }
    return arrays | others


def empty_layers(name, count):
    return {name.format(i): np.ones(1, np.float32) for i in range(count)}


def large_directory():
    """An archive whose directory has one entry very often."""
    content = zip_bytes([("a.npy", npy_bytes(np.ones(1, np.float32)))])
    at, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    directory = content[at:end] * 200_000
    return content[:at] + directory + struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), at, 0
    )  # fmt: skip


def long_headers():
    """3,000 arrays, each of whose headers is parsed for milliseconds."""
    header = npy_header("<f4", (1,) * 3200)
    members = [(f"{i}.npy", header) for i in range(3000)]
    return zip_bytes(members, zipfile.ZIP_DEFLATED)


def zeros():
    """240 MiB of zeros in an archive that is a thousandth of that."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy_header("<f4", (60 << 20,)))
        for _ in range(60):
            member.write(bytes(4 << 20))
    return buffer.getvalue()


def onnx_of(*fields):
    return message((1, 8), (7, message(*fields)))


FILES = {
    "layers.model": lambda: npz_bytes(
        vit() | empty_layers("Transformer/encoderblock_{}/x", 9000)
    ),
    "timm layers.model": lambda: npz_bytes(
        empty_layers("blocks.{}.norm1.weight", 2000) | tensors_of(VIT, "timm")
    ),
    "units.model": lambda: npz_bytes(
        vit(**{"conv_root/kernel": np.ones((7, 7, 3, 64), np.float32)})
        | empty_layers("block1/unit{}/conv1/kernel", 2000)
    ),
    "stacked.model": lambda: safetensors.numpy.save(
        vit(**{"Transformer/encoderblock/x": np.ones((1 << 20, 1), np.float32)})
    ),
    "stacked without values.model": lambda: safetensors.numpy.save(
        vit(**{"Transformer/encoderblock/x": np.ones((1 << 40, 0), np.float32)})
    ),
    "positions without values.model": lambda: safetensors.numpy.save(
        vit(**{"Transformer/posembed_input/pos_embedding": np.ones((1, 1 << 40, 0), np.float32)})
    ),
    "directory.npz": large_directory,
    "headers.npz": long_headers,
    "number.onnx": lambda: b"\xff" * (8 << 20) + b"\x01",
    "sizes.onnx": lambda: onnx_of((5, message((1, (b"\xff" * 9 + b"\x01") * 400_000), (2, 1)))),
    "device.onnx": lambda: model(location="/dev/zero"),
    "device in the folder.onnx": lambda: model(location="zero"),
    "fields.onnx": lambda: onnx_of((5, varint(8 << 3) + b"\x00" + b"\x40\x00" * 1_100_000)),
    "shape.onnx": lambda: onnx_of((11, value("x", 1, [1] * 10_000))),
    "description.engine": lambda: b"plan",
    "rows.csv": lambda: written([ROW]) + b",,,,,,,,\n" * 300_000,
}  # fmt: skip


def declare(step, name, shape):
    """Changes the shape of an array of a checkpoint, of which the rest is then not stored."""
    store = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": f"file://{step / 'state'}/"}
    ).result()
    key = f"{name}/.zarray"
    entry = json.loads(store.read(key).result().value)
    store.write(
        key, json.dumps(entry | {"shape": shape, "chunks": [1 << 20] * 2}).encode()
    ).result()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What is said of each file, and after how many seconds."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = [folder / name for name in FILES]
    for path in paths:
        path.write_bytes(FILES[path.name]())
    os.symlink("/dev/zero", folder / "zero")
    description = json.dumps(DESCRIPTION | {"x": "y" * (5 << 20)})
    (folder / "engine.json").write_text(description)

    shards, content = {letter: f"{letter}.npz" for letter in "abc"}, zeros()
    for letter, shard in shards.items():
        (folder / shard).write_bytes(content.replace(b"a.npy", f"{letter}.npy".encode()))
    index = folder / "shards.index.json"
    index.write_text(json.dumps({"weight_map": shards}))

    step = folder / "checkpoint.model"
    state = {"params": {"a": np.ones((2, 3), np.float32)}, "rng": jax.random.key(0)}
    handler = ocp.CompositeCheckpointHandler(**integrity.item_handlers())
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(step, args=integrity.items(state, {"config": None}))
    declare(step, "params.a", [1 << 20, 1 << 20])

    paths += [index, step]
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=20 * SECONDS,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: outcome for path, outcome in zip(paths, lines, strict=True)}


EXPECTED = {
    "layers.model": "name 9000 layers: a layer has 9 arrays or more",
    "timm layers.model": "name 2000 layers: a layer has 9 arrays or more",
    "units.model": "name 2001 layers: a layer has 9 arrays or more",
    "stacked.model": "stacks 1048576 layers",
    "stacked without values.model": "stacks 1099511627776 layers",
    "positions without values.model": "no values in Transformer/posembed_input/pos_embedding",
    "directory.npz": "its directory would take",
    "headers.npz": "the headers of its arrays take more than",
    "number.onnx": "no protocol buffer at byte",
    "sizes.onnx": "a weight has 64 dimensions or more",
    "device.onnx": "has weights in '/dev/zero': they must lie in its own folder",
    "device in the folder.onnx": "has weights in 'zero': they must lie in its own folder",
    "fields.onnx": "it has more than",
    "shape.onnx": "has no type and shape",
    "description.engine": "larger than 4 MiB",
    "rows.csv": "more than 250000 rows",
    "shards.index.json": "bytes of arrays, and at most",
    "checkpoint.model": "bytes of arrays, and at most",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_takes_no_more_than_its_size_allows(outcomes, name):
    said, seconds = outcomes[name]
    assert EXPECTED[name] in said and said.isprintable()
    assert seconds < SECONDS


def test_every_file_is_expected():
    assert EXPECTED.keys() - FILES.keys() == {"shards.index.json", "checkpoint.model"}
    assert FILES.keys() <= EXPECTED.keys()
