import io
import os
import pickle
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from vit_jax.checkpoints.arrays import read_arrays

from ..array_files import (
    FORMATS,
    Executed,
    assert_equal,
    example,
    legacy_torch_bytes,
    refusal,
    state_pickle,
    torch_archive,
    torch_bytes,
    zip_bytes,
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("file_format", ["safetensors", "torch", "legacy torch"])
def test_torchs_other_floats_become_float32_of_the_same_value(tmp_path, torch, file_format, dtype):
    values = np.array([[1.5, -0.25], [3.0, 65280.0]], np.float32)
    tensor = torch.tensor(values).to(getattr(torch, dtype))
    from safetensors.torch import save

    writers = {"safetensors": save, "torch": torch_bytes, "legacy torch": legacy_torch_bytes}
    (tmp_path / "a").write_bytes(writers[file_format]({"a": tensor}))
    assert_equal(read_arrays(tmp_path / "a"), {"a": values})


def test_transposed_tensors_and_parameters_are_read_as_they_look(tmp_path, torch):
    values = torch.arange(6.0).reshape(2, 3)
    state = {"a": values.T, "b": torch.nn.Parameter(values[:, 1:])}
    for write in (torch_bytes, legacy_torch_bytes):
        (tmp_path / "a").write_bytes(write(state))
        expected = {"a": values.numpy().T, "b": values.numpy()[:, 1:]}
        assert_equal(read_arrays(tmp_path / "a"), expected)


@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("write", [torch_bytes, legacy_torch_bytes])
def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path, torch, key, write):
    module = torch.nn.Linear(2, 3)
    (tmp_path / "a.pth").write_bytes(write({key: module.state_dict(), "epoch": 7}))
    expected = {name: x.numpy() for name, x in module.state_dict().items()}
    assert_equal(read_arrays(tmp_path / "a.pth"), expected)


@pytest.mark.usefixtures("torch")
def test_the_hand_written_torch_file_is_sound(tmp_path):
    values = np.array([1.5, 2], np.float32)
    (tmp_path / "a.pth").write_bytes(torch_archive(state_pickle(), values.tobytes()))
    assert_equal(read_arrays(tmp_path / "a.pth"), {"a": values})


@pytest.mark.parametrize("write", [torch_bytes, legacy_torch_bytes])
def test_code_in_a_torch_file_is_never_executed(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / "a.pth", write({"a": Executed()}))
    assert "holds code or objects (posix.mkdir)" in message
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("write", [torch_bytes, legacy_torch_bytes])
def test_a_whole_torch_module_is_never_loaded(tmp_path, torch, write):
    message = refusal(tmp_path / "a.pth", write(torch.nn.Linear(2, 3)))
    assert "holds code or objects (torch.nn.modules.linear.Linear)" in message


def test_torchscript_is_never_loaded(tmp_path, torch):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), buffer)
    refusal(tmp_path / "a.pt", buffer.getvalue())


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_the_oldest_torch_files_tar_archives_are_never_loaded(tmp_path, monkeypatch, tar_format):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Executed())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert "is a pickle, which may hold code" in refusal(tmp_path / "a.pth", buffer.getvalue())
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("file_format", ["torch", "legacy torch"])
def test_without_torch_the_message_says_how_to_go_on(tmp_path, monkeypatch, file_format):
    content = FORMATS[file_format](example())
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refusal(tmp_path / "a.pth", content)
    assert "pip install -e '.[peers]', or convert the file to .safetensors" in message


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bool", "uint8", "float8_e4m3fn"])
def test_tensors_that_are_no_floats_are_refused_by_name(tmp_path, torch, dtype):
    from safetensors.torch import save

    state = {"bn.num_batches_tracked": torch.zeros(2).to(getattr(torch, dtype))}
    for write in (save, torch_bytes, legacy_torch_bytes):
        message = refusal(tmp_path / "a", write(state))
        assert "num_batches_tracked of type" in message or "holds code or objects" in message


def test_what_is_no_state_dict_is_refused(tmp_path, torch):
    for write in (torch_bytes, legacy_torch_bytes):
        path = tmp_path / "a.pth"
        assert "holds no state dict" in refusal(path, write([torch.ones(2)]))
        assert "has epoch, no tensors" in refusal(path, write({"a": torch.ones(2), "epoch": 1}))
        assert "has arrays named 3: " in refusal(path, write({3: torch.ones(2)}))


def test_a_torch_file_that_was_compressed_again_is_refused(tmp_path, torch):
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"a": torch.zeros(1000)}))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    message = refusal(tmp_path / "a.pth", zip_bytes(members, zipfile.ZIP_DEFLATED))
    assert "was compressed, which PyTorch does not do" in message


@pytest.mark.usefixtures("torch")
def test_a_pickle_of_more_opcodes_than_any_model_has_is_not_executed(tmp_path):
    lists_that_are_dropped = b"\x80\x02" + b"]0" * 1_000_000 + b"}."
    message = refusal(tmp_path / "a.pth", torch_archive(lists_that_are_dropped))
    assert "has more than 1000000 opcodes: that is no state dict" in message
