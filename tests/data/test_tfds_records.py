"""Examples of prepared data sets, by their places, against TFDS itself."""

import pathlib
import pickle

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.data.datasets import open_dataset
from vit_jax.data.tfds_datasets import TfdsDataset
from vit_jax.errors import UserError

from .conftest import ManyShards

SPLITS = ["train", "test[3:17]", "train[90%:]+test[:7]", "train[13:14]", "train+train[:5]"]


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def data_dir(request, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp(request.param)
    builder = ManyShards(data_dir=data_dir, file_format=request.param)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=10))
    assert len(list(pathlib.Path(builder.data_path).glob(f"*.{request.param}*"))) == 20
    return str(data_dir)


@pytest.mark.parametrize("split", SPLITS)
def test_examples_are_those_that_tfds_reads_in_its_order(data_dir, split):
    source, _ = open_dataset("many_shards", data_dir=data_dir, train_split=split)
    builder = tfds.builder("many_shards", data_dir=data_dir)
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        config = tfds.ReadConfig(add_tfds_id=True)
        examples = tfds.as_numpy(builder.as_dataset(split=split, read_config=config))
        expected = [(x["label"], x["image"], x["tfds_id"].decode()) for x in examples]
        assert source.ids() == [name for *_, name in expected]
    else:
        expected = [(x["label"], x["image"], None) for x in builder.as_data_source(split=split)]
    assert source.num_examples == len(expected)
    for index in np.random.default_rng(0).permutation(len(expected)):
        example = source[index]
        label, image, _ = expected[index]
        assert example["label"] == label
        assert example["id"] == source.ids()[index]
        np.testing.assert_array_equal(tf.io.decode_image(example["image"]), image)
    with pytest.raises(IndexError):
        source[len(expected)]


def test_examples_go_to_other_processes(data_dir):
    source, _ = open_dataset("many_shards", data_dir=data_dir)
    before = source[7]
    assert pickle.loads(pickle.dumps(source))[7] == before


def test_a_file_that_has_gone_or_lost_records_is_named(data_dir):
    source, _ = open_dataset("many_shards", data_dir=data_dir, train_split="test")
    (path,) = (p for p in pathlib.Path(data_dir).rglob("*test*-00003-of-*") if p.suffix != ".npy")
    content = path.read_bytes()
    for change, reason in (
        (path.unlink, f"{path}: No such file or directory"),
        (lambda: path.write_bytes(content[:-1]), f"{path}: "),
    ):
        change()
        source, _ = open_dataset("many_shards", data_dir=data_dir, train_split="test")
        with pytest.raises(UserError, match="the data cannot be read") as error:
            list(source)
        assert reason in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(content)


def test_a_set_in_a_bucket_says_to_mount_it(sharded_dir, monkeypatch):
    dataset = TfdsDataset("many_shards", sharded_dir)
    monkeypatch.setattr(type(dataset._builder), "data_path", "gs://bucket/many_shards/1.0.0")
    with pytest.raises(UserError, match="gs://bucket/.* is no local directory: mount the bucket"):
        dataset.source("train")
