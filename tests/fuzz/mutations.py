"""Strategies of hostile files: bytes changed anywhere, and where the format says something."""

import json
import struct

from hypothesis import strategies as st

# What means something in one of the formats: numbers, types, opcodes, marks of an archive.
TOKENS = [
    b"0", b"1", b"-1", b"4294967295", b"9223372036854775807", b"1e9", b"null", b"[]", b"{", b"}",
    b"<f4", b">f8", b"|O", b"<i8", b"F32", b"BF16", b"I64", b"True", b"(", b")", b",", b"'", b'"',
    b"/", b"..", b"\x00", b"\xff" * 4, b"\xff" * 8, b"\x7f", b"\n", b"PK\x01\x02", b"PK\x05\x06",
    b"PK\x06\x06", b"PK\x06\x07", b"h\x00", b"q\x00", b"R", b"b", b"Q", b"t", b"K\x00", b"(" * 40,
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"ctorch\nFloatStorage\n", b"cposix\nsystem\n",
    b"ccollections\nOrderedDict\n", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc8",
    b"\xd9\xff", b"\x1b[2J", b"\xe2\x80\xae", b"[" * 2000, b"\xff" * 9 + b"\x01",
]  # fmt: skip

NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 8, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1])


@st.composite
def mutated(draw, content, start=0):
    """`content` after a few cuts, flips and splices at or behind `start`."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        i, j = (draw(st.integers(min(start, len(content)), len(content))) for _ in range(2))
        match draw(st.sampled_from(["cut", "flip", "splice", "token", "number", "drop"])):
            case "cut":
                del content[i:]
            case "flip" if i < len(content):
                content[i] ^= draw(st.integers(1, 255))
            case "splice":
                content[i:i] = content[j : j + draw(st.integers(1, 64))]
            case "token":
                content[i : i + draw(st.integers(0, 10))] = draw(st.sampled_from(TOKENS))
            case "number":
                size = draw(st.sampled_from([2, 4, 8]))
                number = draw(NUMBERS) % (1 << 8 * size)
                content[i : i + size] = number.to_bytes(size, "little")
            case "drop":
                del content[i : i + draw(st.integers(1, 16))]
    return bytes(content)


@st.composite
def mutated_zip_directory(draw, content):
    """An archive of which numbers in its directory, or in its end, are others."""
    content = bytearray(content)
    # Where the sizes, offsets and counts are, relative to the mark of a record.
    fields = {
        b"PK\x01\x02": [(8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)],
        b"PK\x03\x04": [(6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2)],
        b"PK\x05\x06": [(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
    }
    places = [
        (at + offset, size)
        for mark, numbers in fields.items()
        for at in find_all(content, mark)
        for offset, size in numbers
    ]
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.sampled_from(places))
        near = int.from_bytes(content[at : at + size], "little") + draw(st.integers(-64, 64))
        number = draw(st.one_of(NUMBERS, st.just(near))) % (1 << 8 * size)
        content[at : at + size] = number.to_bytes(size, "little")
    return bytes(content)


def find_all(content, mark):
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + 1)


# Of all of Unicode a table would be made first, which takes a second.
TEXT = st.text("ab/.é\n\x1b\u202e\0`|", max_size=6)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**6, 2**40, 2**63, 10**30, -1e308, 1e-300, 0.5, "", "16", "é\n", "\x1b[2J"]),
    st.floats(allow_nan=True),
    TEXT,
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["height", "width", "0", "a"]), inner, max_size=3),
    ),
    max_leaves=8,
)


def places(document, path=()):
    """The paths of all that is in a document."""
    yield path
    items = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(document, path, value):
    """A document with another value at a path; without what is there if the value is `...`."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    if len(path) == 1 and value is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(document[path[0]], path[1:], value)
    return copy


@st.composite
def mutated_json(draw, document, value=JSON):
    """A document with other values, without some, or not quite JSON."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(document), key=repr)))
        new = draw(st.one_of(value, st.just(...)))
        document = replaced(document, path, None if new is ... and not path else new)
    text = json.dumps(document).encode()
    return draw(st.one_of(st.just(text), st.just(text), st.just(text), mutated(text)))


def varint(number):
    """A number of a protocol buffer."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def message(*fields):
    """A protocol buffer of (field, value): a number, bytes, or text."""
    parts = []
    for field, value in fields:
        if isinstance(value, int):
            parts.append(varint(field << 3) + varint(value))
        else:
            value = value.encode() if isinstance(value, str) else value
            parts.append(varint(field << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def with_length(content):
    """Bytes behind their length, as a safetensors file has its header."""
    return struct.pack("<Q", len(content)) + content
