"""Folders of images and masks, and data sets of TFDS with masks."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data import datasets
from vit_jax.data.labeled_files import FileRules
from vit_jax.data.masks import read_mask
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError


def save(folder, count, classes=3, side=16, seed=0):
    """Images whose gray level is 50 times the class, and their masks."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind / "a").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        mask = np.kron(rng.integers(0, classes, (2, 2)), np.ones((side // 2, side // 2), int))
        mask[0, 0], mask[0, 1] = classes - 1, 255
        pixels = np.repeat(50 * np.minimum(mask, 4)[..., None], 3, -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "a" / f"{index}.jpg", quality=95)
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / "a" / f"{index}.png")


def open_folder(folder, **options):
    return datasets.open_dataset(f"folder:{folder}", mask_classes=0, **options)


def test_splits_and_names_are_those_of_the_folder(tmp_path):
    save(tmp_path / "train", 6)
    save(tmp_path / "test", 3, classes=2)
    train, test = open_folder(tmp_path)
    assert (train.num_examples, test.num_examples) == (6, 3)
    assert train.has_masks and train.class_names == ("0", "1", "2") == test.class_names
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\nman\n")
    train, test = open_folder(tmp_path)
    assert train.class_names == ("sky", "road", "car", "man")
    example = test[0]
    name = example["id"].rpartition("/")[2].replace(".jpg", ".png")
    expected = read_mask(str(tmp_path / "test/masks/a" / name))
    np.testing.assert_array_equal(read_mask("mask", example["label"]), expected)


def test_a_folder_without_splits_is_divided_as_one_of_classes_is(tmp_path):
    save(tmp_path, 10)
    train, held_out = open_folder(tmp_path)
    assert (train.num_examples, held_out.num_examples) == (8, 2)
    assert not {*train.ids()} & {*held_out.ids()}
    assert "it has no splits, so 8 images are to train on and 2 are held out" in train.notes[0]
    again = FileRules(partition=train.partition)
    assert open_folder(tmp_path, files=again)[0].ids() == train.ids()
    whole = datasets.open_evaluation(f"folder:{tmp_path}", mask_classes=0)
    assert whole.num_examples == 10


def test_batches_have_masks_of_the_images_size(tmp_path):
    save(tmp_path / "train", 5)
    save(tmp_path / "test", 3)
    train, test = open_folder(tmp_path)
    options = {"protocol": "pad", "random_crop": True, "random_flip": True, "seed": 3}
    for workers in (0, 1):
        batches = train_batches(train, batch_size=4, image_size=8, workers=workers, **options)
        first = next(batches)
        assert first["label"].dtype == np.uint8 and first["label"].shape == (4, 8, 8)
        assert {*np.unique(first["label"])} <= {0, 1, 2, 255}
        later = train_batches(train, batch_size=4, image_size=8, first_step=1, **options)
        second, same = next(batches), next(later)
        for key in ("image", "label"):
            np.testing.assert_array_equal(second[key], same[key])
        batches.close()
    (batch,) = eval_batches(test, batch_size=4, preprocessing=evaluation("inception", 8))
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 0])
    assert batch["label"].shape == (4, 8, 8) and batch["label"].dtype == np.uint8


def test_all_that_is_wrong_with_a_folder_is_told_in_one_line(tmp_path):
    save(tmp_path / "train", 6)
    save(tmp_path / "test", 2)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    masks = tmp_path / "train" / "masks" / "a"
    (masks / "0.png").unlink()
    Image.fromarray(np.full((16, 16), 3, np.uint8)).save(masks / "1.png")
    Image.fromarray(np.zeros((16, 8), np.uint8)).save(masks / "2.png")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(masks / "3.png")
    (masks / "4.png").rename(masks / "40.png")
    (tmp_path / "test/images/a/0.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    told = str(error.value)
    assert "\n" not in told and "has 6 problems: (1) " in told
    for problem in (
        f"{tmp_path}/test/images/a/0.jpg is not an image",
        "2 images have no mask (train/images/a/0.jpg, train/images/a/4.jpg): add a PNG of the sam",
        "1 mask has no image (train/masks/a/40.png): remove what is left over",
        f"{masks}/1.png has class 3, and there are 3, from 0 to 2",
        f"{masks}/2.png has 8 x 16 pixels, and its image 16 x 16",
        f"{masks}/3.png has pixels of mode RGB",
    ):
        assert problem in told, told


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x / "photos").mkdir(), "has no images/ and masks/, nor train/images/ and trai"),
        (lambda x: (x / "train/images").mkdir(parents=True), "train/masks does not exist: masks/"),
        (
            lambda x: save(x / "test", 2),
            "has no train/, only test: images/ and masks/ are expec",
        ),
        (lambda x: [save(x, 2), save(x / "train", 2)], "has images/ of its own beside train/imag"),
        (
            lambda x: [save(x, 2), (x / "classes.txt").write_text("sky\nsky\n")],
            "has an empty line, a name twice or more than 255",
        ),
    ],
)
def test_a_folder_of_another_form_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    assert message in str(error.value)


def test_more_classes_than_there_are_may_be_asked_for(tmp_path):
    save(tmp_path, 4)
    train, _ = datasets.open_dataset(f"folder:{tmp_path}", mask_classes=5)
    assert train.class_names == ("0", "1", "2", "3", "4")
    with pytest.raises(UserError, match="has class 2, and there are 2, from 0 to 1"):
        datasets.open_dataset(f"folder:{tmp_path}", mask_classes=2)


@pytest.mark.parametrize("name", ["digits", "list:a.csv", "vtab:cifar"])
def test_data_sets_of_labels_have_no_masks(name):
    with pytest.raises(UserError, match="has labels of images, and no masks: give folder:PATH"):
        datasets.open_dataset(name, mask_classes=0)


class Streets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Six images with masks, whose classes have names."""

    VERSION = tfds.core.Version("1.0.0")
    MASK = tfds.features.LabeledImage(labels=["sky", "road", "car"], shape=(None, None, 1))

    def _info(self):
        features = {"image": tfds.features.Image(), "segmentation_mask": self.MASK}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._examples(), "test": self._examples()}

    def _examples(self):
        rng = np.random.default_rng(0)
        for index in range(6):
            mask = np.kron(rng.integers(0, 3, (2, 3)), np.ones((8, 8), int))[..., None]
            image = np.repeat(80 * mask, 3, -1).astype(np.uint8)
            yield index, {"image": image, "segmentation_mask": mask.astype(np.uint8)}

    _generate_examples = _examples


class Lanes(Streets, skip_registration=True):
    """The same with indices alone, as Oxford-IIIT Pet has them."""

    MASK = tfds.features.Image(shape=(None, None, 1), use_colormap=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    for builder in (Streets, Lanes):
        builder(data_dir=data_dir).download_and_prepare()
    return str(data_dir)


def test_masks_of_tfds_are_read(prepared):
    train, test = datasets.open_dataset("streets", data_dir=prepared, mask_classes=0)
    assert train.has_masks and train.class_names == ("sky", "road", "car")
    rule = evaluation("inception", "16x24")
    (batch,) = eval_batches(test, batch_size=6, preprocessing=rule)
    gray = (batch["image"].mean(-1) + 1) * 127.5
    np.testing.assert_allclose(gray, 80.0 * batch["label"], atol=1)


def test_tfds_need_not_tell_how_many_classes_there_are(prepared):
    with pytest.raises(UserError, match="not tell how many classes its masks have: set --conf"):
        datasets.open_dataset("lanes", data_dir=prepared, mask_classes=0)
    train, _ = datasets.open_dataset("lanes", data_dir=prepared, mask_classes=4)
    assert train.class_names == ("0", "1", "2", "3")
    few, _ = datasets.open_dataset("lanes", data_dir=prepared, mask_classes=1)
    with pytest.raises(UserError, match=r"image lanes-.*: the mask has class 2, and there are 1"):
        list(eval_batches(few, batch_size=6, preprocessing=evaluation("inception", 8)))


def test_tfds_of_labels_has_no_masks(sharded_dir):
    with pytest.raises(UserError, match="has no masks: it needs the features image and segmentati"):
        datasets.open_dataset("many_shards", data_dir=sharded_dir, mask_classes=3)
