"""Whole folders and files with something wrong in them: a model or one line, never anything else.

The bytes of files are fuzzed in test_arrays.py; here they are sound, and what they say is not.
"""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit_jax.checkpoints import foreign_configs, layouts
from vit_jax.checkpoints.formats.safetensors import write_safetensors
from vit_jax.checkpoints.model_info import ModelInfo
from vit_jax.checkpoints.pretrained import abstract_params, load_pretrained
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError

MODEL = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 16,
    "num_layers": 1,
    "mlp_dim": 32,
    "num_heads": 2,
    "num_classes": 3,
    "classifier": "token",
    "representation_size": 0,
    "gelu": "erf",
    "layer_norm_epsilon": 1e-6,
}
INFO = ModelInfo(MODEL, Preprocessing(16, 0.875), ("a", "b", "c"))
FILES = {
    "timm": foreign_configs.config_files(INFO, "timm"),
    "huggingface": foreign_configs.config_files(INFO, "huggingface"),
    "official": {"vit_jax.json": {"model": MODEL, "loss": "softmax", "class_names": list("abc")}},
}
INFO_FILE = {"vit_jax.json": FILES["official"]["vit_jax.json"]}
FILES["timm"] |= INFO_FILE
FILES["huggingface"] |= INFO_FILE
PLACES = [
    (format, file, path)
    for format, files in FILES.items()
    for file, document in files.items()
    for path in [*flatten_dict(document), *((key,) for key in document)]
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**6, 10**30, -1e308, 1e-300, 0.5, "", "gelu", "16", "é\n"]),
    st.floats(allow_nan=True),
    st.lists(st.one_of(st.integers(-2, 20), st.none(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.sampled_from(["height", "width", "0", "shortest_edge"]), st.integers(-1, 9)),
)


@pytest.fixture(scope="module")
def arrays():
    shapes = flatten_dict(abstract_params(MODEL, 16), sep="/")
    tree = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    return {format: layouts.from_official(tree, format) for format in FILES}


def load(path):
    try:
        pretrained = load_pretrained(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    sizes = {"hidden_size": 16, "num_layers": 1, "mlp_dim": 32, "num_classes": 3}
    assert sizes.items() <= pretrained.model.items()


def replaced(document, path, value):
    if not path:
        return value
    return {**document, path[0]: replaced(document[path[0]], path[1:], value)}


FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(place=st.sampled_from(PLACES), value=VALUES)
@FUZZ
def test_any_value_in_a_configuration_gives_a_model_or_one_line(tmp_path, arrays, place, value):
    format, file, path = place
    folder = tmp_path / format
    folder.mkdir(exist_ok=True)
    for name, document in FILES[format].items():
        document = replaced(document, path, value) if name == file else document
        (folder / name).write_text(json.dumps(document))
    if not (folder / "model.safetensors").exists():
        write_safetensors(folder / "model.safetensors", arrays[format])
    load(folder)


@given(
    format=st.sampled_from(sorted(FILES)),
    index=st.integers(0, 100),
    change=st.sampled_from(["drop", "flatten", "grow", "empty", "transpose", "rename", "scalar"]),
)
@FUZZ
def test_any_change_of_one_array_gives_a_model_or_one_line(tmp_path, arrays, format, index, change):
    tensors = dict(arrays[format])
    name = sorted(tensors)[index % len(tensors)]
    x = tensors.pop(name)
    changed = {
        "drop": {},
        "flatten": {name: x.reshape(-1)},
        "grow": {name: np.concatenate([x, x])},
        "empty": {name: x[:0]},
        "transpose": {name: x.T},
        "rename": {name + "x": x},
        "scalar": {name: np.float32(0.5)},
    }[change]
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors | changed)
    try:
        load_pretrained(path, num_heads=2)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        assert change != "flatten" or x.ndim != 1  # Nothing has changed: it must be read.
    else:  # The same array under another shape.
        assert change == "flatten" and x.ndim == 1 or change == "transpose"
