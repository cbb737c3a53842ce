"""The weights of classes, and the labels that they are made of."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from sklearn.utils.class_weight import compute_class_weight

from vit_jax.data.class_weights import balanced_weights
from vit_jax.data.datasets import open_dataset, relabel
from vit_jax.errors import UserError

from ..sources import InMemory, tiny_source


def labeled(labels, names, **options):
    source, _, _ = tiny_source((1, 1), size=8)
    examples = InMemory([{"image": b"", "label": x, "id": str(i)} for i, x in enumerate(labels)])
    return dataclasses.replace(source, class_names=names, examples=examples, **options)


def test_the_weights_are_scikit_learns():
    labels = np.random.default_rng(0).choice([0, 1, 3], 60, p=[0.7, 0.2, 0.1])
    weights = balanced_weights(labeled(labels.tolist(), tuple("abcd")), num_classes=6)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(weights[[0, 1, 3]], expected, rtol=1e-6)
    # Of a class without an image, and of those that only the model has, nothing is known.
    np.testing.assert_array_equal(weights[[2, 4, 5]], 1)
    assert weights.dtype == np.float32
    assert weights[labels].mean() == pytest.approx(1, rel=1e-6)


def test_of_several_labels_what_is_there_weighs_as_much_as_what_is_not():
    labels = np.zeros((300, 5), np.int64)
    labels[:100, 0] = 1  # PyTorch's example: 100 and 200 are 2.
    labels[:240, 1] = 1
    labels[0, 2] = 1  # 299, of which 100 is left.
    labels[:, 4] = 1
    source = labeled(list(labels), tuple("abcde"), multi_label=True)
    weights = balanced_weights(source, num_classes=6)
    np.testing.assert_allclose(weights, [2, 0.25, 100, 1, 0.01, 1], rtol=1e-6)


def test_an_image_without_a_label_is_refused():
    with pytest.raises(UserError, match="needs a label of every image, and some of tiny have none"):
        balanced_weights(labeled([0, -1], ("a",)), 1)


def test_labels_are_those_of_the_examples(data_dir, tmp_path):
    digits, _ = open_dataset("digits", data_dir=data_dir)
    for i, name in enumerate(["rose", "aster", "rose", "iris"]):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{i}.png")
    folder, _ = open_dataset(f"folder:{tmp_path}")
    several = labeled([np.array([0, 1]), np.array([1, 1])], ("a", "b"), multi_label=True)
    for source in (digits.select(np.array([5, 3, 5])), folder, several):
        found = source.labels()
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, [example["label"] for example in source])
    moved = relabel(several, [2, 0], ("b", "x", "a"))
    np.testing.assert_array_equal(moved.labels(), [[1, 0, 0], [1, 0, 1]])
    assert moved.multi_label
    # Nothing is read to tell those of files.
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert sorted(folder.labels()) == [0, 1, 2, 2]
