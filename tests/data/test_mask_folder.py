"""Folders of images and masks, and data sets of TFDS with masks."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data import datasets, mask_folder
from vit_jax.data.labeled_files import FileRules
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
    expected = np.asarray(Image.open(tmp_path / "test/masks/a" / name))
    np.testing.assert_array_equal(Image.open(io.BytesIO(example["label"])), expected)


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


def test_randaugment_which_moves_no_masks_is_refused(tmp_path):
    save(tmp_path, 4)
    train, _ = open_folder(tmp_path)
    options = {"protocol": "pad", "random_crop": True, "random_flip": True, "seed": 3}
    with pytest.raises(UserError, match="has masks, whose pixels RandAugment would not move"):
        train_batches(train, batch_size=2, image_size=8, num_operations=2, magnitude=9, **options)


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


def write_mask(path, *indices):
    """A mask of 16 x 16 pixels in equal stripes of some indices."""
    stripes = np.repeat(np.array(indices, np.uint8), 16 // len(indices))
    Image.fromarray(np.tile(stripes, (16, 1))).save(path)


def test_a_single_class_is_refused(tmp_path):
    save(tmp_path / "train", 2)
    save(tmp_path / "test", 2)
    for path in tmp_path.rglob("masks/a/*.png"):
        write_mask(path, 0, 255)
    expected = "has one class alone, '0', so there is nothing to tell apart: give other pixels an"
    with pytest.raises(UserError, match=expected):
        open_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("street\n")
    with pytest.raises(UserError, match="has one class alone, 'street'"):
        open_folder(tmp_path)


def test_indices_that_no_mask_has_are_told_of(tmp_path):
    save(tmp_path, 4)
    for path in tmp_path.rglob("masks/a/*.png"):
        write_mask(path, 0, 128)
    train, _ = open_folder(tmp_path)
    assert len(train.class_names) == 129
    told = "no pixel of a mask has 127 of the 129 indices up to the largest (1, 2, 3, 4, 5, 6, 7, "
    assert any(told in note for note in train.notes), train.notes
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i}" for i in range(129)))
    train, _ = open_folder(tmp_path)
    assert not any("no pixel of a mask" in note for note in train.notes)


def test_two_masks_of_an_image_are_refused(tmp_path):
    save(tmp_path, 3)
    write_mask(tmp_path / "masks/a/0.PNG", 0, 1)
    message = "masks/a/0.png is beside .*masks/a/0.PNG, of the same image: keep one"
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_a_mask_without_an_image_is_named_as_it_is_written(tmp_path):
    save(tmp_path, 3)
    write_mask(tmp_path / "masks/a/9.PNG", 0, 1)
    with pytest.raises(UserError, match=r"1 mask has no image \(masks/a/9.PNG\)"):
        open_folder(tmp_path)


def test_a_file_beside_an_image_does_not_take_its_mask(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "images/a/0.json").write_text("{}")  # Before 0.jpg, in the order of names.
    assert open_folder(tmp_path)[0].num_examples == 2


def test_a_split_without_images_is_a_fault(tmp_path):
    save(tmp_path / "train", 3)
    (tmp_path / "val" / "pictures").mkdir(parents=True)
    with pytest.raises(UserError, match="val/images does not exist"):
        open_folder(tmp_path, eval_split="train")


def test_an_empty_list_of_classes_is_refused(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "classes.txt").write_text("")
    with pytest.raises(
        UserError, match="classes.txt is empty: write one name a line, or remove it"
    ):
        open_folder(tmp_path)


def break_masks(folder):
    """Of five masks one is missing, one is damaged, and one of another size."""
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-30])
    Image.fromarray(np.zeros((16, 8), np.uint8)).save(folder / "2.png")


@pytest.mark.parametrize("split", ["", "train"])
def test_images_with_broken_masks_may_be_skipped(tmp_path, split):
    save(tmp_path / split, 5)
    if split:
        save(tmp_path / "test", 1)
    break_masks(tmp_path / split / "masks" / "a")
    rules = FileRules(broken="skip")
    train, test = open_folder(tmp_path, files=rules)
    names = {x.rpartition("/")[2] for x in [*train.ids(), *(test.ids() if not split else ())]}
    assert names == {"3.jpg", "4.jpg"}
    (note,) = (x for x in train.notes if "left out that are broken" in x)
    prefix = f"{split}/a" if split else "a"
    assert all(f"{prefix}/{i}.jpg" in note for i in range(3))
    with pytest.raises(UserError, match="1 image has no mask .*1.png is damaged .*8 x 16 pix"):
        open_folder(tmp_path)
    write_mask(tmp_path / split / "masks/a/3.png", 0, 7)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    with pytest.raises(UserError, match="3.png has class 7, and there are 3"):
        open_folder(tmp_path, files=rules)


def test_a_run_goes_on_beside_an_image_that_came_later_without_a_mask(tmp_path):
    save(tmp_path, 6)
    train, test = open_folder(tmp_path)
    later = (tmp_path / "images/a/0.jpg").read_bytes()
    (tmp_path / "images/a/later.jpg").write_bytes(later)
    with pytest.raises(UserError, match="1 image has no mask"):
        open_folder(tmp_path)
    again = open_folder(tmp_path, files=FileRules(partition=train.partition))
    assert [x.ids() for x in again] == [train.ids(), test.ids()]
    assert any("1 left out that the run began without" in note for note in again[0].notes)
    (tmp_path / "masks/a/0.png").unlink()
    with pytest.raises(UserError, match=r"1 image has no mask \(images/a/0.jpg\)"):
        open_folder(tmp_path, files=FileRules(partition=train.partition))


def test_a_run_does_not_go_on_with_other_masks(tmp_path):
    save(tmp_path, 6)
    train, _ = open_folder(tmp_path)
    path = tmp_path / "masks/a/2.png"
    same = Image.fromarray(np.array(Image.open(path)))
    same.save(path, compress_level=0)  # Other bytes, the same indices.
    open_folder(tmp_path, files=FileRules(partition=train.partition))
    write_mask(path, 2, 1)
    with pytest.raises(UserError, match=r"1 of the images have another class or mask .*a/2.jpg"):
        open_folder(tmp_path, files=FileRules(partition=train.partition))


def test_masks_of_splits_that_are_not_asked_for_are_not_read(tmp_path, monkeypatch):
    for index, split in enumerate(("train", "test", "val")):
        save(tmp_path / split, 2 + index)
    read, original = [], mask_folder.open_mask

    def spy(path, **options):
        read.append(path.removeprefix(f"{tmp_path}/").partition("/")[0])
        return original(path, **options)

    def splits_of(**options):
        read.clear()
        datasets.open_evaluation(f"folder:{tmp_path}", **options)
        return {*read}

    monkeypatch.setattr(mask_folder, "open_mask", spy)
    assert splits_of(mask_classes=3) == {"val"}
    assert splits_of(mask_classes=3, split="test[:1]") == {"test"}
    assert splits_of(mask_classes=0) == {"train", "test", "val"}  # The largest index counts.
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    assert splits_of(mask_classes=0, split="train+test") == {"train", "test"}
    read.clear()
    open_folder(tmp_path, eval_split="test")
    assert {*read} == {"train", "test"} and len(read) == 5


def test_masks_are_no_labels_to_count(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(TypeError, match="images with masks have no labels"):
        open_folder(tmp_path)[0].labels()


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


class Unnumbered(Streets, skip_registration=True):
    """The same, of classes whose number is not told either."""

    MASK = tfds.features.LabeledImage(labels=None, shape=(None, None, 1))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    for builder in (Streets, Lanes, Unnumbered):
        builder(data_dir=data_dir).download_and_prepare()
    return str(data_dir)


def test_masks_of_tfds_are_read(prepared):
    train, test = datasets.open_dataset("streets", data_dir=prepared, mask_classes=0)
    assert train.has_masks and train.class_names == ("sky", "road", "car")
    rule = evaluation("inception", "16x24")
    (batch,) = eval_batches(test, batch_size=6, preprocessing=rule)
    gray = (batch["image"].mean(-1) + 1) * 127.5
    np.testing.assert_allclose(gray, 80.0 * batch["label"], atol=1)


@pytest.mark.parametrize("name", ["lanes", "unnumbered"])
def test_tfds_need_not_tell_how_many_classes_there_are(prepared, name):
    with pytest.raises(UserError, match="not tell how many classes its masks have: set --conf"):
        datasets.open_dataset(name, data_dir=prepared, mask_classes=0)
    train, _ = datasets.open_dataset(name, data_dir=prepared, mask_classes=4)
    assert train.class_names == ("0", "1", "2", "3")
    with pytest.raises(UserError, match=r"image .*: the mask has class 2, and there are 2"):
        datasets.open_dataset(name, data_dir=prepared, mask_classes=2)
    with pytest.raises(UserError, match="has one class alone, so there is nothing to tell apart"):
        datasets.open_dataset(name, data_dir=prepared, mask_classes=1)


def test_tfds_of_labels_has_no_masks(sharded_dir):
    with pytest.raises(UserError, match="has no masks: it needs the features image and segmentati"):
        datasets.open_dataset("many_shards", data_dir=sharded_dir, mask_classes=3)
