"""Annotations in COCO's format and the folders that have them, and data sets of TFDS with boxes."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data import datasets
from vit_jax.data.boxes import NO_OBJECT
from vit_jax.data.coco_file import read_coco
from vit_jax.data.labeled_files import FileRules
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.protocols import evaluation
from vit_jax.data.subset import take_subset
from vit_jax.errors import UserError

NAMES = {3: "cat", 18: "dog"}


def document(count=3, names=NAMES, side=16, **changes):
    """Images of one object each, of both classes in turn."""
    images = [
        {"id": 10 + i, "file_name": f"{i}.png", "height": side, "width": side + 4}
        for i in range(count)
    ]
    ids = list(names)
    annotations = [
        {
            "id": i,
            "image_id": 10 + i,
            "category_id": ids[i % len(ids)],
            "bbox": [1, 2, 5 + i % 3, 6],
            "area": 20.5,
            "iscrowd": 0,
            "segmentation": [[1, 2, 6, 2, 6, 8]],
        }
        for i in range(count)
    ]
    categories = [{"id": i, "name": name, "supercategory": "pet"} for i, name in names.items()]
    whole = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return {**whole, **changes}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def save(path, images, count=3, **options):
    """Annotations and their images."""
    images.mkdir(parents=True, exist_ok=True)
    content = document(count, **options)
    for image in content["images"]:
        rng = np.random.default_rng(image["id"])
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(images / image["file_name"])
    return write(path, content)


def coco(path, train=6, test=3, **options):
    for name, count in {"train2017": train, "val2017": test}.items():
        save(path / f"annotations/instances_{name}.json", path / name, count, **options)
    return path


def open_folder(path, **options):
    return datasets.open_dataset(f"folder:{path}", has_boxes=True, **options)


def test_a_file_says_what_it_says(tmp_path):
    content = document(2)
    content["annotations"] += [
        {"image_id": 10, "category_id": 18, "bbox": [0.5, 0, 3, 4], "iscrowd": 1},
        {"image_id": 10, "category_id": 18, "bbox": [30, 0, 3, 4]},
        {"image_id": 10, "category_id": 18, "bbox": [3, 3, 0, 4]},
        {"image_id": 10, "category_id": 18, "bbox": [-2, -2, 30, 40]},
    ]
    content["images"].append({"id": 99, "file_name": "a/empty.png"})
    found = read_coco(write(tmp_path / "a.json", content))
    assert found.categories == {3: "cat", 18: "dog"} and found.empty == 2
    assert found.image_ids == {"0.png": 10, "1.png": 11, "a/empty.png": 99}
    boxes = found.boxes["0.png"]
    np.testing.assert_array_equal(boxes.corners, [[1, 2, 6, 8], [0.5, 0, 3.5, 4], [-2, -2, 28, 38]])
    np.testing.assert_array_equal(boxes.classes, [0, 1, 1])
    np.testing.assert_array_equal(boxes.crowd, [False, True, False])
    np.testing.assert_array_equal(boxes.areas, [20.5, np.nan, np.nan])
    assert boxes.size == (16, 20)
    assert len(found.boxes["a/empty.png"]) == 0 and found.boxes["a/empty.png"].size is None


def changed(key, **values):
    entries = document()[key]
    entries[1] |= values
    return document(**{key: entries})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no readable JSON"),
        ("[1, 2]", r"is \[1, 2\]: it must be an object with images"),
        ("[" * 100_000, "is no readable JSON"),
        ("1" * 10_000, "is no readable JSON"),
        ("\udcff", "is no readable JSON"),
        ('{"images": [], "images": []}', r"readable JSON \(an object has images twice\): mend it"),
        ('{"images": [{"id": 1, "id": 1}]}', r"readable JSON \(an object has id twice\): mend it"),
        ({}, "categories lacks: the format of COCO has a list of objects there; images lacks"),
        (document(images=7), "images is 7, no list"),
        (document(annotations=[7]), r"annotations\[0\] is 7, no object"),
        (document(categories=[]), "which no category has"),
        (document(annotations=[], categories=[]), "has no categories: add the classes"),
        (changed("categories", name="cat"), r"categories\[1\] has an id or name that another has"),
        (changed("categories", id="3"), r"categories\[1\] has id '3': it must be a whole number"),
        (changed("categories", name=""), r"categories\[1\] has the name '', which is none"),
        (changed("categories", name="\ud800x"), r"'\\ud800x', which cannot be printed"),
        (changed("categories", name="a\nb"), r"has the name 'a\\nb', which cannot be printed"),
        (changed("categories", name="\u202ea"), r"the name '\\u202ea', which cannot be printed"),
        (changed("images", id=10), r"images\[1\] has an id or file_name that another has: 10"),
        (changed("images", id=True), r"images\[1\] has id True: it must be a whole number"),
        (changed("images", id=2**70), r"has id 1180591620717411303424: it must be a whole numb"),
        (changed("images", file_name="/etc/passwd"), "it must lie below the folder of the images"),
        (changed("images", file_name="a/../../b"), "it must lie below the folder of the images"),
        (changed("images", file_name="..\\..\\b"), "it must lie below the folder of the images"),
        (changed("images", file_name="a\x00b"), r"has file_name 'a\\x00b', which is none"),
        (changed("images", height=0), r"images\[1\] has height 0: it must be a number of pixels"),
        (changed("annotations", image_id=5), r"\[1\] has image_id 5, which no image has"),
        (changed("annotations", category_id=5), r"\[1\] has category_id 5, which no category has"),
        (changed("annotations", bbox=[1, 2, 3]), r"\[1\] has bbox \[1, 2, 3\]: it must be left"),
        (changed("annotations", bbox=[1, 2, 3, "4"]), "it must be left, top, width and height"),
        (changed("annotations", bbox=[1, 2, 3, float("nan")]), "it must be left, top, width and"),
        (changed("annotations", bbox=[1, 2, 3, float("inf")]), "it must be left, top, width and"),
        (
            changed("annotations", bbox=None),
            "has bbox None: it must be left, top, width and",
        ),
        (changed("annotations", area="big"), r"\[1\] has area 'big': it must be a number of squ"),
        (changed("annotations", area=-1), r"\[1\] has area -1: it must be a number of square pix"),
        (changed("annotations", area=float("nan")), r"\[1\] has area nan: it must be a number of"),
        (changed("annotations", id=0), r"annotations\[1\] has the id 0, which another has"),
        (changed("annotations", iscrowd=2), r"\[1\] has iscrowd 2: it must be 0 or 1"),
        (changed("annotations", iscrowd=[]), r"\[1\] has iscrowd \[\]: it must be 0 or 1"),
    ],
)
def test_what_is_no_annotation_is_refused_in_a_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        read_coco(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_null_is_as_if_it_were_left_out(tmp_path):
    content = document(2)
    content["images"][0] |= {"height": None, "width": None}
    content["images"][1] |= {"height": None}
    content["annotations"][0] |= {"id": None, "area": None, "iscrowd": None}
    content["annotations"][1] |= {"id": None}
    found = read_coco(write(tmp_path / "a.json", content)).boxes
    assert found["0.png"].size is None and found["1.png"].size is None
    assert np.isnan(found["0.png"].areas).all() and not found["0.png"].crowd.any()


def test_a_class_may_be_called_in_any_language_and_what_is_not_read_may_be_repeated(tmp_path):
    names = {3: "سگ\u200cها", 18: "chien\u00a0noir", 20: "🐕"}
    text = json.dumps(document(3, names=names)).replace('"info": {}', '"info": {"a": 1, "a": 2}')
    assert read_coco(write(tmp_path / "a.json", text)).categories == names


def test_many_faults_are_counted(tmp_path):
    entries = [{"image_id": i, "category_id": 3, "bbox": [0, 0, 1, 1]} for i in range(100, 150)]
    with pytest.raises(UserError, match="and 45 more$"):
        read_coco(write(tmp_path / "a.json", document(annotations=entries)))


def test_splits_are_those_of_cocos_files(tmp_path):
    train, test = open_folder(coco(tmp_path))
    assert (train.num_examples, test.num_examples) == (6, 3)
    assert train.split == "train" and test.split == "validation"
    assert train.has_boxes and train.class_names == ("cat", "dog") == test.class_names
    example = test[0]
    assert example["id"].startswith(str(tmp_path / "val2017"))
    np.testing.assert_array_equal(example["label"].corners, test.boxes(0).corners)
    with pytest.raises(TypeError, match="images with boxes have no labels"):
        train.labels()


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("{}/_annotations.coco.json", "{}"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("instances_{}.json", "{}"),
    ],
)
def test_other_layouts_are_found_too(tmp_path, annotations, images):
    for split, count in (("train", 4), ("test", 2)):
        save(tmp_path / annotations.format(split), tmp_path / images.format(split), count)
    train, test = open_folder(tmp_path)
    assert (train.num_examples, test.num_examples) == (4, 2)
    assert (train.split, test.split) == ("train", "test")


@pytest.mark.parametrize(
    "annotations",
    ["annotations/instances_default.json", "instances.json", "_annotations.coco.json"],
)
def test_images_of_no_split_are_divided(tmp_path, annotations):
    images = tmp_path if annotations.startswith("_") else tmp_path / "images"
    save(tmp_path / annotations, images, 10)
    train, held_out = open_folder(tmp_path)
    assert (train.num_examples, held_out.num_examples) == (8, 2)
    assert not {*train.ids()} & {*held_out.ids()}
    again = FileRules(partition=train.partition)
    assert open_folder(tmp_path, files=again)[0].ids() == train.ids()
    content = document(10)
    name = train.ids()[0].rpartition("/")[2]
    index = next(i for i, x in enumerate(content["images"]) if x["file_name"] == name)
    content["annotations"][index]["bbox"][0] += 1
    write(tmp_path / annotations, content)
    with pytest.raises(UserError, match="1 of the images have another class or mask or other box"):
        open_folder(tmp_path, files=again)


@pytest.mark.parametrize("broken", ["refuse", "skip"])
def test_an_image_of_two_splits_is_refused(tmp_path, broken):
    rules = FileRules(broken=broken)
    for name in ("train", "val"):
        save(tmp_path / f"annotations/instances_{name}.json", tmp_path / "images", 3)
    with pytest.raises(UserError, match=r"^3 images are of two splits \(0.png, ") as error:
        open_folder(tmp_path, files=rules)
    assert "\n" not in str(error.value)
    content = document(3)
    for key, field in {"images": "id", "annotations": "image_id"}.items():
        content[key] = [entry for entry in content[key] if entry[field] == 12]
    content["annotations"][0]["bbox"] = [9, 9, 6, 6]
    write(tmp_path / "annotations/instances_val.json", content)
    with pytest.raises(UserError, match=r"^1 images are of two splits \(2.png\)"):
        open_folder(tmp_path, files=rules)
    write(tmp_path / "annotations/instances_train.json", document(2))
    train, test = open_folder(tmp_path, files=rules)
    assert (train.num_examples, test.num_examples) == (2, 1)
    np.testing.assert_array_equal(test.boxes(0).corners, [[9, 9, 15, 15]])


def test_classes_of_another_split_go_by_their_names(tmp_path):
    save(tmp_path / "instances_train.json", tmp_path / "train", 4)
    save(tmp_path / "instances_test.json", tmp_path / "test", 2, names={1: "dog", 2: "cat"})
    _, test = open_folder(tmp_path)
    found = {test.ids()[i].rpartition("/")[2]: test.boxes(i).classes.tolist() for i in range(2)}
    assert test.class_names == ("cat", "dog") and found == {"0.png": [1], "1.png": [0]}
    save(tmp_path / "instances_test.json", tmp_path / "test", 2, names={1: "dog", 2: "cow"})
    with pytest.raises(UserError, match="class 'cow' of .*instances_test.json is not in train"):
        open_folder(tmp_path)


def test_oddities_are_told(tmp_path):
    content = document(4)
    content["annotations"] = content["annotations"][:2]
    content["annotations"].append({"image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 5]})
    coco(tmp_path, 4)
    write(tmp_path / "annotations/instances_train2017.json", content)
    train, _ = open_folder(tmp_path)
    assert any("1 annotations of " in note and "are left out" in note for note in train.notes)
    assert any("2 of the 4 images of " in note and "show nothing" in note for note in train.notes)


@pytest.mark.parametrize("told", [True, False])
def test_boxes_beyond_an_image_are_left_out_whether_or_not_its_size_is_told(tmp_path, told):
    content = document(4)
    if not told:
        for image in content["images"]:
            del image["height"], image["width"]
    for box in ([20, 0, 5, 5], [-9, 0, 9, 5], [0, 40, 3, 3], [15, -3, 30, 40]):
        content["annotations"].append({"image_id": 10, "category_id": 18, "bbox": box})
    save(tmp_path / "instances_default.json", tmp_path / "images", 4)
    write(tmp_path / "instances_default.json", content)
    train, held_out = open_folder(tmp_path)
    found = {
        path.rpartition("/")[2]: source.boxes(i)
        for source in (train, held_out)
        for i, path in enumerate(source.ids())
    }
    np.testing.assert_array_equal(found["0.png"].corners, [[1, 2, 6, 8], [15, -3, 45, 37]])
    np.testing.assert_array_equal(found["0.png"].classes, [0, 1])
    assert [len(found[f"{i}.png"]) for i in (1, 2, 3)] == [1, 1, 1]
    assert any(note.endswith("of no height or width or beyond their image") for note in train.notes)
    assert any(": 3 annotations of " in note for note in train.notes)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    coco(tmp_path)
    (tmp_path / "train2017/0.png").unlink()
    (tmp_path / "train2017/1.png").write_text("nothing")
    Image.new("RGB", (16, 20)).save(tmp_path / "val2017/1.png")
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    told = str(error.value)
    assert "3 files are no images or are cut off" in told and "\n" not in told
    skipping = FileRules(broken="skip")
    train, test = open_folder(tmp_path, files=skipping)
    assert (train.num_examples, test.num_examples) == (4, 2)
    assert any("3 left out that are broken" in note for note in train.notes)
    for name in ("0.png", "1.png"):
        Image.new("RGB", (20, 16)).save(tmp_path / "train2017" / name)
    with pytest.raises(UserError, match=r"1.png has 16 x 20 pixels, and 20 x 16 by .*: mend eith"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.rmdir(), "does not exist: name one with annotations/ in it"),
        (lambda x: None, "has no annotations/instances_.*json, nor train/_annotations.coco.json"),
        (
            lambda x: save(x / "annotations/instances_streets.json", x / "streets"),
            "instances_streets.json is of no split: call it instances_train.json",
        ),
        (
            lambda x: [
                save(x / f"annotations/instances_{name}.json", x / name)
                for name in ("train2014", "train2017")
            ],
            "instances_train2014.json and .*instances_train2017.json are of one split",
        ),
        (
            lambda x: [
                save(x / f"annotations/instances_{name}.json", x / "images")
                for name in ("default", "val")
            ],
            "instances_default.json is of all images, and .* has annotations of splits beside",
        ),
        (
            lambda x: save(x / "annotations/instances_val.json", x / "val"),
            "has no train/, only validation: annotations/instances_train.json or train/_annot",
        ),
        (
            lambda x: save(x / "annotations/instances_train.json", x / "train", annotations=[]),
            "instances_train.json has no object: add annotations",
        ),
    ],
)
def test_a_folder_of_another_form_is_refused(tmp_path, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message):
        open_folder(folder)


@pytest.mark.parametrize("name", ["digits", "list:a.csv", "vtab:cifar"])
def test_data_sets_of_labels_have_no_boxes(name):
    with pytest.raises(UserError, match="has labels of images, and no boxes: give folder:PATH"):
        datasets.open_dataset(name, has_boxes=True)


def check_batches(train, test):
    options = {"image_size": 8, "protocol": "letterbox", "random_crop": True, "random_flip": True}
    options |= {"seed": 3, "most_boxes": 4}
    for workers in (0, 1):
        batches = train_batches(train, batch_size=4, workers=workers, **options)
        first = next(batches)
        assert first["label"].dtype == np.float32 and first["label"].shape == (4, 4, 5)
        assert (first["label"][..., 4] >= 0).any() and (first["label"][..., 4] == NO_OBJECT).any()
        later = train_batches(train, batch_size=4, first_step=1, **options)
        second, same = next(batches), next(later)
        for key in ("image", "label"):
            np.testing.assert_array_equal(second[key], same[key])
        batches.close()
    rule = evaluation("letterbox", 8)
    (batch,) = eval_batches(test, batch_size=4, preprocessing=rule)
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 0])
    np.testing.assert_array_equal(batch["label"], [[16, 20]] * 3 + [[0, 0]])
    # A process whose rows lie beyond the images.
    (beyond,) = eval_batches(
        test, batch_size=8, preprocessing=rule, process_index=1, process_count=2
    )
    assert not beyond["mask"].any() and beyond["label"].shape == (4, 2)
    with pytest.raises(UserError, match="has boxes, which RandAugment would not move"):
        train_batches(train, batch_size=4, num_operations=2, magnitude=5, **options)


def test_batches_have_the_boxes_of_their_views(tmp_path):
    train, test = open_folder(coco(tmp_path))
    check_batches(train, test)
    part = take_subset(train, "50%")
    place = train.ids().index(part.ids()[1])
    np.testing.assert_array_equal(part.boxes(1).corners, train.boxes(place).corners)


class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images with boxes, as COCO and VOC of TFDS have them; every third shows nothing."""

    VERSION = tfds.core.Version("1.0.0")
    OBJECT = {
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "is_crowd": np.bool_,
        "area": np.int64,
        "id": np.int64,
    }

    def _info(self):
        features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(self.OBJECT)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._examples(6), "test": self._examples(3)}

    def _examples(self, count):
        rng = np.random.default_rng(0)
        for index in range(count):
            objects = [self._object(i) for i in range(index % 3)]
            image = rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)
            yield index, {"image": image, "objects": objects}

    def _object(self, index):
        box = tfds.features.BBox(ymin=0.25, xmin=0.1, ymax=0.75, xmax=0.6)
        values = {"bbox": box, "label": index, "is_crowd": index == 1, "area": 7, "id": index}
        return {key: x for key, x in values.items() if key in self.OBJECT}

    _generate_examples = _examples


class Difficult(Pets, skip_registration=True):
    """As VOC: what is difficult in place of crowds, and no areas."""

    OBJECT = {
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "is_difficult": np.bool_,
    }

    def _object(self, index):
        return {**super()._object(index), "is_difficult": index == 1}


@pytest.mark.parametrize(("builder", "area"), [(Pets, 7), (Difficult, 80)])
def test_boxes_of_tfds_are_read(tmp_path, builder, area):
    builder(data_dir=tmp_path).download_and_prepare()
    name = builder.__name__.lower()
    train, test = datasets.open_dataset(name, data_dir=str(tmp_path), has_boxes=True)
    assert train.has_boxes and train.class_names == ("cat", "dog")
    numbers = sorted(len(train.boxes(i)) for i in range(train.num_examples))
    assert numbers == [0, 0, 1, 1, 2, 2]
    boxes = next(x for x in map(train.boxes, range(6)) if len(x) == 2).of_image(16, 20)
    np.testing.assert_allclose(boxes.corners, [[2, 4, 12, 12]] * 2, atol=1e-5)
    np.testing.assert_array_equal(boxes.crowd, [False, True])
    np.testing.assert_array_equal(boxes.classes, [0, 1])
    np.testing.assert_allclose(boxes.areas, area, rtol=1e-5)
    check_batches(train, test)


class Plain(Pets, skip_registration=True):
    """Objects without boxes."""

    OBJECT = {"label": tfds.features.ClassLabel(names=["cat", "dog"])}


def test_a_data_set_of_tfds_without_boxes_is_refused(tmp_path):
    Plain(data_dir=tmp_path).download_and_prepare()
    with pytest.raises(UserError, match="has no boxes: it needs the features image and objects wi"):
        datasets.open_dataset("plain", data_dir=str(tmp_path), has_boxes=True)
