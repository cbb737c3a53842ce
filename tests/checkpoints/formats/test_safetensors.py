import pytest

from ..array_files import refusal, safetensors_bytes


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes({"a": entry()}, bytes(8), length=2**63),
        safetensors_bytes({"a": entry()}, bytes(8), length=2**64 - 1),
        safetensors_bytes({"a": entry()}, bytes(8), length=10**9),
        safetensors_bytes({"a": entry()}, bytes(8), length=10),
        safetensors_bytes({"a": entry()}, bytes(7)),
        safetensors_bytes({"a": entry()}, bytes(9)),
        safetensors_bytes({"a": entry(offsets=(0, 2**40))}, bytes(8)),
        safetensors_bytes({"a": entry(offsets=(8, 0))}, bytes(8)),
        safetensors_bytes({"a": entry(offsets=(-8, 0))}, bytes(8)),
        safetensors_bytes({"a": entry(offsets=(4, 12))}, bytes(12)),
        safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)),
        safetensors_bytes({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
        safetensors_bytes({"a": entry(shape=(2**32, 2**32, 0), offsets=(0, 0))}),
        safetensors_bytes({"a": entry(shape=(-2,))}, bytes(8)),
        safetensors_bytes({"a": entry(shape=(1.5,))}, bytes(8)),
        safetensors_bytes({"a": entry(dtype="F33")}, bytes(8)),
        safetensors_bytes({"a": entry(dtype="I64", shape=(1,))}, bytes(8)),
        safetensors_bytes({"a": entry(dtype="F4", shape=(16,))}, bytes(8)),
        safetensors_bytes({"a": 3}),
        safetensors_bytes({"__metadata__": {"a": ["b"]}}),
        safetensors_bytes(b"{" + b'"a":{' * 50_000),
        safetensors_bytes(b'{"a":' + b"[" * 100_000),
        safetensors_bytes(b'{"a":' + b"1" * 100_000),
        safetensors_bytes(b"{\xff}"),
        safetensors_bytes(b"{}" + b" " * (5 << 20)),
    ],
    ids=lambda content: ascii(content[8:68]),
)
def test_a_hostile_safetensors_header_is_one_line(tmp_path, content):
    refusal(tmp_path / "a.safetensors", content)
