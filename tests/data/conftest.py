"""Data sets that the tests write themselves."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

COUNT = 50


class ManyShards(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """50 images in ten files; the label of an image is also its pixels' value."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(num_classes=COUNT),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        noise = np.random.default_rng(0)
        for index in range(COUNT):
            yield (
                index,
                {
                    "image": noise.integers(0, 256, (12, 9 + index % 3, 3), np.uint8),
                    "label": index,
                },
            )


@pytest.fixture(scope="session")
def sharded_dir(tmp_path_factory):
    """A data_dir with the prepared data set many_shards, for which no code is registered."""
    data_dir = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(num_shards=10)
    ManyShards(data_dir=data_dir).download_and_prepare(download_config=config)
    return str(data_dir)


@pytest.fixture
def image_folder(tmp_path):
    """A folder with train/ (2 classes, 20 images each) and test/ (3 images each)."""
    noise = np.random.default_rng(0)
    for split, count in [("train", 20), ("test", 3)]:
        for name in ["rose", "aster"]:
            directory = tmp_path / "flowers" / split / name
            directory.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (24, 20, 3), np.uint8)
                data = tf.io.encode_jpeg(pixels).numpy()
                (directory / f"{index}.jpg").write_bytes(data)
    return tmp_path / "flowers"
