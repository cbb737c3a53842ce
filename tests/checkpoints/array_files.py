"""Files of arrays, sound and hostile, and what is asserted of reading them."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile

import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax.serialization import to_bytes

from vit_jax.checkpoints.arrays import read_arrays, read_sharded
from vit_jax.errors import UserError

PEERS = "needs the peers extra: pip install -e '.[peers]'"


def import_torch():
    return pytest.importorskip("torch", reason=PEERS, exc_type=ImportError)


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


def zip_members(content):
    """The names and the contents of what is in an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


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


def legacy(pickled, key=b"0", data=b""):
    prefix = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    keys = b"\x80\x02]X\x01\x00\x00\x00" + key + b"a."
    return prefix + pickled.replace(b"tQK", b"NtQK") + keys + data


def flax_array(*parts):
    extension = msgpack.ExtType(1, msgpack.packb(parts))
    return msgpack.packb({"a": extension})


FORMATS = {
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


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def read_checked(path):
    """Reads a file whatever is in it; what comes out can be used as parameters."""
    arrays = read_arrays(path)
    for name, array in arrays.items():
        assert name.isprintable() and array.dtype == np.float32 and np.isfinite(array).all()
    return arrays


# What fuzzers begin with.
SOUND = {"a/b": np.ones((2, 3), np.float32), "c": np.arange(3, dtype=np.float32)}
