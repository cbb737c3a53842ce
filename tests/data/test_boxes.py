"""Boxes and the views of their images: they surround the same pixels in both."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import datasets
from vit_jax.data.box_views import eval_boxes, onto_image, train_boxes
from vit_jax.data.boxes import NO_OBJECT, in_image, in_rows, in_view
from vit_jax.data.preprocess import eval_view, train_view
from vit_jax.data.protocols import JITTERS, PROTOCOLS, Preprocessing, evaluation
from vit_jax.errors import UserError
from vit_jax.image_size import sides

from ..detectors import boxes_of


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(height, width, box):
    """A white rectangle on black: left, top, right, bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return encoded(pixels)


def around(view):
    """The box of what is brighter than half, None if nothing is."""
    rows, columns = np.nonzero(view[..., 0] > 127)
    if not len(rows):
        return None
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def middle(view):
    """The center of brightness, from the left and from the top, None if all is dark."""
    light = view[..., 0].astype(np.float64)
    if light.sum() < 255:
        return None
    rows, columns = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
    return np.array([(light * columns).sum(), (light * rows).sum()]) / light.sum()


def middle_of(corners):
    """The center of a box."""
    return (np.array(corners[:2]) + np.array(corners[2:4])) / 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [32, "24x40"])
def test_a_box_surrounds_the_same_pixels_in_every_view(protocol, size):
    there, seen = [20, 15, 61, 50], 0
    image, boxes = picture(90, 120, there), boxes_of([there], [3])
    options = {"image_size": size, "protocol": protocol, "random_crop": True, "random_flip": True}
    for seed in range(40):
        view, rows = train_boxes(image, boxes, np.random.default_rng(seed), most_boxes=2, **options)
        alone = train_view(image, np.random.default_rng(seed), **options)
        np.testing.assert_array_equal(view, alone)
        assert rows.shape == (2, 5) and rows.dtype == np.float32 and rows[1, 4] == NO_OBJECT
        expected = around(view)
        if expected is None or min(np.subtract(expected[2:], expected[:2])) < 2:
            continue
        assert rows[0, 4] == 3
        np.testing.assert_allclose(rows[0, :4], expected, atol=1.01)
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [32, "24x40"])
def test_the_middle_of_a_box_is_that_of_its_pixels_in_every_view(protocol, size):
    there, apart = [46, 34, 75, 60], []
    image, boxes, edge = picture(97, 131, there), boxes_of([there]), np.array(sides(size)) - 1
    options = {"image_size": size, "protocol": protocol, "random_crop": True, "random_flip": True}
    for seed in range(80):
        view, rows = train_boxes(image, boxes, np.random.default_rng(seed), most_boxes=1, **options)
        whole = (rows[0, :2] > 1).all() and (rows[0, 2:4] < edge[::-1]).all()
        if rows[0, 4] == 0 and whole:
            apart.append(middle(view) - middle_of(rows[0]))
    assert len(apart) > 10
    # In pixels of the view. Without antialiasing its pixels are steps of the image's.
    most = 0.02 if evaluation(protocol, size).antialias else 0.35
    assert np.abs(apart).max() < most


@pytest.mark.parametrize(
    "rule",
    [
        *(evaluation(protocol, 32) for protocol in PROTOCOLS),
        evaluation("letterbox", "24x40"),
        Preprocessing(32, 0.875, "bicubic", True, resize="timm"),
    ],
)
def test_the_middle_of_what_evaluation_sees_is_put_back_into_the_image(rule):
    apart = []
    for step in range(16):
        there = [30 + step, 22 + step, 70 + 2 * step, 50 + 2 * step]
        view, _ = eval_boxes(picture(97, 131, there), boxes_of([there]), rule)
        found = np.tile(middle(255 * rule.to_pixels(view)), 2)[None]
        apart.append(onto_image(found, rule, 97, 131)[0, :2] - middle_of(there))
    # In pixels of the image, of which one of the view has three or more.
    assert np.abs(np.mean(apart, axis=0)).max() < (0.05 if rule.antialias else 0.5)


@pytest.mark.parametrize(
    "rule",
    [
        *(evaluation(protocol, 32) for protocol in PROTOCOLS),
        evaluation("letterbox", "24x40"),
        Preprocessing(32, 0.875, "bicubic", True, resize="timm"),
    ],
)
def test_what_evaluation_sees_is_put_back_into_the_image(rule):
    there = [30, 25, 71, 60]
    image = picture(90, 120, there)
    view, size = eval_boxes(image, boxes_of([there]), rule)
    np.testing.assert_array_equal(view, eval_view(image, rule))
    np.testing.assert_array_equal(size, [90, 120])
    corners = np.array([around(255 * rule.to_pixels(view))], np.float64)
    np.testing.assert_allclose(onto_image(corners, rule, 90, 120), [there], atol=4.0)


@pytest.mark.parametrize(("height", "width"), [(90, 120), (120, 90), (64, 64), (7, 300), (3, 5)])
def test_a_letterbox_is_pils_resize_at_the_top_left_of_black(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    rule = evaluation("letterbox", "32x48")
    view = np.rint(255 * rule.to_pixels(eval_view(encoded(pixels), rule)))
    factor = min(32 / height, 48 / width)
    tall, wide = max(round(height * factor), 1), max(round(width * factor), 1)
    assert tall == 32 or wide == 48
    resized = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(view[:tall, :wide], np.asarray(resized))
    assert not view[tall:].any() and not view[:, wide:].any()


@pytest.mark.parametrize("protocol", JITTERS)
def test_jitter_makes_images_as_much_larger_as_it_says(protocol):
    image, (least, most) = picture(40, 40, [0, 0, 40, 40]), JITTERS[protocol]
    boxes, lengths = boxes_of([[10, 10, 20, 20]]), []
    options = {"image_size": 64, "protocol": protocol, "random_crop": True, "most_boxes": 1}
    for seed in range(300):
        _, rows = train_boxes(image, boxes, np.random.default_rng(seed), **options)
        left, top, right, bottom, label = rows[0]
        if label == 0 and min(left, top) > 0 and max(right, bottom) < 64:
            lengths.append((right - left) / 16)
    assert least - 0.05 < min(lengths) < least + 0.1 and most - 0.3 < max(lengths) <= most + 0.05


def test_a_view_is_a_function_of_the_seed_alone():
    image, boxes = picture(40, 60, [5, 5, 30, 20]), boxes_of([[5, 5, 30, 20]])
    options = {"image_size": 32, "protocol": "letterbox_large", "random_crop": True}
    first, second, other = (
        train_boxes(image, boxes, np.random.default_rng(seed), most_boxes=1, **options)
        for seed in (1, 1, 2)
    )
    for one, same in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, same)
    assert (first[0] != other[0]).any()


def test_what_lies_beyond_a_view_is_cut_off_or_left_out():
    corners = [[-5, -5, 5, 5], [50, 50, 60, 60], [9.5, 0, 30, 10], [2, 2, 4, 4], [0, 0, 9, 0.9]]
    boxes = boxes_of(corners, [0, 1, 2, 3, 4], [False, False, False, True, False])
    found, classes = in_view(boxes, (0, 0, 10, 10), 10)
    np.testing.assert_array_equal(found, [[0, 0, 5, 5]])
    np.testing.assert_array_equal(classes, [0])
    found, classes = in_view(boxes, (0, 0, 10, 10), 20, is_mirrored=True)
    np.testing.assert_array_equal(found, [[10, 0, 20, 10], [0, 0, 1, 20], [2, 0, 20, 1.8]])
    np.testing.assert_array_equal(classes, [0, 2, 4])


def test_corners_go_into_a_view_and_back():
    rng = np.random.default_rng(0)
    begin = rng.uniform(0, 40, (20, 2))
    corners = np.concatenate([begin, begin + rng.uniform(5, 30, (20, 2))], axis=1)
    box = (-3.5, -7.25, 90.0, 120.0)  # It reaches beyond all.
    found, _ = in_view(boxes_of(corners), box, "48x64")
    np.testing.assert_allclose(in_image(found, box, "48x64", 80, 100), corners, atol=1e-9)
    edge = in_image(np.array([[0.0, 0, 64, 48]]), box, "48x64", 80, 100)
    np.testing.assert_array_equal(edge, [[0, 0, 100, 80]])


def test_of_more_objects_than_there_are_rows_the_largest_are_kept():
    corners = np.array([[0, 0, 2, 2], [0, 0, 9, 9], [0, 0, 1, 1], [5, 5, 9, 9]])
    rows = in_rows(corners, np.array([0, 1, 2, 3]), 3)
    np.testing.assert_array_equal(rows[:, 4], [0, 1, 3])
    rows = in_rows(corners, np.array([0, 1, 2, 3]), 6)
    np.testing.assert_array_equal(rows[:, 4], [0, 1, 2, 3, NO_OBJECT, NO_OBJECT])
    assert not rows[4:, :4].any()


def test_shares_are_those_of_the_sides_of_the_image():
    boxes = boxes_of([[0.25, 0.5, 0.75, 1.0]], areas=[np.nan], is_relative=True)
    found = boxes.of_image(40, 80)
    np.testing.assert_array_equal(found.corners, [[20, 20, 60, 40]])
    np.testing.assert_array_equal(found.areas, [800])
    assert boxes_of([[0, 0, 4, 4]], areas=[9.0]).of_image(8, 8).areas == [9]


# What a camera has done to pixels, by EXIF's number of how they are to be turned upright.
TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_boxes_are_of_the_image_turned_upright(tmp_path, orientation):
    there, (height, width) = [22, 17, 61, 50], (97, 131)
    upright = np.asarray(Image.open(io.BytesIO(picture(height, width, there))))
    image = Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright)))
    exif = image.getexif()
    exif[0x112] = orientation
    (tmp_path / "images").mkdir()
    for name in ("0.png", "1.png"):
        image.save(tmp_path / "images" / name, exif=exif)
    left, top, right, bottom = there
    document = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in (0, 1)
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"image_id": i, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}
            for i in (0, 1)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    for source in datasets.open_dataset(f"folder:{tmp_path}", has_boxes=True):
        example = source[0]
        view, rows = train_boxes(
            example["image"],
            example["label"],
            np.random.default_rng(0),
            most_boxes=1,
            image_size=64,
            protocol="letterbox",
        )
        np.testing.assert_allclose(middle(view), middle_of(rows[0]), atol=0.02)
        rule = evaluation("letterbox", 64)
        view, size = eval_boxes(example["image"], example["label"], rule)
        np.testing.assert_array_equal(size, [height, width])
        found = np.tile(middle(255 * rule.to_pixels(view)), 2)[None]
        back = onto_image(found, rule, height, width)[0, :2]
        np.testing.assert_allclose(back, middle_of(there), atol=0.05)
    if orientation > 4:
        for entry in document["images"]:
            entry["height"], entry["width"] = entry["width"], entry["height"]
        (tmp_path / "instances.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match="are no images or are cut off"):
            datasets.open_dataset(f"folder:{tmp_path}", has_boxes=True)


def test_boxes_are_cut_off_at_the_edge_of_their_image_before_they_are_measured():
    corners = [[-30, 10, 50, 60], [-5, -5, 300, 200], [10, 10, 20, 20]]
    found = boxes_of(corners, areas=[np.nan, 77, np.nan]).of_image(100, 200)
    np.testing.assert_array_equal(found.corners, [[0, 10, 50, 60], [0, 0, 200, 100], corners[2]])
    np.testing.assert_array_equal(found.areas, [2500, 77, 100])
    shares = boxes_of([[-0.5, 0.5, 0.5, 1.5]], is_relative=True).of_image(100, 200)
    np.testing.assert_array_equal(shares.corners, [[0, 50, 100, 100]])
    np.testing.assert_array_equal(shares.areas, [5000])


def test_an_image_of_another_size_than_its_annotations_is_refused():
    boxes = boxes_of([[0, 0, 4, 4]], size=(40, 60))
    with pytest.raises(UserError, match="the image has 40 x 60 pixels, and 60 x 40 by its annotat"):
        eval_boxes(picture(60, 40, [0, 0, 4, 4]), boxes, evaluation("letterbox", 32))


@pytest.mark.parametrize(
    "fields", [{"center_crop": 0.9}, {"interpolation": "bicubic"}, {"antialias": False}]
)
def test_a_letterbox_has_no_other_kernel_and_no_crop(fields):
    rule = {"resize": "letterbox", "antialias": True, **fields}
    with pytest.raises(UserError, match="resize 'letterbox' "):
        Preprocessing(32, **rule)
