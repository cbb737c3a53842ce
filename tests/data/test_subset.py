"""Which images a subset has, whatever way they are read."""

import dataclasses
import itertools
import os
import shutil

import numpy as np
import pytest

from vit_jax.data.datasets import open_dataset
from vit_jax.data.pipeline import train_batches
from vit_jax.data.subset import parse_subset, take_subset
from vit_jax.errors import UserError

from ..sources import InMemory


@pytest.fixture(scope="module")
def sharded(sharded_dir):
    return open_dataset("many_shards", data_dir=sharded_dir)[0]


@pytest.fixture
def photos(image_folder):
    return open_dataset(f"folder:{image_folder}")[0]


def ids(source):
    return [example["id"] for example in source]


def test_the_ids_are_known_without_reading(sharded, sharded_dir, photos):
    development, _ = open_dataset("many_shards", data_dir=sharded_dir, development=True)
    both, _ = open_dataset("many_shards", data_dir=sharded_dir, train_split="test[3:]+train[:71%]")
    for source in (sharded, development, both, photos):
        expected = source.ids()
        assert len(expected) == source.num_examples
        assert expected == ids(source)


@pytest.mark.parametrize(
    ("subset", "count"),
    [("1", 1), ("7", 7), ("50", 50), ("2%", 1), ("10%", 5), ("33.3%", 17), ("100%", 50)],
)
def test_the_count_is_exact(sharded, subset, count):
    source = take_subset(sharded, subset)
    assert source.num_examples == len(ids(source)) == len(set(ids(source))) == count
    assert set(ids(source)) <= set(ids(sharded))
    assert source.num_bytes == sharded.num_bytes * count // 50


def test_a_smaller_subset_lies_within_a_larger_one_of_the_same_seed(sharded, photos):
    for source in (sharded, photos):
        sets = [set(ids(take_subset(source, f"{p}%", seed=3))) for p in (5, 10, 30, 90, 100)]
        assert all(small < large for small, large in itertools.pairwise(sets))


def test_every_seed_makes_another_choice_in_which_all_images_are_as_likely(sharded):
    places = {name: place for place, name in enumerate(sharded.ids())}
    choices = np.zeros((1000, 50), bool)
    for seed, row in enumerate(choices):
        row[[places[name] for name in take_subset(sharded, "10", seed).ids()]] = True
    assert (choices.sum(1) == 10).all()
    assert len({choice.tobytes() for choice in choices}) == 1000
    # Each image is in a fifth of 1,000 choices, with a standard deviation of 12.6.
    assert np.abs(choices.sum(0) - 200).max() < 5 * 12.6
    # And two of them together in 10 / 50 * 9 / 49 of the choices: a deviation of 5.9.
    together = (choices.T.astype(int) @ choices)[np.triu_indices(50, 1)]
    assert np.abs(together - 1000 * 10 / 50 * 9 / 49).max() < 5.5 * 5.9


def test_choosing_reads_nothing(sharded, photos):
    for source in (sharded, photos):
        unread = InMemory([{"id": name} for name in source.ids()])
        subset = take_subset(dataclasses.replace(source, examples=unread), "10%")
        assert subset.num_examples == source.num_examples // 10
        assert unread.read == []


def test_files_that_are_not_chosen_are_not_read(photos):
    source = take_subset(photos, "12")
    kept = set(ids(source))
    for name in set(photos.ids()) - kept:
        os.remove(name)
    assert len(ids(source)) == 12


def test_a_folder_may_be_moved(image_folder, photos, tmp_path):
    moved = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(image_folder, moved)
    found = ids(take_subset(open_dataset(f"folder:{moved}")[0], "15"))
    here = ids(take_subset(photos, "15"))
    tail = [name.split("/")[-3:] for name in here]
    assert [name.split("/")[-3:] for name in found] == tail


def test_a_subset_keeps_the_order(sharded, photos):
    for source in (sharded, photos):
        kept = ids(take_subset(source, "20"))
        assert kept == [name for name in source.ids() if name in set(kept)]


def labels(source, steps=6, **options):
    batches = train_batches(
        source,
        batch_size=4,
        image_size=8,
        protocol="inception",
        random_crop=True,
        random_flip=True,
        seed=0,
        **options,
    )
    return [batch["label"] for batch in itertools.islice(batches, steps)]


def test_any_number_of_processes_sees_the_same_images(sharded):
    # 12 of 50 images, each of another label: an epoch is three batches.
    source = take_subset(sharded, "12")
    expected = sorted(example["label"] for example in source)
    epochs = np.concatenate(labels(source)).reshape(2, 12)
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert (epochs[0] != epochs[1]).any()
    parts = [labels(source, process_index=process, process_count=2) for process in range(2)]
    together = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(together), epochs.reshape(-1))
    tail = labels(source, steps=2, first_step=4)
    np.testing.assert_array_equal(np.concatenate(tail), epochs.reshape(6, 4)[4:].reshape(-1))


def test_all_of_it_is_the_data_set_itself(sharded):
    assert take_subset(sharded, "") is sharded
    np.testing.assert_array_equal(labels(sharded), labels(take_subset(sharded, "100%")))


def test_a_subset_of_a_subset_is_taken_from_it_alone(sharded, photos):
    for source in (sharded, photos):
        first = take_subset(source, "20")
        second = take_subset(first, "50%", seed=1)
        assert second.num_examples == len(ids(second)) == 10
        assert set(ids(second)) < set(ids(first))
        assert second.split == "train, 20 of it, 50% of it"


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ("51", "dataset.subset '51' is 51 of the 50 images of train: it must be at least one, and"),
        ("0.5%", "dataset.subset '0.5%' is 0 of the 50 images of train: it must be at least one"),
        ("a tenth", "dataset.subset 'a tenth' is not understood: use a number of images"),
    ],
)
def test_a_subset_that_cannot_be_had_is_refused(sharded, subset, message):
    with pytest.raises(UserError) as error:
        take_subset(sharded, subset)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_split_with_images_twice_has_no_subset(sharded_dir):
    source, _ = open_dataset("many_shards", data_dir=sharded_dir, train_split="train+train")
    with pytest.raises(UserError, match="has images more than once"):
        take_subset(source, "50%")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5000", 5000), ("10_000", 10_000), ("10%", 1 / 10), (" 0.5 %", 1 / 200), ("100%", 1)],
)
def test_subsets(text, expected):
    assert parse_subset(text) == pytest.approx(expected, rel=1e-15)
    assert isinstance(parse_subset(text), int) == ("%" not in text)


@pytest.mark.parametrize("text", ["", "0", "0%", "100.1%", "-5", "5.5", "_", "%", "ten", "1e3"])
def test_subsets_of_another_form_are_refused(text):
    with pytest.raises(UserError, match="is not understood: use a number of images, such as 5000"):
        parse_subset(text)
