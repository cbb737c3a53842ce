"""The digits against scikit-learn's own arrays."""

import collections

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from vit_jax.data.datasets import open_dataset


def read(source):
    return [(tf.io.decode_png(example["image"]).numpy(), example["label"]) for example in source]


def test_all_1797_images_are_scikit_learns():
    train, test = open_dataset("digits")
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


def test_every_fifth_of_each_digit_is_in_the_test_split():
    digits = load_digits()
    expected = []
    for digit in range(10):
        expected += np.flatnonzero(digits.target == digit)[4::5].tolist()
    _, test = open_dataset("digits")
    found = test.ids()
    assert found == [example["id"] for example in test]
    assert sorted(found) == sorted(f"digits {index}" for index in expected)


def test_values_fill_0_to_255_and_classes_are_balanced():
    _, test = open_dataset("digits")
    images, labels = zip(*read(test), strict=True)
    assert images[0].shape == (8, 8, 1)
    assert (np.min(images), np.max(images)) == (0, 255)
    assert min(np.bincount(labels)) >= 34
    assert test.class_names == tuple("0123456789")


def test_a_slice_holds_every_digit():
    train, rest = open_dataset("digits", development=True)
    assert (train.num_examples, rest.num_examples) == (1298, 144)
    assert not set(train.ids()) & set(rest.ids())
    # Of 144 images 14.4 of each digit, with a deviation of 3.4.
    counts = np.bincount([example["label"] for example in rest])
    assert np.abs(counts - 14.4).max() < 4 * 3.4


def test_nothing_is_written(tmp_path):
    open_dataset("digits", data_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
