import json
import pathlib

from hypothesis import strategies as st

from vit_jax.export import engine
from vit_jax.export.deploy import write_deploy

from .mutations import JSON, mutated_json
from .test_onnx import model

DEVICE = {"name": "NVIDIA Fake", "compute_capability": "9.0", "driver": "12.4"}
DESCRIPTION = {
    "tensorrt": "10.0.1",
    "device": DEVICE,
    "precision": "fp32",
    "version_compatible": False,
    "hardware_compatibility": "none",
    "tf32": False,
    "optimization_level": 3,
    "workspace_mib": None,
    "tactic_sources": None,
    "profiles": [{"min": 1, "opt": 8, "max": 64}],
    "engine": {"file": "model.engine", "bytes": 4},
    "metadata": {"class_names": '["a", "b"]'},
}
VALUES = st.one_of(
    JSON,
    st.sampled_from(
        ["ampere_plus", "x", "10", "10.0.1.9", "v1", "model.engine", "../model.engine"]
    ),
    st.sampled_from([True, 4, {}, [], [{"min": 2, "opt": 1, "max": 0}], {"name": "a"}]),
)


def folder(description):
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    files = {"model.engine": b"plan", "engine.json": text}
    return files | {"model.onnx": model()}


def read(path: pathlib.Path):
    description = engine.read_description(path / "model.engine")
    write_deploy(path)
    if description:
        engine.check_engine(description, path, "10.0.1", DEVICE)


def test_engine(fuzz):
    cases = mutated_json(DESCRIPTION, VALUES).map(folder)
    fuzz("engine", cases, read, sound=[folder(DESCRIPTION)])
