from hypothesis import strategies as st

from vit_jax.export.deploy import write_deploy
from vit_jax.export.onnx_file import read_onnx

from .mutations import NUMBERS, TEXT, message, mutated


def value(name, data_type, sizes):
    dims = [(1, message((1, size))) for size in sizes]
    tensor = message((1, data_type), (2, message(*dims)))
    return message((1, name), (2, message((1, tensor))))


def model(
    *, operator="Softmax", dims=(2, 3), data_type=1, location="", metadata=(), sizes=(8, 4, 4, 3),
    name="images",
):  # fmt: skip
    """A ModelProto of one node and one weight."""
    external = [(13, message((1, "location"), (2, location)))] * bool(location)
    weight = message(*((1, size) for size in dims), (2, data_type), (8, "w"), *external)
    graph = message(
        (1, message((1, "x"), (4, operator))),
        (5, weight),
        (11, value(name, 1, sizes)),
        (12, value("logits", 1, (8, 10))),
    )
    entries = [(14, message((1, key), (2, text))) for key, text in metadata]
    return message((1, 8), (7, graph), *entries)


TEXTS = st.one_of(
    st.sampled_from(["", "[]", '["a\\nb"]', "{", "[" * 5000, "null", "fp16", '{"mean": 3}', "7"]),
    TEXT,
)
KEYS = st.sampled_from(["class_names", "preprocessing", "precision", "pixels"])
SIZES = st.lists(st.one_of(NUMBERS, st.just(2**64 - 1)), max_size=5)
LOCATIONS = [
    "model.onnx.data",
    "../x",
    "/dev/zero",
    "a\x00b",
    "a/../b",
    ".",
    "\x1b[2J",
    "model.onnx",
]
MODELS = st.builds(
    model,
    operator=st.sampled_from(["Softmax", "QuantizeLinear", "", "\x1b"]),
    dims=SIZES,
    data_type=st.sampled_from([0, 1, 10, 16, 99]),
    location=st.sampled_from(["", "", *LOCATIONS]),
    metadata=st.lists(st.tuples(KEYS, TEXTS), max_size=3),
    sizes=st.one_of(SIZES, st.just((8, 4, 4, 3)), st.just((8, 4, 4, 3))),
    name=st.one_of(st.just("images"), TEXT),
)
SOUND = [
    {"model.onnx": model(metadata=[("class_names", '["rose", "iris"]')])},
    {"model.onnx": model(location="w.data"), "w.data": bytes(24)},
]


def read(folder):
    """Reads a file, and writes what serves it: that lies in its folder too."""
    found = read_onnx(folder / "model.onnx")
    assert all(len(digest) == 64 for digest in found.sha256.values())
    write_deploy(folder)


def test_onnx(fuzz):
    files = st.one_of(MODELS, MODELS.flatmap(mutated), mutated(SOUND[0]["model.onnx"]))
    fuzz("onnx", files.map(lambda content: {"model.onnx": content}), read, sound=SOUND)
