"""A run's checkpoint from a stranger: orbax's folder, and the document beside it."""

import json
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import strategies as st

from vit_jax.checkpoints import integrity
from vit_jax.checkpoints.formats import checks
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.config import to_dict
from vit_jax.errors import UserError
from vit_jax.recipes import get_config

from .mutations import JSON, mutated, mutated_json
from .test_models import VIT, tensors_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a checkpoint, by their names in it."""
    from flax.traverse_util import unflatten_dict

    config = get_config("ViT-Ti/4", "pretrain,digits")
    config.model.update({key: x for key, x in VIT.items() if key != "architecture"})
    config.dataset.image_size = 16
    params = unflatten_dict(tensors_of(VIT), sep="/")
    state = {
        "params": jax.tree.map(np.asarray, params),
        "opt_state": np.zeros(2**18, np.float32),  # As of a large model it is most of the state.
        "step": np.zeros((), np.int32),
    }
    metadata = {"config": to_dict(config), "class_names": list("abc")}
    step = tmp_path_factory.mktemp("run") / "1"
    handler = ocp.CompositeCheckpointHandler(**integrity.item_handlers())
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(step, args=integrity.items(state, metadata))
    paths = (path for path in step.rglob("*") if path.is_file())
    return {str(path.relative_to(step)): path.read_bytes() for path in paths}


DOCUMENT = "metadata/metadata"


def signed(text):
    """A document with the checksum that belongs to it."""
    try:
        document = json.loads(text)
        document.pop("checksum", None)
        checksum = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    except (ValueError, AttributeError, TypeError):
        return text
    return json.dumps(document | {"checksum": checksum}).encode()


@st.composite
def damaged(draw, files):
    document = json.loads(files[DOCUMENT])
    if draw(st.booleans()):
        text = draw(mutated_json(document, JSON))
        return files | {DOCUMENT: signed(text) if draw(st.booleans()) else text}
    name = draw(st.sampled_from(sorted(files)))
    match draw(st.sampled_from(["mutate", "drop", "swap"])):
        case "mutate":
            return files | {name: draw(mutated(files[name]))}
        case "drop":
            return {key: content for key, content in files.items() if key != name}
    return files | {name: files[draw(st.sampled_from(sorted(files)))]}


def test_checkpoint(fuzz, files):
    def read(folder):
        pretrained = load_pretrained(folder)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(pretrained.params))

    fuzz("checkpoint", damaged(files), read, sound=[files])


def test_of_a_state_only_what_is_read_counts(files, tmp_path, monkeypatch):
    for name, content in files.items():
        path = tmp_path / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(checks, "MAX_BYTES", 2**19)  # The state has 2**20 bytes and some.
    assert load_pretrained(tmp_path / "1").model["hidden_size"] == 16
    monkeypatch.setattr(checks, "MAX_BYTES", 2**14)
    with pytest.raises(UserError, match="at most 16384 are read from it"):
        load_pretrained(tmp_path / "1")
