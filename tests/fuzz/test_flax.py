import msgpack
from flax.serialization import to_bytes
from hypothesis import strategies as st

from ..checkpoints.array_files import FORMATS, SOUND, read_checked
from .mutations import NUMBERS, TEXT, mutated

FILES = [FORMATS["flax"](SOUND), to_bytes({"params": SOUND, "step": 3})]
TYPES = st.sampled_from(["float32", "bfloat16", "<f8", "O", "V8", "f4,f4", "(2,)f4", "m8", "x", 3])
SHAPES = st.lists(st.one_of(NUMBERS, st.integers(-2, 4)), max_size=4)
ARRAYS = st.tuples(SHAPES, TYPES, st.binary(max_size=24)).map(msgpack.packb)
EXTENSIONS = st.tuples(st.sampled_from([1, 2, 3, 9]), st.one_of(ARRAYS, st.binary(max_size=8)))
LEAVES = st.one_of(
    EXTENSIONS.map(lambda pair: msgpack.ExtType(*pair)),
    st.none(),
    st.floats(),
    st.integers(-(2**63), 2**64 - 1),
    TEXT,
    st.binary(max_size=4),
)
KEYS = st.sampled_from(["params", "target", "a", "a/b", "", "..", "__msgpack_chunked_array__"])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.dictionaries(KEYS, inner, max_size=3), st.lists(inner, max_size=3)),
    max_leaves=8,
)


def test_flax(fuzz):
    trees = st.dictionaries(KEYS, TREES, min_size=1, max_size=3).map(msgpack.packb)
    cases = st.one_of(trees, trees.flatmap(mutated), st.sampled_from(FILES).flatmap(mutated))
    fuzz("flax", cases, read_checked, sound=FILES, name="a.msgpack")
