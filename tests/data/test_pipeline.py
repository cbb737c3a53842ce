"""Counting, order, sharding over processes and resuming of batches."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.data.datasets import Source, open_dataset
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError

TRAIN = {
    "image_size": 8,
    "protocol": "inception",
    "random_crop": True,
    "random_flip": True,
    "shuffle_buffer": 7,
}
EVAL = {"preprocessing": evaluation("inception", image_size=8)}


def tiny_source(count):
    """Images of which each is one gray value, its label."""
    images = [
        tf.io.encode_png(np.full((3, 4, 1), label, np.uint8)).numpy() for label in range(count)
    ]

    def examples(seed=None):
        dataset = tf.data.Dataset.from_tensor_slices(
            {
                "image": images,
                "label": np.arange(count, dtype=np.int64),
                "id": [f"record {label}" for label in range(count)],
            }
        )
        return dataset if seed is None else dataset.shuffle(count, seed)

    return Source("tiny", "test", ("x",) * count, count, 0, examples)


def damaged(source, broken):
    def damage(example):
        is_broken = tf.reduce_any(example["label"] == np.array(broken, np.int64))
        return example | {"image": tf.where(is_broken, b"\x89PNG\r\n\x1a\n", example["image"])}

    return dataclasses.replace(source, examples=lambda seed=None: source.examples(seed).map(damage))


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
    assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)
    assert batch["image"].shape == (8, 8, 8, 3)
    assert -1 <= batch["image"].min() < -0.5 < 0.5 < batch["image"].max() <= 1
    assert next(iter(eval_batches(sharded, batch_size=8, **EVAL)))["mask"].dtype == np.float32


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_each_epoch_is_another_permutation(sharded, cache):
    epochs = labels(take(sharded, 15, batch_size=10, cache=cache)).reshape(3, 50)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(50), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other_seed = labels(take(sharded, 5, batch_size=10, cache=cache, seed=1))
    assert (other_seed != epochs[0]).any()


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_reading_again_is_bit_identical(sharded, cache):
    assert_same(take(sharded, 14, cache=cache), take(sharded, 14, cache=cache))


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("first_step", [1, 6, 7, 13])  # an epoch ends within step 6
def test_resuming_equals_the_tail(sharded, cache, first_step):
    whole = take(sharded, 16, cache=cache)
    tail = take(sharded, 16 - first_step, cache=cache, first_step=first_step)
    assert_same(tail, whole[first_step:])


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all_processes_make_the_same_global_batch(sharded, cache, processes):
    parts = [
        take(sharded, 8, cache=cache, process_index=process, process_count=processes)
        for process in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in ["image", "label"]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(sharded, 8, cache=cache))


def test_augmentation_differs_between_epochs(sharded):
    first, second = by_label(take(sharded, 5, 10)), by_label(take(sharded, 5, 10, first_step=5))
    assert all((first[label] != second[label]).any() for label in range(50))


def test_without_randomness_training_sees_what_evaluation_sees(sharded):
    trained = by_label(take(sharded, 5, 10, random_crop=False, random_flip=False))
    evaluated = by_label(eval_batches(sharded, batch_size=10, **EVAL))
    for label in range(50):
        np.testing.assert_array_equal(trained[label], evaluated[label])


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_skipped_images_are_not_decoded(cache):
    source = tiny_source(16)
    early = labels(take(source, 1, cache=cache))
    source = damaged(source, early)
    with pytest.raises(UserError):
        take(source, 1, cache=cache)
    assert len(take(source, 1, cache=cache, first_step=1)) == 1


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_broken_record_is_named(cache):
    with pytest.raises(UserError, match="image record 5 cannot be decoded"):
        take(damaged(tiny_source(9), [5]), 2, cache=cache)


def of_bytes(encoded):
    def examples(seed=None):  # noqa: ARG001
        example = {"image": encoded, "label": np.int64(0), "id": "the one"}
        return tf.data.Dataset.from_tensors(example)

    return Source("tiny", "train", ("a",), 1, len(encoded), examples)


@pytest.mark.parametrize(
    "encoded", [b"BM", b"BM" + bytes(200), b"RIFF\0\0\0\0WEBPVP8X" + bytes(40)]
)
def test_a_broken_image_that_pil_decodes_is_named(encoded):
    with pytest.raises(UserError, match="image the one cannot be decoded"):
        list(eval_batches(of_bytes(encoded), batch_size=1, **EVAL))


def test_the_dct_of_the_config_is_that_of_training():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    source = of_bytes(tf.io.encode_jpeg(noise, quality=80).numpy())
    options = {"random_crop": False, "random_flip": False}
    for jpeg_dct, dct_method in (("accurate", "INTEGER_ACCURATE"), ("fast", "INTEGER_FAST")):
        (batch,) = take(source, 1, 1, jpeg_dct=jpeg_dct, **options)
        decoded = tf.io.decode_jpeg(source_bytes(source), dct_method=dct_method)
        (expected,) = take(of_bytes(tf.io.encode_png(decoded).numpy()), 1, 1, **options)
        np.testing.assert_array_equal(batch["image"], expected["image"])


def source_bytes(source):
    return next(iter(source.examples()))["image"]


def test_imagenet_streams_under_mock_data():
    with tfds.testing.mock_data(num_examples=5):
        train, _ = open_dataset("imagenet2012")
        batches = take(train, 3, batch_size=4, cache="disk")
    assert [batch["image"].shape for batch in batches] == [(4, 8, 8, 3)] * 3


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size 6"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"protocol": "inceptoin"}, "'inceptoin'"),
        ({"cache": "yes"}, "'yes'"),
    ],
)
def test_wrong_options_are_refused_before_the_first_batch(wrong, message):
    options = TRAIN | {"batch_size": 8, "seed": 0} | wrong
    with pytest.raises(UserError, match=message):
        train_batches(tiny_source(9), **options)


RANDAUGMENT = {"num_operations": 2, "magnitude": 15}


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_randaugment_depends_on_seed_and_position_alone(sharded, cache):
    whole = take(sharded, 9, cache=cache, **RANDAUGMENT)
    assert_same(take(sharded, 9, cache=cache, **RANDAUGMENT), whole)
    # Another step to begin with, in the second epoch, and another number of processes.
    assert_same(take(sharded, 2, cache=cache, first_step=7, **RANDAUGMENT), whole[7:])
    parts = [
        take(sharded, 9, cache=cache, process_index=i, process_count=2, **RANDAUGMENT)
        for i in range(2)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(
            np.concatenate([half["image"] for half in halves]), batch["image"]
        )
    plain = take(sharded, 9, cache=cache)
    np.testing.assert_array_equal(labels(plain), labels(whole))
    changed = [
        (one != other).any()
        for before, after in zip(plain, whole, strict=True)
        for one, other in zip(before["image"], after["image"], strict=True)
    ]
    assert np.mean(changed) > 0.8
    other_seed = take(sharded, 1, cache=cache, seed=1, **RANDAUGMENT)
    assert (other_seed[0]["image"] != whole[0]["image"]).any()
