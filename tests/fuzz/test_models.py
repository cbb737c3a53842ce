"""Whole models with something wrong in them: sound files, and what they say is not.

The bytes of the files of arrays are attacked in test_npz.py, test_safetensors.py and so on.
"""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hypothesis import strategies as st

from vit_jax.checkpoints import foreign_configs, layouts
from vit_jax.checkpoints.pretrained import abstract_params, load_pretrained

from ..checkpoints.small_model import INFO
from ..checkpoints.small_model import MODEL as VIT
from .mutations import JSON, mutated_json

INFO_FILE = {"vit_jax.json": {"model": VIT, "loss": "softmax", "class_names": list("abc")}}
FORMATS = {
    "timm": foreign_configs.config_files(INFO, "timm") | INFO_FILE,
    "huggingface": foreign_configs.config_files(INFO, "huggingface") | INFO_FILE,
    "official": INFO_FILE,
}
# A model of each family; those of one stage alone are traced in a moment.
MODELS = {
    "vit": VIT,
    "hybrid": VIT | {"architecture": "hybrid", "patch_size": 1, "resnet_layers": (1,)},
    "resnet": {"architecture": "resnet", "resnet_layers": (1,), "num_classes": 3},
    "axial_resnet": {"architecture": "axial_resnet", "resnet_layers": (1,), "num_classes": 3},
}


def tensors_of(model, format="official"):
    fields = {key: x for key, x in model.items() if key in VIT or key == "resnet_layers"}
    shapes = flatten_dict(abstract_params(fields, 32 if "resnet_layers" in model else 16), sep="/")
    arrays = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    return layouts.from_official(arrays, format)


def files_of(format, tensors):
    documents = FORMATS[format].items()
    files = {name: json.dumps(document).encode() for name, document in documents}
    return files | {"model.safetensors": safetensors.numpy.save(tensors)}


@pytest.mark.parametrize("format", FORMATS)
def test_configurations(fuzz, format):
    sound = files_of(format, tensors_of(VIT, format))

    @st.composite
    def folders(draw):
        name = draw(st.sampled_from(sorted(FORMATS[format])))
        return sound | {name: draw(mutated_json(FORMATS[format][name], JSON))}

    def read(folder):
        model = load_pretrained(folder).model
        sizes = {"hidden_size": 16, "num_layers": 1, "mlp_dim": 32, "num_classes": 3}
        assert sizes.items() <= model.items()

    fuzz(f"{format}-config", folders(), read, sound=[sound])


CHANGES = ("drop", "flatten", "grow", "empty", "transpose", "rename", "scalar", "reshape", "layers")


@st.composite
def changed(draw, tensors):
    """Arrays of which a few are gone, of another shape, or in many layers that do not exist."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        x = tensors.pop(name)
        match draw(st.sampled_from(CHANGES)):
            case "flatten":
                tensors[name] = x.reshape(-1)
            case "grow":
                tensors[name] = np.concatenate([x, x]) if x.ndim else x
            case "empty":
                sizes = draw(st.lists(st.sampled_from([0, 1, 2**10, 2**15]), max_size=4))
                tensors[name] = np.zeros([*sizes, 0], np.float32)
            case "transpose":
                tensors[name] = np.ascontiguousarray(x.T)
            case "rename":
                tensors[name + draw(st.sampled_from(["x", "/x", ".x", "0"]))] = x
            case "scalar":
                tensors[name] = np.array(0.5, np.float32)
            case "reshape":
                sizes = draw(st.lists(st.integers(1, 5), max_size=5))
                tensors[name] = np.full(sizes, 0.5, np.float32)
            case "layers":
                for i in range(draw(st.sampled_from([1, 12, 600]))):
                    other = name.replace("_0/", f"_{i}/").replace(".0.", f".{i}.")
                    tensors[
                        other.replace("unit1/", f"unit{i}/").replace("unit01/", f"unit{i}/")
                    ] = x
    return tensors or {"x": np.ones(1, np.float32)}


@pytest.mark.parametrize("architecture", MODELS)
def test_arrays(fuzz, architecture):
    sound = tensors_of(MODELS[architecture])
    cases = changed(sound).map(safetensors.numpy.save)
    read_model(fuzz, f"{architecture}-arrays", cases, [safetensors.numpy.save(sound)])


@pytest.mark.parametrize("format", ["timm", "huggingface"])
def test_arrays_of_other_layouts(fuzz, format):
    sound = tensors_of(VIT, format)
    cases = changed(sound).map(safetensors.numpy.save)
    read_model(fuzz, f"{format}-arrays", cases, [safetensors.numpy.save(sound)])


def read_model(fuzz, reader, cases, sound):
    overrides = {} if "resnet" in reader else {"num_heads": 2}

    def read(path):
        pretrained = load_pretrained(path, **overrides)
        assert all(x.size for x in jax.tree.leaves(pretrained.params))

    fuzz(reader, cases, read, sound=sound, name="a.safetensors")
