"""Image folders: what is read, in which order, and what is refused."""

import os

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import images as pil_images
from vit_jax.data.datasets import open_dataset, open_evaluation
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError

from .orientations import UPRIGHT


def ids(source):
    return [example["id"] for example in source]


def test_classes_are_sorted_directories_and_labels_index_them(image_folder):
    train, test = open_dataset(f"folder:{image_folder}")
    assert train.class_names == test.class_names == ("aster", "rose")
    assert (train.num_examples, test.num_examples) == (40, 6)
    assert train.num_bytes == sum(p.stat().st_size for p in (image_folder / "train").rglob("*.jpg"))
    for example in train:
        path = example["id"]
        assert path.split("/")[-2] == train.class_names[example["label"]]
        with open(path, "rb") as file:
            assert example["image"] == file.read()


def test_slices_are_disjoint_complete_and_mixed(image_folder):
    name = f"folder:{image_folder}"
    first, rest = open_dataset(name, train_split="train[:75%]", eval_split="train[75%:]")
    whole, _ = open_dataset(name)
    assert (first.num_examples, rest.num_examples) == (30, 10)
    assert ids(first) + ids(rest) == ids(whole)
    assert sorted(ids(whole)) == sorted(str(p) for p in (image_folder / "train").rglob("*.jpg"))
    assert {path.split("/")[-2] for path in ids(rest)} == {"aster", "rose"}


def test_order_does_not_depend_on_where_the_folder_is(image_folder):
    name = f"folder:{image_folder}"
    before = [path.removeprefix(str(image_folder)) for path in ids(open_dataset(name)[0])]
    moved = image_folder.rename(image_folder.with_name("moved"))
    after = [path.removeprefix(str(moved)) for path in ids(open_dataset(f"folder:{moved}")[0])]
    assert before == after


def test_development_holds_out_a_tenth_of_train(image_folder):
    (image_folder / "test").rename(image_folder / "unused")
    train, held_out = open_dataset(f"folder:{image_folder}", development=True)
    assert (train.num_examples, held_out.num_examples) == (36, 4)
    assert not set(ids(train)) & set(ids(held_out))


def test_an_image_to_evaluate_on_that_is_cut_off_is_refused_at_once(image_folder):
    image = min((image_folder / "test").rglob("*.jpg"))
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(UserError, match=f"(?i){image} is damaged .*truncated"):
        open_dataset(f"folder:{image_folder}")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_may_be_called_val(image_folder, name):
    (image_folder / "test").rename(image_folder / name)
    assert open_dataset(f"folder:{image_folder}")[1].split == "validation"


def test_two_names_of_one_split_are_refused(image_folder):
    (image_folder / "test").rename(image_folder / "val")
    (image_folder / "valid").mkdir()
    assert "has both val/ and valid/: keep one" in refuse(image_folder)


@pytest.mark.parametrize(("name", "split"), [("val", "validation"), ("test", "test")])
def test_one_split_is_enough_to_evaluate_on(image_folder, name, split):
    (image_folder / "train").rename(image_folder / "unused")
    (image_folder / "test").rename(image_folder / name)
    source = open_evaluation(f"folder:{image_folder}")
    assert (source.split, source.num_examples) == (split, 6)
    assert source.class_names == ("aster", "rose")
    assert f"has no train/, only {split}" in refuse(image_folder)
    assert f"has no train/, only {split}" in refuse(image_folder, development=True)


def test_without_train_the_classes_are_those_of_all_splits(image_folder):
    (image_folder / "train").rename(image_folder / "val")
    (image_folder / "test" / "rose").rename(image_folder / "test" / "lily")
    for split in ("validation", "test"):
        source = open_evaluation(f"folder:{image_folder}", split=split)
        assert source.class_names == ("aster", "lily", "rose")
        for example in source:
            path = example["id"]
            assert path.split("/")[-2] == source.class_names[example["label"]]


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(12):
        directory = tmp_path / "train" / str(number)
        directory.mkdir(parents=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(directory / "image.png")
    train, _ = open_dataset(f"folder:{tmp_path}", eval_split="train")
    assert train.class_names == tuple(str(number) for number in range(12))
    (batch,) = eval_batches(train, batch_size=12, preprocessing=evaluation("pad", 4))
    colors = np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5)
    np.testing.assert_array_equal(batch["label"], colors)


def test_hidden_files_are_ignored(image_folder):
    (image_folder / "train" / ".cache").mkdir()
    (image_folder / "train" / "rose" / ".DS_Store").write_bytes(b"x")
    assert open_dataset(f"folder:{image_folder}")[0].num_examples == 40


def refuse(folder, **options):
    with pytest.raises(UserError) as caught:
        open_dataset(f"folder:{folder}", **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_folder_is_named(tmp_path):
    assert "nowhere" in refuse(tmp_path / "nowhere")


def test_folder_without_train_is_named(image_folder):
    (image_folder / "train").rename(image_folder / "training")
    assert "no train/" in refuse(image_folder)


def test_folder_without_evaluation_split_says_what_it_has(image_folder):
    (image_folder / "test").rename(image_folder / "unused")
    assert "only train" in refuse(image_folder)


def test_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    assert "no classes" in refuse(tmp_path)


def test_empty_class_is_named(image_folder):
    (image_folder / "train" / "lily").mkdir()
    assert "train/lily is empty" in refuse(image_folder)


def test_test_class_unknown_to_train_is_named(image_folder):
    (image_folder / "test" / "aster").rename(image_folder / "test" / "lily")
    assert "'lily'" in refuse(image_folder)


def test_file_that_is_no_image_is_named(image_folder):
    (image_folder / "test" / "rose" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    assert "rose/Thumbs.db" in refuse(image_folder)


def test_empty_and_unknown_splits_are_named(image_folder):
    assert "'train[:0%]'" in refuse(image_folder, train_split="train[:0%]")
    unknown = refuse(image_folder, eval_split="tset")
    assert "'tset'" in unknown and "train, test" in unknown


SIDE = 16
PIXELS = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def batches_of(folder):
    """The levels of the one batch of evaluation, and of an epoch of training, with labels."""
    train, same = open_dataset(f"folder:{folder}", eval_split="train")
    size = train.num_examples
    (seen,) = eval_batches(same, batch_size=size, preprocessing=evaluation("pad", SIDE))
    batches = train_batches(
        train,
        batch_size=size,
        image_size=SIDE,
        protocol="pad",
        random_crop=False,
        random_flip=False,
        seed=0,
    )
    trained = next(batches)
    return (
        ((seen["image"] + 1) * 127.5, seen["label"]),
        (trained["image"].astype(float), trained["label"]),
    )


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_as_exif_says(tmp_path, file_format):
    expected = {}
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        directory = tmp_path / "train" / str(orientation)
        directory.mkdir(parents=True)
        path = directory / "photo"
        options = {"lossless": True} if file_format == "WEBP" else {}
        Image.fromarray(PIXELS).save(path, file_format, exif=exif, **options)
        # PIL shows it as it is stored, a JPEG with its losses.
        stored = np.asarray(Image.open(path)) if file_format == "JPEG" else PIXELS
        expected[orientation] = upright(stored.astype(float))
    for images, labels in batches_of(tmp_path):
        assert sorted(labels) == list(range(8))
        for levels, label in zip(images, labels, strict=True):
            atol = 1 if file_format == "JPEG" else 1e-4
            np.testing.assert_allclose(levels, expected[label + 1], atol=atol)


def test_every_format_that_predict_reads_can_be_trained_on(tmp_path):
    color = Image.fromarray(PIXELS)
    smooth = color.resize((3, 3)).resize((SIDE, SIDE))
    palette = color.quantize(16)
    files = {
        "webp": (color, {"lossless": True}, 1e-4),
        "tiff": (color, {"compression": "tiff_lzw"}, 1e-4),
        "ppm": (color, {}, 1e-4),
        "jp2": (color, {"irreversible": False}, 1e-4),
        "j2k": (color, {"irreversible": False}, 1e-4),
        "bmp": (palette, {}, 1e-4),
        "png": (color, {}, 1e-4),
        "avif": (smooth, {"quality": 95}, 12),
    }
    if not Image.registered_extensions().get(".avif"):
        del files["avif"]
    for suffix, (image, options, _) in files.items():
        directory = tmp_path / "train" / suffix
        directory.mkdir(parents=True)
        image.save(directory / f"image.{suffix}", **options)
    names = sorted(files)
    for images, labels in batches_of(tmp_path):
        assert len(labels) == len(files)
        for levels, label in zip(images, labels, strict=True):
            meant, _, atol = files[names[label]]
            np.testing.assert_allclose(levels, np.asarray(meant.convert("RGB")), atol=atol)


def test_training_and_predict_see_a_turned_photograph_alike(image_folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(PIXELS).resize((50, 37), Image.Resampling.BICUBIC)
    for path in (image_folder / "test").rglob("*.jpg"):
        photo.save(path, "JPEG", exif=exif, quality=95)
    source = open_evaluation(f"folder:{image_folder}")
    for preprocessing in (evaluation("bit", 24), evaluation("pretrain", 24)):
        (batch,) = eval_batches(source, batch_size=6, preprocessing=preprocessing)
        predicted = pil_images.preprocess(pil_images.read_image(path), preprocessing)
        for image in batch["image"]:
            np.testing.assert_allclose(image, predicted, atol=1e-4)


@pytest.mark.parametrize("fault", ["is damaged", "has pixels of 32 bits"])
def test_a_broken_image_that_pil_reads_is_named_with_its_fault(image_folder, fault):
    broken = image_folder / "train" / "rose" / "7.jpg"
    if fault == "is damaged":
        Image.fromarray(PIXELS).save(broken, "WEBP")
        broken.write_bytes(broken.read_bytes()[:-200])
    else:
        Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(broken, "TIFF")
    with pytest.raises(UserError, match=f"{broken} {fault}") as error:
        batches_of(image_folder)
    assert "\n" not in str(error.value)


def test_truncated_image_is_named_when_training_reaches_it(image_folder):
    broken = image_folder / "train" / "rose" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    train, _ = open_dataset(f"folder:{image_folder}")
    batches = train_batches(
        train,
        batch_size=4,
        image_size=16,
        protocol="bit",
        random_crop=False,
        random_flip=False,
        seed=0,
    )
    with pytest.raises(UserError, match=str(broken)):
        for _ in range(10):
            next(batches)


def test_truncated_image_is_named_by_evaluation_on_the_process_that_owns_it(image_folder):
    broken = image_folder / "test" / "aster" / "1.jpg"
    _, test = open_dataset(f"folder:{image_folder}")
    broken.write_bytes(broken.read_bytes()[:-200])  # Before, it would be found at once.
    messages = []
    for process in range(2):
        batches = eval_batches(
            test,
            batch_size=4,
            preprocessing=evaluation("bit", image_size=16),
            process_index=process,
            process_count=2,
        )
        try:
            list(batches)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) == 1 and str(broken) in messages[0]


def test_a_file_that_has_gone_is_named(image_folder):
    train, _ = open_dataset(f"folder:{image_folder}")
    gone = next((image_folder / "train").rglob("*.*"))
    gone.unlink()
    options = {"image_size": 8, "protocol": "pad", "random_crop": True, "random_flip": False}
    with pytest.raises(UserError, match="the data cannot be read") as error:
        batches = train_batches(train, batch_size=2, seed=0, **options)
        for _ in range(train.num_examples):
            next(batches)
    assert gone.name in str(error.value)


def test_a_file_whose_name_is_no_text_is_read(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    path = tmp_path / "train" / "a" / os.fsdecode(b"\xff.png")
    Image.new("RGB", (4, 4)).save(path)
    train, _ = open_dataset(f"folder:{tmp_path}", eval_split="train")
    (example,) = train
    assert example["id"] == str(path)
