"""VTAB-1k against its published numbers, and against loops over examples in the real format."""

import sys
import types

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.data import labels, vtab
from vit_jax.data.datasets import open_dataset, open_evaluation
from vit_jax.errors import UserError
from vit_jax.recipes import get_config

from .. import prepared

# The sizes that TFDS publishes of every builder.
PUBLISHED = {
    "caltech101": {"train": 3059, "test": 6085},
    "cifar100": {"train": 50000, "test": 10000},
    "clevr": {"train": 70000, "validation": 15000, "test": 15000},
    "diabetic_retinopathy_detection": {"train": 35126, "validation": 10906, "test": 42670},
    "dmlab": {"train": 65550, "validation": 22628, "test": 22735},
    "dsprites": {"train": 737280},
    "dtd": {"train": 1880, "validation": 1880, "test": 1880},
    "eurosat": {"train": 27000},
    "kitti": {"train": 6347, "validation": 423, "test": 711},
    "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
    "oxford_iiit_pet": {"train": 3680, "test": 3669},
    "patch_camelyon": {"train": 262144, "validation": 32768, "test": 32768},
    "resisc45": {"train": 31500},
    "smallnorb": {"train": 24300, "test": 24300},
    "sun397": {"train": 76128, "validation": 10875, "test": 21750},
    "svhn_cropped": {"train": 73257, "test": 26032, "extra": 531131},
}

# Task, builder, classes, the 200 validation images, the test set and its size (Zhai et al., 2019,
# Table 2; Caltech101 has one image more in TFDS), and whether images are cropped and mirrored.
TABLE = """
caltech101           caltech101        102 train[2753:2953]       test           6085  crop flip
cifar100             cifar100          100 train[45000:45200]     test           10000 crop flip
dtd                  dtd               47  validation[:200]       test           1880  crop flip
oxford_flowers102    oxford_flowers102 102 validation[:200]       test           6149  crop flip
oxford_iiit_pet      oxford_iiit_pet   37  train[2944:3144]       test           3669  crop flip
sun397               sun397            397 validation[:200]       test           21750 crop flip
svhn                 svhn_cropped      10  train[65931:66131]     test           26032 crop flip
patch_camelyon       patch_camelyon    2   validation[:200]       test           32768 crop flip
eurosat              eurosat           10  train[16200:16400]     train[21600:]  5400  crop flip
resisc45             resisc45          45  train[18900:19100]     train[25200:]  6300  crop flip
diabetic_retinopathy diabetic_retinopathy_detection 5 validation[:200] test      42670 crop flip
clevr_count          clevr             8   train[63000:63200]     validation     15000 -    flip
clevr_distance       clevr             6   train[63000:63200]     validation     15000 -    flip
dmlab                dmlab             6   validation[:200]       test           22735 -    flip
dsprites_location    dsprites          16  train[589824:590024]   train[663552:] 73728 -    -
dsprites_orientation dsprites          16  train[589824:590024]   train[663552:] 73728 crop -
kitti_distance       kitti             4   validation[:200]       test           711   -    flip
smallnorb_azimuth    smallnorb         18  test[:200]             test[12150:]   12150 crop -
smallnorb_elevation  smallnorb         9   test[:200]             test[12150:]   12150 crop flip
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
NAMES = [row[0] for row in ROWS]


def test_there_are_7_natural_4_specialized_and_8_structured_tasks():
    assert list(vtab.TASKS) == NAMES
    groups = [task.group for task in vtab.TASKS.values()]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What TFDS leaves of every builder beside its examples: real features, published sizes."""
    data_dir = tmp_path_factory.mktemp("metadata")
    for task in vtab.TASKS.values():
        builder = tfds.builder(task.builder, data_dir=data_dir)
        if builder.data_path.exists():
            continue
        template = tfds.core.ShardedFileTemplate(
            data_dir=builder.data_path, dataset_name=builder.name, filetype_suffix="tfrecord"
        )
        infos = [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[size],
                num_bytes=size,
                filename_template=template.replace(split=name),
            )
            for name, size in PUBLISHED[builder.name].items()
        ]
        builder.info.set_splits(tfds.core.SplitDict(infos))
        builder.data_path.mkdir(parents=True)
        builder.info.write_to_directory(builder.data_path)
    return str(data_dir)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_splits_of_the_published_sizes(row, metadata):
    name, builder_name, classes, validation, test, test_size, *_ = row
    builder = tfds.builder(vtab.TASKS[name].builder, data_dir=metadata)
    sources = open_dataset(f"vtab:{name}", data_dir=metadata, development=True)
    sources += open_dataset(f"vtab:{name}", data_dir=metadata)
    alone = open_evaluation(f"vtab:{name}", data_dir=metadata)
    assert builder.name == builder_name
    splits = [source.split for source in sources]
    assert splits == ["train[:800]", validation, f"train[:800]+{validation}", test]
    assert alone.split == test
    sizes = [source.num_examples for source in sources]
    assert sizes == [800, 200, 1000, int(test_size)]
    assert {len(set(source.class_names)) for source in sources} == {int(classes)}
    for source in sources:
        _assert_disjoint_from_test(builder, source.split, test, is_test=source is sources[-1])


def _assert_disjoint_from_test(builder, split, test, is_test):
    """No image that is trained or chosen on is in the test set."""
    images = {
        (part.filename, index)
        for part in builder.info.splits[test].file_instructions
        for index in range(part.skip, part.skip + part.examples_in_shard)
    }
    for part in () if is_test else builder.info.splits[split].file_instructions:
        taken = part.take if part.take >= 0 else part.examples_in_shard - part.skip
        indices = range(part.skip, part.skip + taken)
        assert not images & {(part.filename, index) for index in indices}


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_crops_and_flips_of_section_8_and_table_4s_row(row):
    name, crop, flip = row[0], row[-2], row[-1]
    config = get_config("ViT-B/16", f"finetune,vtab:{name}")
    assert (config.dataset.random_crop, config.dataset.random_flip) == (crop != "-", flip != "-")
    assert (config.duration, config.schedule.base_lr) == ("2500 steps", 0.01)
    assert (config.dataset.image_size, config.batch_size) == (384, 512)
    assert get_config("ViT-B/16", f"finetune,vtab:{name},dev").dataset.development


def histogram_reference(name, example):
    """The label by section 8 of the paper, from a decoded example in NumPy."""
    objects = example.get("objects", {})
    if name == "clevr_count":
        return len(objects["shape"]) - 3
    if name == "clevr_distance":
        nearest = min(point[2] for point in objects["pixel_coords"])
        for label, (low, high) in enumerate(
            [(0, 8), (8, 8.5), (8.5, 9), (9, 9.5), (9.5, 10), (10, 100)]
        ):
            if low < nearest <= high:
                return label
    if name == "kitti_distance":
        near = 1000.0
        for kind, place in zip(objects["type"], objects["location"], strict=True):
            if ["Car", "Van", "Truck", "", "", "", "", ""][kind]:
                near = min(near, place[2])
        return 0 if near <= 8 else 1 if near <= 20 else 2 if near <= 999 else 3
    if name == "dsprites_location":
        return int(np.floor(example["label_x_position"] / (32 / 16)))
    if name == "dsprites_orientation":
        return int(np.floor(example["label_orientation"] / (40 / 16)))
    if name.startswith("smallnorb"):
        return example[f"label_{name.removeprefix('smallnorb_')}"]
    return example["label"]


@pytest.fixture(scope="module")
def real_format(tmp_path_factory):
    """Every builder, prepared from 60 random examples per split in its real features."""
    data_dir = tmp_path_factory.mktemp("real_format")
    noise = np.random.default_rng(0)
    for task in {task.builder: task for task in vtab.TASKS.values()}.values():
        name = tfds.builder(task.builder, data_dir=data_dir).name
        prepared.write(
            task.builder,
            data_dir,
            {
                split: prepared.random_examples(task.builder, 60, noise)
                for split in PUBLISHED[name]
                if split != "extra"
            },
        )
    return str(data_dir)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_those_of_a_loop_over_the_examples(name, real_format):
    source, _ = open_dataset(
        f"vtab:{name}", data_dir=real_format, train_split="train[:60]", eval_split="train[:60]"
    )
    builder = tfds.builder(vtab.TASKS[name].builder, data_dir=real_format)
    decoded = list(tfds.as_numpy(builder.as_dataset(split="train[:60]")))
    expected = [histogram_reference(name, example) for example in decoded]
    examples = list(source)
    found = [example["label"] for example in examples]
    assert found == expected
    assert source.num_examples == 60
    assert 0 <= min(found) < max(found) < len(source.class_names)
    if len(source.class_names) <= 8:
        assert set(found) == set(range(len(source.class_names)))
    for encoded, example in zip(examples, decoded, strict=True):
        assert set(encoded) == {"image", "label", "id"}
        assert (type(encoded["label"]), type(encoded["image"])) == (int, bytes)
        pixels = tf.io.decode_image(encoded["image"], expand_animations=False).numpy()
        scale = 255 if name.startswith("dsprites") else 1
        np.testing.assert_array_equal(pixels, example["image"] * scale)


@pytest.mark.parametrize(
    ("name", "depths", "types", "label"),
    [
        ("clevr_distance", [11.0, 8.0, 12.0], None, 0),
        ("clevr_distance", [8.001, 9.0], None, 1),
        ("clevr_distance", [10.0], None, 4),
        ("clevr_distance", [10.001], None, 5),
        ("kitti_distance", [8.0, 30.0], [0, 1], 0),
        ("kitti_distance", [8.001, 30.0], [2, 1], 1),
        ("kitti_distance", [3.0, 20.001], [3, 1], 2),  # A pedestrian is no vehicle.
        ("kitti_distance", [3.0], [6], 3),  # Nor is a tram.
        ("kitti_distance", [], [], 3),
    ],
)
def test_a_distance_on_a_threshold_belongs_below_it(name, depths, types, label):
    places = np.array([[0.0, 0.0, depth] for depth in depths], np.float32).reshape(-1, 3)
    objects = {"pixel_coords": places, "location": places}
    if types is not None:
        objects["type"] = np.array(types, np.int64)
    label_of = labels.label_fn(vtab.TASKS[name], 0)
    assert int(label_of({"objects": objects})) == label


def test_an_unknown_task_is_answered_with_the_nearest(tmp_path):
    for call in (
        lambda: open_dataset("vtab:svhm", data_dir=str(tmp_path)),
        lambda: get_config("ViT-B/16", "finetune,vtab:svhm"),
    ):
        with pytest.raises(UserError, match="did you mean vtab:svhn?"):
            call()
    with pytest.raises(UserError, match="there are caltech101, "):
        open_evaluation("vtab:", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_data_set_is_one_line_that_says_how_to_prepare_it(name, tmp_path):
    with pytest.raises(UserError) as caught:
        open_dataset(f"vtab:{name}", data_dir=str(tmp_path), development=True)
    message = str(caught.value)
    assert "\n" not in message
    assert f"data set 'vtab:{name}' is not prepared in data_dir {str(tmp_path)!r}" in message
    assert f"tfds.builder({vtab.TASKS[name].builder!r}, data_dir=" in message
    assert ("by hand" in message) == (name in ("resisc45", "diabetic_retinopathy"))


def test_the_facts_need_no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    module = types.ModuleType("facts")
    with open(vtab.__file__) as file:
        exec(compile(file.read(), vtab.__file__, "exec"), module.__dict__)
    assert list(module.TASKS) == NAMES
