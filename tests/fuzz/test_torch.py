import pickle
import pickletools

import pytest
from hypothesis import strategies as st

from ..checkpoints.array_files import (
    FORMATS,
    SOUND,
    import_torch,
    legacy,
    read_checked,
    state_pickle,
    torch_archive,
    zip_bytes,
    zip_members,
)
from .mutations import mutated, mutated_zip_directory

# What the unpickler of PyTorch knows beside tensors, and what none may ever call.
CALLS = [
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloatStorage\n", b"ctorch\nHalfStorage\n", b"ccollections\nOrderedDict\n",
    b"cbuiltins\nbytearray\n", b"ctorch\nFloatTensor\n", b"ctorch\nSize\n", b"c__builtin__\nset\n",
    b"cposix\nsystem\n", b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n",
    b"\x8c\x05posix\x8c\x06system\x93", b"(iposix\nsystem\n",
]  # fmt: skip
INTEGERS = [
    b"K\x00",
    b"K\x02",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"M\xff\xff",
]
STRUCTURE = [
    *(b"(", b"t", b"R", b"b", b"}", b"]", b")", b"s", b"u", b"e", b"a", b"Q", b"0", b"2", b"1"),
    *(b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"N", b".", b"\x90", b"\x8f", b"\x81", b"\x92"),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"\x94", b"r\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a"),
]


@st.composite
def opcodes(draw, pickled):
    """A pickle whose opcodes are dropped, repeated, swapped, and joined by others."""
    places = [at for _, _, at in pickletools.genops(pickled)]
    parts = [pickled[i:j] for i, j in zip(places, [*places[1:], len(pickled)], strict=True)]
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(parts)))
        match draw(st.sampled_from(["insert", "replace", "repeat", "drop"])):
            case "insert":
                parts.insert(i, draw(st.sampled_from([*CALLS, *INTEGERS, *STRUCTURE])))
            case "replace" if i < len(parts):
                parts[i] = draw(st.sampled_from([*CALLS, *INTEGERS, *STRUCTURE]))
            case "repeat":
                j = draw(st.integers(i, len(parts)))
                parts[i:j] = parts[i:j] * draw(st.integers(2, 4))
            case "drop":
                del parts[i : i + 1]
    return b"".join(parts)


@st.composite
def mutated_members(draw, content):
    """An archive with sound checksums; of its members the pickle is mutated most."""
    members = zip_members(content)
    i = draw(st.integers(0, len(members) - 1))
    name, member = members[i]
    members[i] = (name, draw(mutated(member)))
    return zip_bytes(members)


def of_torch(content):
    return next(member for name, member in zip_members(content) if name.endswith("data.pkl"))


@pytest.mark.versions
def test_torch(fuzz):
    import_torch()
    file = FORMATS["torch"](SOUND)
    pickles = st.sampled_from([of_torch(file), state_pickle()]).flatmap(opcodes)
    cases = st.one_of(
        pickles.map(lambda pickled: torch_archive(pickled, bytes(24), bytes(12))),
        pickles.map(lambda pickled: torch_archive(pickled, bytes(24), bytes(12))),
        mutated_members(file),
        mutated_zip_directory(file),
        mutated(file),
    )
    fuzz("torch", cases, read_checked, sound=[file], name="a.pth")


@pytest.mark.versions
def test_legacy_torch(fuzz):
    import_torch()
    file = FORMATS["legacy torch"](SOUND)
    start = len(b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001)))
    pickles = opcodes(state_pickle())
    cases = st.one_of(
        st.tuples(pickles, st.binary(max_size=32)).map(lambda x: legacy(x[0], data=x[1])),
        mutated(file, start),
    )
    fuzz("legacy-torch", cases, read_checked, sound=[file], name="a.pth")
