import json

from hypothesis import strategies as st

from ..checkpoints.array_files import FORMATS, SOUND, read_checked
from .mutations import NUMBERS, mutated, mutated_json, with_length

FILE = FORMATS["safetensors"](SOUND)
LENGTH = int.from_bytes(FILE[:8], "little")
HEADER, DATA = json.loads(FILE[8 : 8 + LENGTH]), FILE[8 + LENGTH :]
VALUES = st.one_of(
    NUMBERS,
    st.sampled_from(["F16", "BF16", "F64", "I8", "F8_E4M3", "F4"]),
    st.lists(NUMBERS, max_size=4),
)


def test_safetensors(fuzz):
    headers = st.one_of(mutated_json(HEADER, VALUES), mutated_json(HEADER))
    cases = st.one_of(mutated(FILE), headers.map(lambda text: with_length(text) + DATA))
    fuzz("safetensors", cases, read_checked, sound=[FILE], name="a.safetensors")
