import pathlib

import pytest

from experiments.runner import placement
from vit_jax.errors import UserError


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(placement, "_has_accelerator", lambda: False)
    monkeypatch.setattr(placement, "_cores", lambda: [0, 2, 4, 6, 8])
    assert placement.shares(2) == [[0, 2], [4, 6, 8]]
    assert placement.shares(1) == [[]]
    assert placement.shares(6) == [[]] * 6
    assert placement.default_workers() == 5
    monkeypatch.setattr(placement, "_has_accelerator", lambda: True)
    assert placement.shares(2) == [[], []]
    assert placement.default_workers() == 1


def test_workers_on_an_accelerator_have_gpus_of_their_own(monkeypatch):
    files = {"nvidia[0-9]*": [pathlib.Path(f"/dev/nvidia{i}") for i in range(5)]}
    monkeypatch.setattr(placement, "_device_files", lambda *names: sum(map(files.get, names), []))
    monkeypatch.setattr(placement, "_has_accelerator", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpus(workers):
        return [x.get("CUDA_VISIBLE_DEVICES") for x in placement.environments(workers)]

    assert gpus(1) == [None]
    assert gpus(2) == ["0,1", "2,3,4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, GPU-4f")
    assert gpus(1) == ["7, GPU-4f"]
    assert gpus(2) == ["7", "GPU-4f"]
    with pytest.raises(UserError, match="--jobs 3 need as many GPUs, and there are 2"):
        gpus(3)
    files.clear()
    files["nvidia[0-9]*"] = []
    with pytest.raises(UserError, match="there are 0"):
        gpus(2)
    monkeypatch.setattr(placement, "_has_accelerator", lambda: False)
    assert len(gpus(9)) == 9


@pytest.mark.parametrize(
    ("files", "packages", "found"),
    [
        (["accel*"], ["libtpu"], True),
        (["vfio/[0-9]*"], ["libtpu"], True),
        ([], ["libtpu"], False),
        (["accel*"], [], False),
        (["nvidia[0-9]*"], ["jax_plugins"], True),
        (["nvidia[0-9]*"], ["libtpu"], False),
    ],
)
def test_an_accelerator_is_a_device_and_what_drives_it(monkeypatch, files, packages, found):
    monkeypatch.setattr(placement, "_device_files", lambda *names: [x for x in names if x in files])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [x for x in packages if x == group]
    )
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert placement._has_accelerator() is found
