import msgpack
import pytest

from ..array_files import flax_array, refusal


@pytest.mark.parametrize(
    "content",
    [
        flax_array([2], "object", bytes(16)),
        flax_array([3], "float32", bytes(8)),
        flax_array([2], "float999", bytes(8)),
        flax_array("2", "float32", bytes(8)),
        flax_array([2], "float32"),
        msgpack.packb({"a": 1.0}),
        msgpack.packb({"a": msgpack.ExtType(9, b"x")}),
        msgpack.packb({1: 2}),
        b"\x82\xa1a\x80\xa1a\x80",
    ],
)
def test_a_hostile_flax_file_is_one_line(tmp_path, content):
    refusal(tmp_path / "a", content)
