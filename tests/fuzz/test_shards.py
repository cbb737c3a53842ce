import json

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from vit_jax.checkpoints.arrays import read_sharded

from ..checkpoints.array_files import SOUND
from .mutations import JSON, mutated, mutated_json

INDEX = "model.safetensors.index.json"
SHARDS = {"1.safetensors": ["a/b"], "2.safetensors": ["c"]}
FILES = {
    shard: safetensors.numpy.save({name: SOUND[name] for name in names})
    for shard, names in SHARDS.items()
}
DOCUMENT = {"weight_map": {name: shard for shard, names in SHARDS.items() for name in names}}
NAMES = st.sampled_from(
    ["1.safetensors", "../1.safetensors", "/dev/zero", "..", "", "2.safetensors"]
)


def read(folder):
    arrays = read_sharded(folder / INDEX)
    assert arrays.keys() <= SOUND.keys()  # What the index leaves out is not read.
    assert all(x.dtype == np.float32 for x in arrays.values())


@st.composite
def folders(draw):
    index = draw(mutated_json(DOCUMENT, st.one_of(NAMES, JSON)))
    if draw(st.booleans()):
        return FILES | {INDEX: index}
    shard = draw(st.sampled_from(sorted(FILES)))
    return FILES | {INDEX: json.dumps(DOCUMENT).encode(), shard: draw(mutated(FILES[shard]))}


def test_shards(fuzz):
    sound = FILES | {INDEX: json.dumps(DOCUMENT).encode()}
    fuzz("shards", folders(), read, sound=[sound])
