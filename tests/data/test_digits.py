"""The digits against scikit-learn's own arrays."""

import collections
import multiprocessing

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from vit_jax.data.datasets import open_dataset
from vit_jax.data.digits import prepare_digits


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def read(source):
    return [
        (tf.io.decode_png(example["image"]).numpy(), int(example["label"]))
        for example in source.examples()
    ]


def test_all_1797_images_are_scikit_learns(data_dir):
    train, test = open_dataset("digits", data_dir=data_dir)
    assert (train.num_examples, test.num_examples) == (1442, 355)
    images = collections.Counter(
        (tuple(np.round(image.ravel() / 255 * 16).astype(int)), label)
        for image, label in read(train) + read(test)
    )
    digits = load_digits()
    assert images == collections.Counter(
        (tuple(pixels.astype(int)), int(label))
        for pixels, label in zip(digits.data, digits.target, strict=True)
    )


def test_values_fill_0_to_255_and_classes_are_balanced(data_dir):
    _, test = open_dataset("digits", data_dir=data_dir)
    images, labels = zip(*read(test), strict=True)
    assert images[0].shape == (8, 8, 1)
    assert (np.min(images), np.max(images)) == (0, 255)
    assert min(np.bincount(labels)) >= 34
    assert test.class_names == tuple("0123456789")


def _prepare(data_dir, barrier):
    barrier.wait()
    assert prepare_digits(data_dir).is_prepared()


def test_two_processes_can_prepare_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_prepare, args=(str(tmp_path), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert open_dataset("digits", data_dir=str(tmp_path))[0].num_examples == 1442


def test_what_a_killed_process_left_is_ignored(tmp_path):
    left = tmp_path / "digits" / "incomplete.ABC123_1.0.0"
    left.mkdir(parents=True)
    (left / "digits-train.tfrecord-00000-of-00001").write_bytes(b"half")
    assert open_dataset("digits", data_dir=str(tmp_path))[0].num_examples == 1442
