"""What lies in the cache beside an unfinished download, and a folder of the Hugging Face hub."""

import json

from hypothesis import strategies as st

from vit_jax.checkpoints import download, remote

from .mutations import JSON, mutated_json

RECORD = {"etag": '"a"', "size": 3, "md5": "Ojk9c3dhfxgoKVVHYwFbHQ==", "crc32c": None}
INDEX = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
DEEP = st.sampled_from([b"[" * 60_000, b"1" * 5000, b"", b"\xff"])


def test_record(fuzz):
    def read(folder):
        with (folder / "a.npz.partial").open("rb") as file:
            published = download._read_record(file)
        if published is not None:  # It is compared, sent in a header, and printed.
            assert isinstance(published.etag, str) and published.etag.isprintable()
            assert isinstance(published.size, int | None)

    records = st.one_of(mutated_json(RECORD, JSON), DEEP)
    folders = records.map(lambda text: {"a.npz.partial": b"abc", "a.npz.partial.json": text})
    sound = {"a.npz.partial": b"abc", "a.npz.partial.json": json.dumps(RECORD).encode()}
    fuzz("download", folders, read, sound=[sound])


def test_index_of_the_hub(fuzz):
    def read(folder):
        missing = remote._missing_weights(folder)
        assert missing is None or isinstance(missing, str)

    indices = st.one_of(mutated_json(INDEX, JSON), DEEP)
    folders = indices.map(lambda text: {"model.safetensors.index.json": text})
    sound = {"model.safetensors.index.json": json.dumps(INDEX).encode()}
    fuzz("hub", folders, read, sound=[sound])
