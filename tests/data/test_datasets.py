"""Splits of the paper's data sets, and the errors for what cannot be opened."""

import re

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from experiments import paper
from vit_jax.data.datasets import (
    Source,
    name_or_path,
    open_dataset,
    open_evaluation,
    open_real,
    relabel,
)
from vit_jax.data.pipeline import eval_batches
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError

from .. import prepared
from ..sources import InMemory


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
def test_the_papers_data_sets_have_the_papers_splits(
    name, usual, development, num_classes, tmp_path
):
    noise = np.random.default_rng(0)
    parts = {"train", "validation", "test"} & set(re.findall(r"\w+", "+".join(usual)))
    examples = {part: prepared.random_examples(name, 100, noise) for part in parts}
    prepared.write(name, tmp_path, examples)
    percent = 100 - paper.HELD_OUT[name]
    parts_of_train = usual[0].count("+") + 1
    sizes = (
        (100 * parts_of_train, 100),
        (percent * parts_of_train, (100 - percent) * parts_of_train),
    )
    for options, splits, expected in zip(
        ({}, {"development": True}), (usual, development), sizes, strict=True
    ):
        sources = open_dataset(name, data_dir=str(tmp_path), **options)
        assert tuple(source.split for source in sources) == splits
        assert tuple(source.num_examples for source in sources) == expected
        for source in sources:
            assert len(source.class_names) == num_classes
            assert not source.turn  # As the published pipelines.
            assert len(list(source)) == source.num_examples


def test_development_halves_partition_train(sharded_dir):
    train, held_out = open_dataset("many_shards", data_dir=sharded_dir, development=True)
    labels = [{r["label"] for r in source} for source in (train, held_out)]
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


def test_evaluation_alone_opens_what_evaluation_in_training_does(sharded_dir):
    for split in ("", "train[:7]"):
        alone = open_evaluation("many_shards", data_dir=sharded_dir, split=split)
        _, usual = open_dataset("many_shards", data_dir=sharded_dir, eval_split=split)
        assert (alone.split, alone.num_examples) == (usual.split, usual.num_examples)


class OnlyTest(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two images to evaluate on, like ImageNetV2 and ImageNet-R."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": tfds.features.ClassLabel(names=["rose", "aster"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for index in range(2):
            yield index, {"image": np.zeros((8, 8, 3), np.uint8), "label": index}


def test_evaluation_alone_needs_no_other_split(tmp_path):
    OnlyTest(data_dir=tmp_path).download_and_prepare()
    source = open_evaluation("only_test", data_dir=str(tmp_path))
    assert (source.split, source.num_examples) == ("test", 2)
    assert source.class_names == ("rose", "aster")
    assert "train" in refuse("only_test", data_dir=str(tmp_path))


REAL_LABELS = [[3, 999], [], [0], [5, 6, 7]]


class Imagenet2012Real(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Four images with the features of the data set of this name in TFDS."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=1000)
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "original_label": label,
            "real_label": tfds.features.Sequence(label),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for index, labels in enumerate(REAL_LABELS):
            yield (
                index,
                {
                    "image": np.full((9, 8, 3), 60 * index, np.uint8),
                    "original_label": index,
                    "real_label": labels,
                    "file_name": f"{index}.JPEG",
                },
            )


@pytest.fixture(scope="module")
def real_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("real")
    Imagenet2012Real(data_dir=data_dir).download_and_prepare()
    return str(data_dir)


def test_real_labels_are_multi_hot(real_dir):
    source = open_real(data_dir=real_dir)
    assert (source.split, source.num_examples, len(source.class_names)) == ("validation", 4, 1000)
    for example in source:
        index = round(float(tf.io.decode_jpeg(example["image"]).numpy().mean()) / 60)
        assert np.flatnonzero(example["label"]).tolist() == REAL_LABELS[index]
        assert example["label"].shape == (1000,)


@pytest.mark.parametrize("processes", [1, 3])
def test_real_comes_in_batches_that_are_padded_with_images_without_labels(real_dir, processes):
    source = open_real(data_dir=real_dir)
    batches = [
        batch
        for index in range(processes)
        for batch in eval_batches(
            source,
            batch_size=3,
            preprocessing=Preprocessing(8),
            process_index=index,
            process_count=processes,
        )
    ]
    assert all(batch["label"].shape == (3 // processes, 1000) for batch in batches)
    mask = np.concatenate([batch["mask"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    assert mask.sum() == 4
    assert sorted(labels.sum(1)) == sorted([*map(len, REAL_LABELS), 0, 0])


def test_real_is_read_with_the_features_that_tfds_declares(tmp_path):
    examples = prepared.random_examples("imagenet2012_real", 3, np.random.default_rng(0))
    prepared.write("imagenet2012_real", tmp_path, {"validation": examples})
    source = open_real(data_dir=str(tmp_path))
    assert source.class_names[0] == "n01440764"
    found = {
        tuple(np.flatnonzero(example["label"]))
        for example in source
        if len(example["label"]) == 1000
    }
    assert found == {tuple(sorted(set(example["real_label"]))) for example in examples}
    message = refuse("imagenet2012_real", data_dir=str(tmp_path))
    assert "it needs the features image and label" in message


def test_real_that_is_not_prepared_is_one_line(tmp_path):
    with pytest.raises(UserError, match="'imagenet2012_real' is not prepared in") as error:
        open_real(data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_other_labels_of_a_source_whichever_way_it_is_read(image_folder):
    source, _ = open_dataset(f"folder:{image_folder}")
    other = relabel(source, [2, 0], ["rose", "iris", "aster"])
    assert other.class_names == ("rose", "iris", "aster")
    for relabeled in (other, other.select(np.arange(0, 40, 2))):
        found = {r["id"]: r["label"] for r in relabeled}
        assert len(found) in (40, 20)
        for path, label in found.items():
            assert path.split("/")[-2] == other.class_names[label]


def test_other_labels_of_images_with_several_and_with_none():
    def source(labels):
        examples = InMemory([{"label": label} for label in labels])
        return Source("made up", "test", ("a", "b"), 0, examples)

    def labels(source):
        return [np.asarray(r["label"]).tolist() for r in source]

    assert labels(relabel(source([1, -1, 0]), [2, 1], "xyz")) == [1, -1, 2]
    several = source([[1, 0], [1, 1], [0, 0]])
    assert labels(relabel(several, [2, 1], "xyz")) == [[0, 0, 1], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("photos", "folder:photos"),
        ("./cifar10", "folder:./cifar10"),
        ("cifar10", "cifar10"),
        ("digits", "digits"),
        ("a.csv", "list:a.csv"),
        ("folder:photos", "folder:photos"),
        ("nowhere", "nowhere"),  # Of TFDS, perhaps.
    ],
)
def test_a_path_is_a_folder_or_list_unless_a_data_set_is_called_so(
    tmp_path, monkeypatch, data, name
):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "cifar10", "digits"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.txt").touch()
    assert name_or_path(data) == name
    with pytest.raises(UserError, match="'a.txt' is no data set: give a folder"):
        name_or_path("a.txt")
