"""ObjectNet: which classes count, for which of ImageNet's, and what is seen of an image."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vit_jax.data import imagenet, objectnet
from vit_jax.data.pipeline import eval_batches
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError

# By hand: what a class is called in ImageNet. All that have no word in common are here.
PAIRS = {
    "alarm_clock": {"analog clock", "digital clock"},
    "banana": {"banana"},
    "bicycle": {"mountain bike", "bicycle-built-for-two"},
    "bottle_cap": {"bottlecap"},
    "butchers_knife": {"cleaver"},
    "chair": {"barber chair", "folding chair", "rocking chair"},
    "coffee_french_press": {"espresso maker"},
    "dress": {"gown"},
    "dress_shoe_men": {"Loafer"},
    "drying_rack_for_dishes": {"plate rack"},
    "full_sized_towel": {"bath towel"},
    "hand_towel_or_rag": {"dishrag"},
    "helmet": {"football helmet", "crash helmet"},
    "match": {"matchstick"},
    "monitor": {"monitor"},
    "pen": {"ballpoint", "quill", "fountain pen"},
    "skirt": {"hoopskirt", "miniskirt", "overskirt"},
    "still_camera": {"Polaroid camera", "reflex camera"},
    "stuffed_animal": {"teddy"},
    "sweater": {"sweatshirt"},
    "t-shirt": {"jersey"},
    "tie": {"bow tie", "Windsor tie"},
    "tv": {"television"},
    "weight_exercise": {"dumbbell"},
    "wheel": {"car wheel", "paddlewheel"},
    "winter_glove": {"mitten"},
    "wok": {"wok"},
}
# The classes that stand for more than one of ImageNet's, all of them.
SEVERAL = {"alarm_clock", "bicycle", "chair", "helmet", "pen", "skirt", "still_camera", "tie",
           "wheel"}  # fmt: skip


def names(folder):
    readable = list(imagenet.classes().values())
    return {readable[index].split(",")[0] for index in objectnet.classes()[folder]}


def test_113_classes_stand_for_125_of_imagenet_each_for_its_own():
    classes = objectnet.classes()
    assert len(classes) == 113
    indices = [index for several in classes.values() for index in several]
    assert len(indices) == len(set(indices)) == 125
    assert {name for name, several in classes.items() if len(several) > 1} == SEVERAL


@pytest.mark.parametrize("folder", PAIRS)
def test_classes_mean_the_same(folder):
    assert names(folder) == PAIRS[folder]


def test_all_other_names_share_a_word_with_imagenets():
    def words(text):
        return {word.rstrip("s") for word in text.lower().replace(",", " ").split()}

    readable = list(imagenet.classes().values())
    for folder in objectnet.classes().keys() - PAIRS.keys():
        theirs = " ".join(readable[index] for index in objectnet.classes()[folder])
        assert words(folder.replace("_", " ")) & words(theirs), (folder, theirs)


def write(path, pixels, border=(255, 0, 0), suffix="png"):
    image = np.full((pixels.shape[0] + 4, pixels.shape[1] + 4, 3), border, np.uint8)
    image[2:-2, 2:-2] = pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = tf.io.encode_png if suffix == "png" else tf.io.encode_jpeg
    path.write_bytes(encode(image).numpy())


@pytest.fixture
def archive(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("chair", "wok", "air_freshener", "squeegee"):
        for i in range(2):
            pixels = rng.integers(0, 256, (20, 16, 3), np.uint8)
            write(tmp_path / "images" / name / f"{i}.png", pixels)
    return tmp_path


def test_only_mapped_directories_are_read_and_labels_are_all_their_classes(archive):
    (archive / "images" / ".DS_Store").write_bytes(b"x")
    source, found, passed_over = objectnet.open_objectnet(f"objectnet:{archive / 'images'}")
    assert (source.num_examples, found, passed_over) == (4, 2, 2)
    assert source.class_names == tuple(imagenet.classes())
    readable = list(imagenet.classes().values())
    for example in source:
        folder = example["id"].split("/")[-2]
        labels = {readable[i].split(",")[0] for i in np.flatnonzero(example["label"])}
        assert labels == {"chair": PAIRS["chair"], "wok": {"wok"}}[folder]
    assert objectnet.open_objectnet(f"objectnet:{archive}")[0].num_examples == 4


@pytest.mark.parametrize("center_crop", [None, 0.875])
@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_nothing_of_the_border_is_seen(tmp_path, center_crop, suffix):
    # Without red, which must not come in from the border.
    y, x = np.mgrid[:32, :40]
    pixels = np.stack([0 * x, 3 * x, 4 * y], -1).astype(np.uint8)
    preprocessing = Preprocessing(16, center_crop=center_crop)
    path = tmp_path / "bordered" / "wok" / f"0.{suffix}"
    write(path, pixels, suffix=suffix)
    if suffix == "jpeg":  # Its colors run.
        pixels = tf.io.decode_jpeg(path.read_bytes(), dct_method="INTEGER_ACCURATE")[2:-2, 2:-2]
    source, *_ = objectnet.open_objectnet(f"objectnet:{tmp_path / 'bordered'}")
    (batch,) = eval_batches(source, batch_size=1, preprocessing=preprocessing)

    # The same image that never had a border.
    plain = tmp_path / "plain" / "wok" / "0.png"
    plain.parent.mkdir(parents=True)
    plain.write_bytes(tf.io.encode_png(pixels).numpy())
    source, *_ = objectnet.open_objectnet(f"objectnet:{tmp_path / 'plain'}")
    source = dataclasses.replace(source, border=0)
    (expected,) = eval_batches(source, batch_size=1, preprocessing=preprocessing)
    np.testing.assert_allclose(batch["image"], expected["image"], rtol=0, atol=1e-6)
    if suffix == "png":
        assert batch["image"][..., 0].max() == -1


def test_a_turned_photograph_is_turned_and_loses_its_border(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    path = tmp_path / "wok" / "0.png"
    write(path, pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    source, *_ = objectnet.open_objectnet(f"objectnet:{tmp_path}")
    (batch,) = eval_batches(source, batch_size=1, preprocessing=Preprocessing(16))
    expected = np.rot90(pixels, -1) / 127.5 - 1  # 6: to be turned clockwise
    np.testing.assert_allclose(batch["image"][0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "is not a directory: give the folder images"),
        (lambda root: (root / "x" / "squeegee").mkdir(parents=True), "has no images of ObjectNet"),
        (lambda root: (root / "x" / "wok").mkdir(parents=True), "has no images of ObjectNet"),
        (
            lambda root: (
                write(root / "x" / "wok" / "a.png", np.zeros((4, 4, 3)))
                or (root / "x" / "wok" / "b.png").write_text("text")
            ),
            "b.png is not an image .JPEG, PNG",
        ),
    ],
)
def test_a_wrong_folder_is_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        objectnet.open_objectnet(f"objectnet:{tmp_path / 'x'}")
    assert "\n" not in str(error.value)
