import zipfile

from hypothesis import strategies as st

from ..checkpoints.array_files import (
    FORMATS,
    SOUND,
    npy_header,
    read_checked,
    zip_bytes,
    zip_members,
)
from .mutations import TEXT, mutated, mutated_zip_directory

FILES = [FORMATS["npz"](SOUND), FORMATS["compressed npz"](SOUND)]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**40, 2**63]), max_size=5).map(tuple)
DESCRIPTIONS = st.one_of(
    st.sampled_from(["<f4", ">f2", "<f8", "|O", "<i8", "<c8", "V2", "|V0", "f4,f4", "(9,)f4"]),
    st.lists(st.tuples(TEXT, st.sampled_from(["<f4", "|O"])), max_size=3),
)


@st.composite
def mutated_members(draw, content):
    """An archive with sound checksums of which a member is mutated, or is an array of any type."""
    members = zip_members(content)
    i = draw(st.integers(0, len(members) - 1))
    name, member = members[i]
    if draw(st.booleans()):
        header = npy_header(draw(DESCRIPTIONS), draw(SHAPES), draw(st.sampled_from([1, 2, 3])))
        member = header + draw(st.binary(max_size=24))
    else:
        member = draw(mutated(member))
    # Python 3.11 writes no member without a name, which ends at a zero.
    names = TEXT.filter(lambda text: text.split("\0")[0])
    members[i] = (draw(st.one_of(st.just(name), names)), member)
    return zip_bytes(members, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


def test_npz(fuzz):
    cases = st.sampled_from(FILES).flatmap(
        lambda content: st.one_of(
            mutated(content), mutated_members(content), mutated_zip_directory(content)
        )
    )
    fuzz("npz", cases, read_checked, sound=FILES, name="a.npz")
