"""Image folders: what is read, in which order, and what is refused."""

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import images as pil_images
from vit_jax.data.datasets import FileRules, open_dataset, open_evaluation
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.protocols import evaluation
from vit_jax.data.subset import take_subset
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


@pytest.mark.versions
def test_a_folder_is_read_as_by_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision", exc_type=ImportError).datasets
    files = ["aster/b.png", "aster/a.JPG", "aster/deep/er/b.png", "Rose/x.webp", "ünder/c.jpeg"]
    files += ["a rose/1.bmp", "a rose/10.ppm", "a rose/2.tiff"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "aster/notes.txt").write_text("no image")
    theirs = datasets.ImageFolder(tmp_path)
    ours = open_evaluation(f"folder:{tmp_path}")
    assert list(ours.class_names) == theirs.classes
    assert {name: label for label, name in enumerate(ours.class_names)} == theirs.class_to_idx
    assert sorted((x["id"], x["label"]) for x in ours) == sorted(theirs.samples)
    assert len(theirs.samples) == len(files)


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


def test_files_that_are_no_images_are_passed_over_and_counted(image_folder):
    before = ids(open_dataset(f"folder:{image_folder}")[0])
    (image_folder / "train" / "rose" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (image_folder / "train" / "rose" / "notes.txt").write_text("mine")
    (image_folder / "train" / "sizes.txt").write_text("40")
    os.mkfifo(image_folder / "train" / "rose" / "pipe")  # Whoever opened it would wait.
    (image_folder / "train" / "loose.jpg").write_bytes(b"no class")
    (image_folder / "train" / "__MACOSX").mkdir()
    (image_folder / "train" / "rose" / "around").symlink_to(image_folder)
    train, _ = open_dataset(f"folder:{image_folder}")
    assert ids(train) == before
    assert train.notes == (
        f"folder '{image_folder}': 4 passed over that are no images (.txt, .db, pipe)",
        f"folder '{image_folder}': 1 passed over that are images by name but in no class",
        f"folder '{image_folder}': 1 passed over that are links to directories",
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["pipe.jpg", "pipe.npy"])
def test_a_pipe_is_named_and_not_waited_for(image_folder, name, channels):
    before = ids(open_dataset(f"folder:{image_folder}")[0])
    os.mkfifo(image_folder / "train" / "rose" / name)
    rules = FileRules(channels=channels, broken="skip")
    if name == "pipe.jpg" or channels == 1:
        refused = refuse(image_folder, files=FileRules(channels=channels))
        assert f"{image_folder}/train/rose/{name} is not an image" in refused
        note = f"1 left out that are broken: train/rose/{name}"
    else:
        note = "1 passed over that are no images (.npy)"
    train, _ = open_dataset(f"folder:{image_folder}", files=rules)
    assert (ids(train), train.notes) == (before, (f"folder '{image_folder}': {note}",))


@pytest.mark.parametrize("target", ["", "train", "train/..", ".."])
def test_a_link_that_leads_back_is_no_class(image_folder, target):
    (image_folder / "elsewhere").symlink_to(image_folder / "train" / "rose")
    (image_folder / "train" / "lily").symlink_to(image_folder / "elsewhere")
    (image_folder / "train" / "around").symlink_to(image_folder / target)
    (image_folder / "train" / "itself").symlink_to("itself")
    train, _ = open_dataset(f"folder:{image_folder}")
    assert (train.class_names, train.num_examples) == (("aster", "lily", "rose"), 60)
    assert any(note.endswith("1 passed over that are links to directories") for note in train.notes)


def test_all_that_is_wrong_is_told_at_once(image_folder):
    for index in range(12):
        (image_folder / "train" / "rose" / f"broken{index:02}.png").write_bytes(b"")
    (image_folder / "train" / "lily").mkdir()
    (image_folder / "test" / "iris").mkdir()
    (image_folder / "test" / "iris" / "photo.heic").write_bytes(b"no format that is read")
    cut = min((image_folder / "test" / "aster").rglob("*.jpg"))
    cut.write_bytes(cut.read_bytes()[:300])
    message = refuse(image_folder)
    assert f"folder '{image_folder}' has 3 problems: (1) class {image_folder}/train/lily" in message
    assert f"(2) class 'iris' of {image_folder}/test is not in train" in message
    named = ", ".join(f"train/rose/broken{index:02}.png" for index in range(10))
    assert f"(3) 14 files are no images or are cut off ({named} and 4 more): mend or" in message
    assert message.endswith("leave them out by dataset.broken=skip")


def test_broken_files_are_left_out_if_so_asked_and_named(image_folder):
    name, rules = f"folder:{image_folder}", FileRules(broken="skip")
    before = [ids(source) for source in open_dataset(name)]
    (image_folder / "train" / "rose" / "broken.png").write_bytes(b"")
    cut = image_folder / "test" / "aster" / "cut.jpg"
    cut.write_bytes(min((image_folder / "test").rglob("*.jpg")).read_bytes()[:300])
    sources = open_dataset(name, files=rules)
    assert [ids(source) for source in sources] == before
    note = "2 left out that are broken: train/rose/broken.png, test/aster/cut.jpg"
    assert sources[0].notes == (f"folder '{image_folder}': {note}",)
    for path in (image_folder / "test" / "aster").iterdir():
        path.write_bytes(b"")
    message = refuse(image_folder, files=rules)  # A class of nothing else is empty.
    assert message.startswith(f"class {image_folder}/test/aster is empty")


def test_images_beside_the_splits_are_told_of(image_folder):
    photo = min((image_folder / "test").rglob("*.jpg")).read_bytes()
    for name, file in (("notes", "a.txt"), ("raw", "deep/a.jpg"), ("__MACOSX", "a.jpg")):
        path = image_folder / name / file
        path.parent.mkdir(parents=True)
        path.write_bytes(photo)
    train, _ = open_dataset(f"folder:{image_folder}")
    assert train.num_examples == 40
    told = "passed over are the images of raw/, beside train/, test/"
    assert train.notes == (f"folder '{image_folder}': {told}",)


def test_a_class_that_is_called_like_a_split_does_not_hide_the_others(image_folder):
    root = image_folder.with_name("vehicles")
    for name, other in (("bus", "aster"), ("train", "rose")):
        (root / name).mkdir(parents=True)
        for path in (image_folder / "train" / other).rglob("*.jpg"):
            path.rename(root / name / path.name)
    with pytest.raises(UserError) as error:
        open_evaluation(f"folder:{root}")
    assert (
        "train/ would be a split and has no classes in it, and beside it are bus/: if it is a "
        in str(error.value)
    )


def test_one_class_is_refused_where_there_must_be_two(image_folder):
    for split in ("train", "test"):
        (image_folder / split / "rose").rename(image_folder / f"{split} rose")
    assert open_dataset(f"folder:{image_folder}")[0].class_names == ("aster",)
    message = refuse(image_folder, files=FileRules(least_classes=2))
    assert "has one class alone, 'aster'" in message


@pytest.fixture
def bare(image_folder):
    """A folder of the 2 classes of 20 images, one of 7 in folders of its own, and one of one."""
    root = (image_folder / "train").rename(image_folder.with_name("bare"))
    images = sorted((image_folder / "test").rglob("*.jpg"))
    for index in range(8):
        directory = root / "lily" / f"{index % 3}" / "deep" if index < 7 else root / "lone"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "same.jpg" if index in (1, 2) else directory / f"{index}.jpg").write_bytes(
            images[index % 6].read_bytes()
        )
    return root


def relative(source, root):
    return [path.removeprefix(f"{root}/") for path in source.ids()]


def test_a_folder_of_classes_is_divided_class_by_class(bare):
    train, held_out = open_dataset(f"folder:{bare}")
    assert train.class_names == ("aster", "lily", "lone", "rose")
    counts = {"aster": (16, 4), "lily": (6, 1), "lone": (1, 0), "rose": (16, 4)}
    found = [Counter(name.split("/")[0] for name in relative(x, bare)) for x in (train, held_out)]
    assert {name: (found[0][name], found[1][name]) for name in counts} == counts
    assert sorted(ids(train) + ids(held_out)) == sorted(map(str, bare.rglob("*.jpg")))
    for example in [*train, *held_out]:
        name = example["id"].removeprefix(f"{bare}/").split("/")[0]
        assert train.class_names[example["label"]] == name
    begin = f"folder '{bare}': it has no splits, so 39 images are to train on and 9"
    assert train.notes[0].startswith(begin)


def test_classes_of_one_image_each_can_be_scored_but_not_divided(bare):
    for path in bare.rglob("*.jpg"):
        if path.stem != "1":
            path.unlink()
    for directory in ("lone", "lily"):
        shutil.rmtree(bare / directory)
    assert open_evaluation(f"folder:{bare}").num_examples == 2
    message = refuse(bare)
    assert f"folder '{bare}' has no splits and none of its images can be held out" in message
    assert "for which a class must have two: add images, or divide them yourself" in message


def test_a_division_depends_on_names_alone_and_other_shares_nest(bare):
    sources = open_dataset(f"folder:{bare}")
    moved = bare.rename(bare.with_name("elsewhere"))
    for path in moved.rglob("*.jpg"):
        path.touch()
    again = open_dataset(f"folder:{moved}/")
    for source, same in zip(sources, again, strict=True):
        assert relative(source, bare) == relative(same, moved)
    _, more = open_dataset(f"folder:{moved}", files=FileRules(holdout=0.4))
    assert set(relative(again[1], moved)) < set(relative(more, moved))
    assert more.num_examples == 8 + 3 + 0 + 8


def test_slices_and_development_are_of_what_is_not_held_out(bare):
    name = f"folder:{bare}"
    train, held_out = open_dataset(name)
    part, rest = open_dataset(name, train_split="train[:50%]", eval_split="train[50%:]")
    assert ids(part) + ids(rest) == ids(train)
    part, rest = open_dataset(name, development=True)
    assert ids(part) + ids(rest) == ids(train) and rest.num_examples == 4
    assert ids(open_evaluation(name, split="validation[50%:]")) == ids(held_out)[4:]
    for split in ("train+validation", "validation[:50%]"):
        message = refuse(bare, train_split=split)
        assert f"train_split is '{split}' but folder '{bare}' has no splits" in message


def test_to_evaluate_alone_a_folder_without_splits_is_taken_whole(bare):
    source = open_evaluation(f"folder:{bare}")
    assert sorted(ids(source)) == sorted(map(str, bare.rglob("*.jpg")))
    assert source.notes == (f"folder '{bare}': it has no splits, so all images are scored, 48",)


def test_what_a_run_held_out_is_scored_of_its_folder_and_of_no_other(bare, image_folder):
    train, held_out = open_dataset(f"folder:{bare}")
    rules = FileRules(holdout=0.5, partition=train.partition, must_fit=False)
    (bare / "rose" / "new.jpg").write_bytes((bare / "rose" / "1.jpg").read_bytes())
    (bare / "rose" / "new.png").write_bytes(b"broken, but none of the run's")
    source = open_evaluation(f"folder:{bare}", files=rules)
    assert ids(source) == ids(held_out)
    assert source.notes == (
        f"folder '{bare}': the images that the run held out are scored, 9",
        f"folder '{bare}': 2 left out that the run began without",
    )
    (bare / "rose" / "new.png").unlink()
    for directory in ("aster", "lily"):
        (bare / directory).rename(image_folder.with_name(directory))
    assert open_evaluation(f"folder:{bare}", files=rules).num_examples == 22  # All that is there.


def test_images_of_the_same_names_are_not_for_that_the_run_s(bare):
    train, _ = open_dataset(f"folder:{bare}")
    rules = FileRules(partition=train.partition, must_fit=False)
    photo = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    for path in bare.rglob("*.jpg"):
        photo.save(path, "JPEG")
    source = open_evaluation(f"folder:{bare}", files=rules)
    assert source.num_examples == 48
    assert "named as the images in the run's split.csv but of other sizes" in source.notes[1]
    for path in (bare / "aster").iterdir():  # 28 of 48 names are there, which is no reason either.
        path.unlink()
    (bare / "aster").rmdir()
    assert open_evaluation(f"folder:{bare}", files=rules).num_examples == 28


def test_what_is_left_of_what_a_run_held_out_is_scored(bare):
    train, held_out = open_dataset(f"folder:{bare}")
    gone, broken, *left = sorted(ids(held_out))
    Path(gone).unlink()
    Path(broken).write_bytes(b"")
    rules = FileRules(broken="skip", partition=train.partition, must_fit=False)
    source = open_evaluation(f"folder:{bare}", files=rules)
    assert sorted(ids(source)) == left
    name = gone.removeprefix(f"{bare}/")
    assert source.notes[1].endswith(f"1 of the run's images in split.csv are gone ({name})")
    rules = dataclasses.replace(rules, broken="refuse", skip_flag="--broken skip")
    with pytest.raises(UserError, match=r"is not an image .*, or leave it out by --broken skip$"):
        open_evaluation(f"folder:{bare}", files=rules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "1 of the run's images in split.csv are gone (aster/1.jpg): restore"),
        (lambda path: path.write_bytes(b""), "aster/1.jpg is not an image (JPEG, PNG"),
        (lambda path: path.rename(path.parents[1] / "rose/x.jpg"), "split.csv are gone (aster/1.j"),
    ],
)
def test_a_division_of_which_a_file_is_gone_cannot_be_followed(bare, change, message):
    train, _ = open_dataset(f"folder:{bare}")
    change(bare / "aster" / "1.jpg")
    for broken in ("refuse", "skip"):
        rules = FileRules(broken=broken, partition=train.partition)
        told = refuse(bare, files=rules)
        assert message in told and told.endswith("in another --workdir")
        assert "skip" not in told


def test_what_was_broken_when_a_run_began_stays_left_out(bare):
    broken = bare / "rose" / "broken.jpg"
    broken.write_bytes(b"")
    rules = FileRules(broken="skip")
    train, _ = open_dataset(f"folder:{bare}", files=rules)
    assert train.partition.rows["rose/broken.jpg"] == ("rose", "broken", 0)
    broken.write_bytes((bare / "rose" / "1.jpg").read_bytes())
    again, _ = open_dataset(f"folder:{bare}", files=FileRules(partition=train.partition))
    assert ids(again) == ids(train)


def test_a_subset_is_of_names_below_the_folder(bare):
    # lily/1/deep/same.jpg and lily/2/deep/same.jpg differ four levels up.
    (bare / "rose" / "1" / "deep").mkdir(parents=True)
    copy = bare / "rose" / "1" / "deep" / "same.jpg"
    copy.write_bytes((bare / "rose" / "1.jpg").read_bytes())
    source = take_subset(open_evaluation(f"folder:{bare}"), "50%")
    moved = bare.rename(bare.with_name("elsewhere"))
    again = take_subset(open_evaluation(f"folder:{moved}"), "50%")
    assert relative(source, bare) == relative(again, moved)
    assert source.num_examples == 24


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


@pytest.mark.parametrize("split", ["", "train", "test"])
def test_images_and_their_masks_are_not_taken_for_two_classes(tmp_path, split):
    folder = tmp_path / "my streets"
    for name in ("images", "masks", "overlays"):
        (folder / split / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / split / name / "1.png")
    with pytest.raises(UserError) as error:
        open_evaluation(f"folder:{folder}")
    prefix = f"{split}/" if split else ""
    told = f"folder '{folder}' has {prefix}images/ and {prefix}masks/, which look like images and"
    assert str(error.value).startswith(told)
    assert f" --config 'segmentation:ViT-S/16,folder:{folder}' " in str(error.value)


@pytest.mark.parametrize("name", ["images", "masks", "Images"])
def test_a_class_may_be_called_as_one_of_the_two(tmp_path, name):
    for each in (name, "others"):
        (tmp_path / each).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / each / "1.png")
    assert {*open_evaluation(f"folder:{tmp_path}").class_names} == {name, "others"}
