import json
import pathlib

import pytest

from vit_jax.errors import UserError
from vit_jax.export import engine
from vit_jax.export.to_tensorrt import build

from . import fake_tensorrt


@pytest.fixture
def built(fake, onnx_file, tmp_path):
    def make(version="10.0.1", **options):
        fake(version)
        build(onnx_file(), tmp_path / "out", **options)
        return tmp_path / "out"

    return make


def test_an_engine_of_this_machine_loads(built):
    directory = built()
    assert engine.load_engine(directory).cuda_engine.num_optimization_profiles == 1
    assert engine.load_engine(directory / "model.engine").description["tensorrt"] == "10.0.1"


def test_an_engine_of_another_version_is_one_line(built, fake):
    directory = built("10.0.1")
    fake("11.4.0.106")
    with pytest.raises(UserError, match=r"built by TensorRT 10\.0\.1 and this is 11\.4\.0\.106"):
        engine.load_engine(directory)
    # Without the description, TensorRT's own words.
    (directory / "engine.json").unlink()
    with pytest.raises(UserError, match="the version of the plan does not match"):
        engine.load_engine(directory)


def test_a_version_compatible_engine_is_for_later_versions_only(built):
    description = json.loads((built(version_compatible=True) / "engine.json").read_text())
    path, device = pathlib.Path("e"), fake_tensorrt.DEVICE
    engine.check_engine(description, path, "10.16.1.11", device)
    engine.check_engine(description, path, "11.4.0.106", device)
    with pytest.raises(UserError, match=r"10\.0\.1 and runs with later ones, but this is 8\.6\.1"):
        engine.check_engine(description, path, "8.6.1", device)


@pytest.mark.parametrize(
    "level, capability, fits",
    [
        ("none", "9.0", True),
        ("none", "8.0", False),
        ("same_compute_capability", "9.0", True),
        ("same_compute_capability", "12.0", False),
        ("ampere_plus", "8.0", True),
        ("ampere_plus", "12.0", True),
        ("ampere_plus", "7.5", False),
    ],
)
def test_an_engine_of_another_gpu_is_one_line(built, level, capability, fits):
    directory = built("11.4.0.106", hardware_compatibility=level)
    description = json.loads((directory / "engine.json").read_text())
    there = {"name": "Other", "compute_capability": capability, "driver": "12.4"}
    if fits:
        engine.check_engine(description, pathlib.Path("e"), "11.4.0.106", there)
    else:
        message = rf"built for NVIDIA Fake \(.*9\.0\) and this is Other \(.*{capability}\)"
        with pytest.raises(UserError, match=message):
            engine.check_engine(description, pathlib.Path("e"), "11.4.0.106", there)


def test_an_engine_of_unknown_source_says_that_it_is_a_program(built, capsys):
    directory = built()
    engine.load_engine(directory)
    assert "program" not in capsys.readouterr().err
    (directory / "engine.json").unlink()
    engine.load_engine(directory)
    (line,) = capsys.readouterr().err.splitlines()
    assert "its source is unknown: an engine is a program, load only what you trust" in line


def test_a_damaged_engine_or_description_is_one_line(built, tmp_path):
    directory = built()
    whole = (directory / "model.engine").read_bytes()
    (directory / "model.engine").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="bytes and engine.json says"):
        engine.load_engine(directory)
    sound = json.loads((directory / "engine.json").read_text())
    changes = (
        {"device": 3},
        {"tensorrt": 10},
        {"version_compatible": "no"},
        {"metadata": ["a"]},
        {"hardware_compatibility": "any"},
        {"profiles": [{"min": 2, "opt": 1, "max": 0}]},
    )
    wrong = [json.dumps(sound | change) for change in changes]
    for text in ("{", "{}", "[]", '{"engine": {"bytes": 1}}', "[" * 100_000, *wrong):
        (directory / "engine.json").write_text(text)
        with pytest.raises(UserError, match="engine.json is damaged"):
            engine.load_engine(directory)
    with pytest.raises(UserError, match="is missing"):
        engine.load_engine(tmp_path / "nowhere")
