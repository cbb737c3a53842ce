import base64
import hashlib
import pathlib
import resource
import time

import pytest

from vit_jax.checkpoints import download, remote

from .bucket import BLOCK, PATH, Blob, files, random_bytes, refused, start

pytestmark = pytest.mark.usefixtures("cache")


def test_a_cut_connection_is_resumed_where_it_broke(bucket, cache):
    body = random_bytes(30 * BLOCK + 7)
    bucket.blobs[PATH] = Blob(body, break_after=[10 * BLOCK, 5 * BLOCK + 1234])
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert bucket.sent == [10 * BLOCK, 5 * BLOCK + 1234, 15 * BLOCK + 7]
    assert [x.get("Range") for x in bucket.requests] == [
        None,
        f"bytes={10 * BLOCK}-",
        f"bytes={15 * BLOCK}-",
    ]
    assert [x.get("If-Range") for x in bucket.requests] == [None, '"first"', '"first"']
    assert files(cache) == [PATH[1:]]


def test_what_came_is_kept_for_the_next_call(bucket, cache):
    body = random_bytes(10 * BLOCK)
    bucket.blobs[PATH] = blob = Blob(body, break_after=[4 * BLOCK, 0, 0, 0])
    way_out = f"put ViT-B_16.npz from {bucket.url}{PATH} at {cache / PATH[1:]}"
    with refused("ViT-B_16 is not in the cache", "broke off", "262,144 bytes", way_out):
        remote.fetch("ViT-B_16")
    assert (cache / f"{PATH[1:]}.partial").read_bytes() == body[: 4 * BLOCK]
    assert not blob.break_after  # It tried as often as it should, no more.
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert bucket.sent == [4 * BLOCK, 0, 0, 0, 6 * BLOCK]
    assert files(cache) == [PATH[1:]]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_a_file_that_changed_meanwhile_is_begun_anew(bucket, cache, ignores_if_range):
    old, new = random_bytes(500_000, 1), random_bytes(600_000, 2)
    bucket.blobs[PATH] = Blob(old, break_after=[3 * BLOCK, 0, 0, 0])
    with refused("196,608 bytes"):
        remote.fetch("ViT-B_16")
    bucket.blobs[PATH] = Blob(new, etag='"second"', ignores_if_range=ignores_if_range)
    assert remote.fetch("ViT-B_16").read_bytes() == new
    assert files(cache) == [PATH[1:]]


def test_a_file_that_shrank_meanwhile_is_begun_anew(bucket):
    new = random_bytes(100_000, 2)
    bucket.blobs[PATH] = Blob(random_bytes(500_000), break_after=[3 * BLOCK, 0, 0, 0])
    with refused("196,608 bytes"):
        remote.fetch("ViT-B_16")
    bucket.blobs[PATH] = Blob(new, etag='"second"', ignores_if_range=True)
    assert remote.fetch("ViT-B_16").read_bytes() == new
    assert bucket.sent[-1] == 100_000


def test_an_unfinished_download_of_unknown_origin_is_begun_anew(bucket, cache):
    body = random_bytes(300_000)
    bucket.blobs[PATH] = Blob(body)
    partial = cache / f"{PATH[1:]}.partial"
    partial.parent.mkdir(parents=True)
    for note in (None, "not json", '{"etag": 1}', "[]"):
        partial.write_bytes(b"x" * 1000)
        if note is not None:
            pathlib.Path(f"{partial}.json").write_text(note)
        path = remote.fetch("ViT-B_16")
        assert path.read_bytes() == body
        assert files(cache) == [PATH[1:]]
        path.unlink()


def test_a_killed_process_leaves_what_the_next_one_finishes(bucket, cache):
    body = random_bytes(2_000_000)
    bucket.blobs[PATH] = blob = Blob(body, pace=0.02)
    with start("ViT-B_16") as process:
        deadline = time.time() + 60
        while sum(bucket.sent) < 500_000 and time.time() < deadline:
            time.sleep(0.01)
        process.kill()
    blob.pace = 0
    assert not (cache / PATH[1:]).exists()
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert "Range" in bucket.requests[-1]
    assert files(cache) == [PATH[1:]]


def test_everything_is_there_but_the_rename(bucket, cache):
    body = random_bytes(2 * BLOCK)
    bucket.blobs[PATH] = Blob(body, break_after=[BLOCK, 0, 0, 0])
    with refused("65,536 bytes"):
        remote.fetch("ViT-B_16")
    with open(cache / f"{PATH[1:]}.partial", "ab") as file:
        file.write(body[BLOCK:])
    asked = len(bucket.requests)
    assert remote.fetch("ViT-B_16").read_bytes() == body
    assert len(bucket.requests) == asked


def test_a_wrong_md5_deletes_what_came(bucket, cache):
    bucket.blobs[PATH] = Blob(random_bytes(1000), hashes="md5=1B2M2Y8AsgTpgAmY7PhCfg==")
    with refused("ViT-B_16 is not what was published", "not 1B2M2Y8AsgTpgAmY7PhCfg==", "deleted"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_one_altered_byte_is_found_after_a_resume(bucket, cache):
    body = random_bytes(1_000_000)
    bucket.blobs[PATH] = Blob(body, break_after=[6 * BLOCK, 0, 0, 0])
    with refused("393,216 bytes"):
        remote.fetch("ViT-B_16")
    with open(cache / f"{PATH[1:]}.partial", "r+b") as file:
        file.seek(123_456)
        file.write(bytes([body[123_456] ^ 1]))
    with refused("MD5"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []
    assert remote.fetch("ViT-B_16").read_bytes() == body


def test_crc32c_counts_where_there_is_no_md5(bucket, cache):
    pytest.importorskip("google_crc32c", reason="needs google-crc32c", exc_type=ImportError)
    # The check value of CRC-32C, 0xE3069283 for "123456789": RFC 3720, appendix B.4, and others.
    right = base64.b64encode(bytes.fromhex("E3069283")).decode()
    bucket.blobs[PATH] = Blob(b"123456789", hashes=f"crc32c={right}")
    assert remote.fetch("ViT-B_16").read_bytes() == b"123456789"
    (cache / PATH[1:]).unlink()
    bucket.blobs[PATH] = Blob(b"123456788", hashes=f"crc32c={right}")
    with refused("CRC32C", f"not {right}"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_both_checksums_in_one_header(bucket):
    body = random_bytes(1000)
    md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
    bucket.blobs[PATH] = Blob(body, hashes=f"crc32c=AAAAAA==, md5={md5}")
    assert remote.fetch("ViT-B_16").read_bytes() == body


def test_without_a_checksum_it_says_so(bucket, capsys):
    bucket.blobs[PATH] = Blob(b"x", hashes="")
    remote.fetch("ViT-B_16")
    assert "ViT-B_16 could not be verified" in capsys.readouterr().err


def test_a_login_page_is_not_taken_for_the_bucket(bucket, cache, monkeypatch):
    monkeypatch.setattr(remote, "_BUCKET_URL", bucket.url)
    bucket.blobs[PATH] = Blob(b"<html>Please log in", hashes="")
    with refused("ViT-B_16 is not in the cache", "login page", "put ViT-B_16.npz at"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_the_checksum_of_a_compressed_original_is_not_held_against_it(bucket, capsys):
    bucket.blobs[PATH] = Blob(b"x", hashes="md5=1B2M2Y8AsgTpgAmY7PhCfg==", encoding="gzip")
    assert remote.fetch("ViT-B_16").read_bytes() == b"x"
    assert "could not be verified" in capsys.readouterr().err


def test_a_length_that_never_comes(bucket, cache):
    bucket.blobs[PATH] = Blob(b"0123456789", claimed=15)
    with refused("127.0.0.1 broke off"):
        remote.fetch("ViT-B_16")
    assert not (cache / PATH[1:]).exists()


def test_a_file_cut_short_by_its_length_is_not_taken(bucket, cache):
    bucket.blobs[PATH] = Blob(b"0123456789", claimed=7)
    with refused("is not what was published", "MD5"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_a_length_counts_where_there_is_no_checksum(bucket, cache):
    bucket.blobs[PATH] = Blob(b"0123456789", claimed=7, stored_length=10, hashes="")
    with refused("is not what was published (7 bytes came, not 10)"):
        remote.fetch("ViT-B_16")
    assert files(cache) == []


def test_a_server_out_of_breath_is_asked_again(bucket):
    bucket.blobs[PATH] = Blob(b"x", statuses=[503, 429, 500])
    assert remote.fetch("ViT-B_16").read_bytes() == b"x"


def test_a_server_that_stays_down_is_given_up(bucket, cache):
    bucket.blobs[PATH] = Blob(b"x", statuses=[503] * 10)
    with refused("127.0.0.1 answers with HTTP status 503", "put ViT-B_16.npz"):
        remote.fetch("ViT-B_16")
    assert len(bucket.requests) == download._ATTEMPTS
    assert files(cache) == []


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_not_in_the_bucket_is_not_asked_for_twice(status, bucket, cache):
    bucket.blobs["/augreg/x.npz"] = Blob(b"x", statuses=[status] * 10)
    with refused("augreg/x is not", f"{bucket.url}/augreg/x.npz", f"status {status}", "check"):
        remote.fetch("augreg/x")
    assert len(bucket.requests) == 1
    assert files(cache) == []


def test_two_processes_fetch_one_file_once(bucket, cache):
    body = random_bytes(1_000_000)
    bucket.blobs[PATH] = Blob(body, pace=0.02)
    with start("ViT-B_16") as first, start("ViT-B_16") as second, start("ViT-B_16") as third:
        outputs = [process.communicate(timeout=60) for process in (first, second, third)]
    assert [out for out, _ in outputs] == [f"{cache / PATH[1:]}\n"] * 3
    assert (cache / PATH[1:]).read_bytes() == body
    assert bucket.sent == [len(body)]
    assert files(cache) == [PATH[1:]]


def test_the_waiting_process_takes_over_from_a_killed_one(bucket, cache):
    body = random_bytes(1_000_000)
    bucket.blobs[PATH] = Blob(body, pace=0.02)
    with start("ViT-B_16") as first:
        while not bucket.sent:
            time.sleep(0.01)
        with start("ViT-B_16") as second:
            assert "another process fetches" in second.stderr.readline()
            first.kill()
            out, _ = second.communicate(timeout=60)
    assert out == f"{cache / PATH[1:]}\n"
    assert (cache / PATH[1:]).read_bytes() == body


def test_the_waiting_process_begins_anew_what_another_found_corrupt(bucket, cache):
    body = random_bytes(500_000)
    bucket.blobs[PATH] = Blob(body, pace=0.02, hashes="md5=1B2M2Y8AsgTpgAmY7PhCfg==")
    with start("ViT-B_16") as first:
        while not bucket.sent:
            time.sleep(0.01)
        bucket.blobs[PATH] = Blob(body)
        with start("ViT-B_16") as second:
            assert "another process fetches" in second.stderr.readline()
            assert "is not what was published" in first.communicate(timeout=60)[1]
            out, _ = second.communicate(timeout=60)
    assert out == f"{cache / PATH[1:]}\n"
    assert (cache / PATH[1:]).read_bytes() == body
    assert files(cache) == [PATH[1:]]


def test_a_disk_that_is_full_is_one_line(bucket, cache):

    body = random_bytes(2_000_000)
    bucket.blobs[PATH] = Blob(body)

    def limit():  # A file that may not grow fails like a disk without room.
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    with start("ViT-B_16", preexec_fn=limit) as process:
        _, error = process.communicate(timeout=60)
    last = error.splitlines()[-1]
    assert f"UserError: ViT-B_16 cannot be written to {cache / 'imagenet21k'} (File too" in last
    assert "VIT_JAX_CACHE" in last
    assert not (cache / PATH[1:]).exists()
    assert remote.fetch("ViT-B_16").read_bytes() == body


@pytest.mark.usefixtures("bucket")
def test_a_cache_that_is_no_directory_is_one_line(cache):
    cache.write_text("a file")
    with refused("ViT-B_16 cannot be written to", "VIT_JAX_CACHE"):
        remote.fetch("ViT-B_16")
