"""Counting, order, sharding over processes and resuming of batches."""

import collections
import dataclasses
import itertools
import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vit_jax.data.datasets import Source, open_dataset
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError

from ..sources import InMemory, png

TRAIN = {
    "image_size": 8,
    "protocol": "inception",
    "random_crop": True,
    "random_flip": True,
}
EVAL = {"preprocessing": evaluation("inception", image_size=8)}


def tiny_source(count):
    """Images of which each is one gray value, its label."""
    examples = [
        {
            "image": png(np.full((3, 4), label, np.uint8)),
            "label": label,
            "id": f"record {label}",
        }
        for label in range(count)
    ]
    return Source("tiny", "test", ("x",) * count, 0, InMemory(examples))


def damaged(source, broken):
    examples = [
        example | {"image": b"\x89PNG\r\n\x1a\n"} if example["label"] in broken else example
        for example in source
    ]
    return dataclasses.replace(source, examples=InMemory(examples))


@pytest.fixture(scope="module")
def sharded(sharded_dir):
    return open_dataset("many_shards", data_dir=sharded_dir)[0]


def take(source, steps, batch_size=8, **options):
    options = TRAIN | {"seed": 0} | options
    return list(itertools.islice(train_batches(source, batch_size=batch_size, **options), steps))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def by_label(batches):
    return {
        label: image
        for batch in batches
        for label, image in zip(batch["label"], batch["image"], strict=True)
    }


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        for key in ["image", "label"]:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize(
    "count, batch_size, processes",
    [(1, 8, 4), (7, 8, 1), (8, 8, 2), (9, 8, 4), (23, 6, 3), (24, 6, 6), (5, 1, 1)],
)
def test_every_image_is_counted_once_in_evaluation(count, batch_size, processes):
    seen = []
    for process in range(processes):
        batches = eval_batches(
            tiny_source(count),
            batch_size=batch_size,
            process_index=process,
            process_count=processes,
            **EVAL,
        )
        assert len(batches) == len(list(batches)) == -(-count // batch_size)
        for batch in batches:
            assert batch["image"].shape == (batch_size // processes, 8, 8, 3)
            assert set(batch["mask"]) <= {0.0, 1.0}
            real = batch["mask"] == 1
            np.testing.assert_allclose(
                batch["image"][real, 0, 0, 0] * 127.5 + 127.5, batch["label"][real], atol=1e-4
            )
            seen.extend(batch["label"][real])
    assert sorted(seen) == list(range(count))


def test_batches_have_the_promised_types(sharded):
    (batch,) = take(sharded, 1)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    assert batch["image"].shape == (8, 8, 8, 3)
    assert batch["image"].min() < 64 and batch["image"].max() > 192
    batch = next(iter(eval_batches(sharded, batch_size=8, **EVAL)))
    assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)
    assert -1 <= batch["image"].min() < -0.5 < 0.5 < batch["image"].max() <= 1
    assert batch["mask"].dtype == np.float32


def test_several_labels_an_image_are_floats_by_class():
    rows = np.eye(3, dtype=np.int64)[[0, 1, 2, 0, 1]] + np.eye(3, dtype=np.int64)[1]
    source = tiny_source(5)
    examples = [example | {"label": row} for example, row in zip(source, rows, strict=True)]
    source = dataclasses.replace(source, examples=InMemory(examples), multi_label=True)
    (batch,) = take(source, 1, batch_size=5)
    assert (batch["label"].dtype, batch["label"].shape) == (np.float32, (5, 3))
    assert sorted(batch["label"].tolist()) == sorted(rows.tolist())
    for process in range(4):  # The last has no image of the second batch.
        options = {"process_index": process, "process_count": 4}
        found = list(eval_batches(source, batch_size=4, **options, **EVAL))
        assert {x["label"].dtype for x in found} == {np.dtype(np.float32)}
        assert [x["label"].shape for x in found] == [(1, 3)] * 2
        np.testing.assert_array_equal(found[0]["label"][0], rows[process])


def test_each_epoch_is_another_permutation(sharded):
    epochs = labels(take(sharded, 15, batch_size=10)).reshape(3, 50)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(50), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other_seed = labels(take(sharded, 5, batch_size=10, seed=1))
    assert (other_seed != epochs[0]).any()


def test_reading_again_is_bit_identical(sharded):
    assert_same(take(sharded, 14), take(sharded, 14))


@pytest.mark.parametrize("first_step", [1, 6, 7, 13])  # an epoch ends within step 6
def test_resuming_equals_the_tail(sharded, first_step):
    whole = take(sharded, 16)
    tail = take(sharded, 16 - first_step, first_step=first_step)
    assert_same(tail, whole[first_step:])


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all_processes_make_the_same_global_batch(sharded, processes):
    parts = [
        take(sharded, 8, process_index=process, process_count=processes)
        for process in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in ["image", "label"]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(sharded, 8))


def test_augmentation_differs_between_epochs(sharded):
    first, second = by_label(take(sharded, 5, 10)), by_label(take(sharded, 5, 10, first_step=5))
    assert all((first[label] != second[label]).any() for label in range(50))


def test_without_randomness_training_sees_what_evaluation_sees(sharded):
    trained = by_label(take(sharded, 5, 10, random_crop=False, random_flip=False))
    evaluated = by_label(eval_batches(sharded, batch_size=10, **EVAL))
    for label in range(50):
        # Rounded to 8 bits.
        levels = (evaluated[label] + 1) * 127.5
        np.testing.assert_allclose(trained[label], levels, atol=0.5 + 1e-4)


def test_skipped_images_are_not_decoded():
    source = tiny_source(16)
    early = labels(take(source, 1))
    source = damaged(source, early)
    with pytest.raises(UserError):
        take(source, 1)
    assert len(take(source, 1, first_step=1)) == 1


def test_broken_record_is_named():
    with pytest.raises(
        UserError, match="^image record 5 is not an image: give one of JPEG,[^\\n]*$"
    ):
        take(damaged(tiny_source(9), [5]), 2)


def of_bytes(encoded):
    example = {"image": encoded, "label": 0, "id": "the one"}
    return Source("tiny", "train", ("a",), len(encoded), InMemory([example]))


@pytest.mark.parametrize(
    "encoded", [b"BM", b"BM" + bytes(200), b"RIFF\0\0\0\0WEBPVP8X" + bytes(40)]
)
def test_a_broken_image_that_pil_decodes_is_named(encoded):
    with pytest.raises(UserError, match="^image the one is (damaged|not an image)[^\\n]*$"):
        list(eval_batches(of_bytes(encoded), batch_size=1, **EVAL))


def test_the_dct_of_the_config_is_that_of_training():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    import tensorflow as tf

    source = of_bytes(tf.io.encode_jpeg(noise, quality=80).numpy())
    options = {"random_crop": False, "random_flip": False}
    for jpeg_dct, dct_method in (("accurate", "INTEGER_ACCURATE"), ("fast", "INTEGER_FAST")):
        (batch,) = take(source, 1, 1, jpeg_dct=jpeg_dct, **options)
        decoded = tf.io.decode_jpeg(source[0]["image"], dct_method=dct_method)
        (expected,) = take(of_bytes(png(decoded.numpy())), 1, 1, **options)
        np.testing.assert_array_equal(batch["image"], expected["image"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size 6"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"protocol": "inceptoin"}, "'inceptoin'"),
    ],
)
def test_wrong_options_are_refused_before_the_first_batch(wrong, message):
    options = TRAIN | {"batch_size": 8, "seed": 0} | wrong
    with pytest.raises(UserError, match=message):
        train_batches(tiny_source(9), **options)


RANDAUGMENT = {"num_operations": 2, "magnitude": 15}


def test_randaugment_depends_on_seed_and_position_alone(sharded):
    whole = take(sharded, 9, **RANDAUGMENT)
    assert_same(take(sharded, 9, **RANDAUGMENT), whole)
    # Another step to begin with, in the second epoch, and another number of processes.
    assert_same(take(sharded, 2, first_step=7, **RANDAUGMENT), whole[7:])
    parts = [take(sharded, 9, process_index=i, process_count=2, **RANDAUGMENT) for i in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(
            np.concatenate([half["image"] for half in halves]), batch["image"]
        )
    plain = take(sharded, 9)
    np.testing.assert_array_equal(labels(plain), labels(whole))
    changed = [
        (one != other).any()
        for before, after in zip(plain, whole, strict=True)
        for one, other in zip(before["image"], after["image"], strict=True)
    ]
    assert np.mean(changed) > 0.8
    other_seed = take(sharded, 1, seed=1, **RANDAUGMENT)
    assert (other_seed[0]["image"] != whole[0]["image"]).any()


def test_each_process_reads_its_own_rows_alone():
    batches = labels(take(tiny_source(40), 20)).reshape(20, 4, 2)  # two rows of each of four
    for process in range(4):
        source = tiny_source(40)
        read = source.examples.read
        rows = train_batches(
            source, batch_size=8, seed=0, process_index=process, process_count=4, **TRAIN
        )
        next(rows)
        rows.close()
        own = batches[:, process].ravel().tolist()
        # Threads are ahead of each other by an image or two, and of what is asked for by some.
        assert 2 <= len(read) <= 20
        assert collections.Counter(read) <= collections.Counter(own[: len(read) + 8])


def test_a_far_step_is_reached_without_reading_what_comes_before():
    source = tiny_source(40)
    batches = train_batches(source, batch_size=8, seed=0, first_step=10**9, **TRAIN)
    assert len(next(batches)["label"]) == 8
    batches.close()
    assert len(source.examples.read) <= 8 + 8 * 8


def test_every_order_is_as_likely_and_no_epoch_is_that_of_another_seed():
    source = tiny_source(3)
    options = TRAIN | {"random_crop": False, "random_flip": False}
    orders = [
        tuple(labels(list(itertools.islice(train_batches(
            source, batch_size=3, seed=seed, **options), 3))))
        for seed in range(200)
    ]  # fmt: skip
    epochs = [order[i : i + 3] for order in orders for i in (0, 3, 6)]
    counts = np.unique([6 * a + b for a, b, _ in epochs], return_counts=True)[1]
    # Six orders in 600 epochs: 100 each, with a deviation of 9.1.
    assert len(counts) == 6 and np.abs(counts - 100).max() < 5 * 9.1
    follows = sum(one[3:6] == other[:3] for one, other in itertools.pairwise(orders))
    assert abs(follows - 199 / 6) < 5 * 5.3


def test_worker_processes_make_the_same_batches_and_end_with_them(sharded, image_folder):
    expected = take(sharded, 9, first_step=3)
    batches = train_batches(sharded, batch_size=8, seed=0, first_step=3, workers=2, **TRAIN)
    assert_same(list(itertools.islice(batches, 9)), expected)
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    batches.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    source, _ = open_dataset(f"folder:{image_folder}")
    for path in image_folder.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    batches = train_batches(source, batch_size=8, seed=0, workers=1, **TRAIN)
    with pytest.raises(UserError, match=rf"^image {image_folder}/[^\n]* is damaged [^\n]*$"):
        next(batches)


def test_no_thread_outlives_the_batches():
    before = threading.active_count()
    batches = train_batches(tiny_source(9), batch_size=4, seed=0, **TRAIN)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_the_input_and_the_evaluators_import_no_tensorflow(sharded_dir):
    program = (
        "import sys, vit_jax.evaluation.registry; "
        "from vit_jax.data.datasets import open_dataset; "
        "from vit_jax.data.pipeline import train_batches; "
        "options = dict(image_size=8, protocol='pad', random_crop=True, random_flip=True); "
        "sources = [open_dataset(name, data_dir=sys.argv[1])[0] for name in sys.argv[2:]]; "
        "[next(train_batches(x, batch_size=4, seed=0, **options)) for x in sources]; "
        "sys.exit('tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", program, sharded_dir, "many_shards", "digits"]
    assert subprocess.run(command).returncode == 0
