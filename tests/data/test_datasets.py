"""Splits of the paper's data sets, and the errors for what cannot be opened."""

import pytest
import tensorflow_datasets as tfds

from vit_jax.data.datasets import open_dataset
from vit_jax.errors import UserError


@pytest.mark.parametrize(
    "name, usual, development, num_classes",
    [
        ("imagenet2012", ("train", "validation"), ("train[:99%]", "train[99%:]"), 1000),
        ("cifar10", ("train", "test"), ("train[:98%]", "train[98%:]"), 10),
        ("cifar100", ("train", "test"), ("train[:98%]", "train[98%:]"), 100),
        ("oxford_iiit_pet", ("train", "test"), ("train[:90%]", "train[90%:]"), 37),
        (
            "oxford_flowers102",
            ("train+validation", "test"),
            ("train[:90%]+validation[:90%]", "train[90%:]+validation[90%:]"),
            102,
        ),
    ],
)
def test_the_papers_data_sets_have_the_papers_splits(name, usual, development, num_classes):
    with tfds.testing.mock_data(num_examples=5):
        for sources, splits in [
            (open_dataset(name), usual),
            (open_dataset(name, development=True), development),
        ]:
            assert tuple(source.split for source in sources) == splits
            for source in sources:
                assert source.num_examples == 5
                assert len(source.class_names) == num_classes
                assert len(list(source.records())) == 5


def test_development_halves_partition_train(sharded_dir):
    train, held_out = open_dataset("many_shards", data_dir=sharded_dir, development=True)
    labels = [{int(r["label"]) for r in source.records()} for source in (train, held_out)]
    assert [len(part) for part in labels] == [45, 5]
    assert labels[0] | labels[1] == set(range(50))


def test_prepared_directory_needs_no_registered_code(sharded_dir):
    assert "many_shards" not in tfds.list_builders()
    train, test = open_dataset("many_shards", data_dir=sharded_dir)
    assert (train.split, test.split) == ("train", "test")
    assert (train.num_examples, len(train.class_names)) == (50, 50)
    assert train.num_bytes > 50 * 12 * 9


def test_given_splits_win(sharded_dir):
    train, test = open_dataset(
        "many_shards:1.*.*", data_dir=sharded_dir, train_split="test[:10]", eval_split="train[:20%]"
    )
    assert (train.split, train.num_examples) == ("test[:10]", 10)
    assert (test.split, test.num_examples) == ("train[:20%]", 10)


def refuse(name, **options):
    with pytest.raises(UserError) as caught:
        open_dataset(name, **options)
    message = str(caught.value)
    assert "\n" not in message and repr(name) in message
    return message


def test_misspelt_name_is_answered_with_the_nearest(tmp_path):
    message = refuse("cifar1O", data_dir=str(tmp_path))
    assert "cifar10" in message and str(tmp_path) in message


def test_unprepared_data_set_says_where_it_looked_and_what_to_do(tmp_path):
    message = refuse("imagenet2012", data_dir=str(tmp_path))
    assert repr(str(tmp_path)) in message
    assert "tfds.builder('imagenet2012', data_dir=" in message
    assert "download_and_prepare()" in message
    assert "--config configs/digits.py" in message


@pytest.mark.parametrize("name", ["cifar10:9.9.9", "cifar10/none", "not a name"])
def test_bad_version_config_and_syntax_are_one_line(name, tmp_path):
    refuse(name, data_dir=str(tmp_path))


def test_data_set_without_labels_names_its_features(tmp_path):
    assert "objects" in refuse("coco", data_dir=str(tmp_path))


@pytest.mark.parametrize("split", ["trian", "train[:0%]", "train[", "train[:200%]"])
def test_bad_splits_are_answered_with_the_names_there_are(sharded_dir, split):
    message = refuse("many_shards", data_dir=sharded_dir, train_split=split)
    assert repr(split) in message and "train, test" in message


def test_development_and_a_given_split_contradict(sharded_dir):
    with pytest.raises(UserError, match="development=True"):
        open_dataset("many_shards", data_dir=sharded_dir, development=True, eval_split="test")


def test_unwritable_data_dir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    refuse("digits", data_dir=str(tmp_path / "file" / "below"))
