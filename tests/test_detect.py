"""The command that finds objects: what it writes, under which numbers, and its exit codes."""

import importlib.util
import json
import os

import numpy as np
import pytest
from PIL import Image

from vit_jax import detect, evaluate
from vit_jax.checkpoints import flags
from vit_jax.checkpoints.detector import with_detector
from vit_jax.data.datasets import open_evaluation
from vit_jax.data.pipeline import eval_batches
from vit_jax.errors import UserError
from vit_jax.evaluation import detections
from vit_jax.evaluation.detections import make_detecting
from vit_jax.sharding import make_mesh

from .detectors import random_detector


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    pretrained = random_detector(["cat", "dog"])
    monkeypatch.setattr(flags, "load", lambda args: pretrained)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.jpg"):
        pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def run(*words):
    return detect.main(["--checkpoint", "random", *map(str, words)])


def results(folder="found"):
    with open(os.path.join(folder, detect.RESULTS)) as file:
        return json.load(file)


@pytest.mark.usefixtures("photos")
def test_every_image_gets_a_picture_of_its_size_and_rows_in_the_results(tmp_path):
    assert run("photos", "--output", "found") == 0
    names = {"a.boxes.jpg", "b.boxes.jpg", detect.RESULTS}
    assert {x.name for x in (tmp_path / "found").iterdir()} == names
    for name in names - {detect.RESULTS}:
        with Image.open(tmp_path / "found" / name) as image:
            assert image.size == (24, 20)
    rows = results()
    assert {row["image_id"] for row in rows} == {1, 2}
    assert {row["file"] for row in rows} == {"photos/a.png", "photos/b.jpg"}
    for row in rows:
        left, top, width, height = row["bbox"]
        assert 0 <= left <= left + width <= 24.01 and 0 <= top <= top + height <= 20.01
        assert 0.05 <= row["score"] <= 1
        assert row["category"] == {1: "cat", 2: "dog"}[row["category_id"]]
    by_image = [[row["score"] for row in rows if row["image_id"] == i] for i in (1, 2)]
    assert all(scores == sorted(scores, reverse=True) for scores in by_image)


@pytest.mark.usefixtures("photos")
def test_the_threshold_is_of_what_is_drawn(capsys):
    assert run("photos/a.png", "--output", "all", "--threshold", "0") == 0
    assert run("photos/a.png", "--output", "none", "--threshold", "1") == 0
    assert results("all") == results("none")
    told = capsys.readouterr().out.splitlines()
    assert f"a.png: {len(results('all'))} objects" in told[0] and "a.png: 0 objects" in told[1]
    drawn, plain = (np.asarray(Image.open(f"{x}/a.boxes.jpg")).astype(int) for x in ("all", "none"))
    assert np.abs(drawn - plain).max() > 50
    with pytest.raises(UserError, match="'2' is not a number from 0 to 1"):
        run("photos", "--output", "found", "--threshold", "2")


def test_images_have_the_numbers_that_they_are_called_by(photos):
    (photos / "a.png").rename(photos / "000000000139.png")
    (photos / "b.jpg").rename(photos / "000000000285.jpg")
    assert run("photos", "--output", "found") == 0
    assert {row["image_id"] for row in results()} == {139, 285}


def annotations(path, images, categories):
    document = {
        "images": [{"id": i, "file_name": name} for name, i in images.items()],
        "categories": [{"id": i, "name": name} for name, i in categories.items()],
        "annotations": [],
    }
    path.write_text(json.dumps(document))
    return path


@pytest.mark.usefixtures("photos")
def test_numbers_may_be_those_of_annotations(tmp_path):
    file = annotations(
        tmp_path / "a.json", {"a.png": 70, "x/b.jpg": 50}, {"dog": 3, "cat": 90, "cow": 4}
    )
    assert run("photos", "--output", "found", "--annotations", file) == 0
    rows = results()
    assert {(row["file"], row["image_id"]) for row in rows} == {
        ("photos/a.png", 70),
        ("photos/b.jpg", 50),
    }
    assert all(row["category_id"] == {"cat": 90, "dog": 3}[row["category"]] for row in rows)


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("images", "categories", "message"),
    [
        ({"a.png": 1}, {"cat": 1, "dog": 2}, "has no image b.jpg: give images that it has"),
        ({"a.png": 1, "b.jpg": 2}, {"cat": 1}, "has no category 'dog', which the model has"),
    ],
)
def test_annotations_of_something_else_are_refused(tmp_path, images, categories, message):
    file = annotations(tmp_path / "a.json", images, categories)
    with pytest.raises(UserError, match=message):
        run("photos", "--output", "found", "--annotations", file)
    assert not (tmp_path / "found").exists()


def test_images_of_one_name_in_annotations_are_told_apart_by_their_folders(photos, monkeypatch):
    categories = {"cat": 1, "dog": 2}
    names = {"x/cam1/a.png": 11, "x/cam2/a.png": 22, "b.jpg": 33}
    file = annotations(photos.parent / "a.json", names, categories)
    with pytest.raises(UserError, match="has x/cam1/a.png and x/cam2/a.png, and .* may be eith"):
        run("photos", "--output", "found", "--annotations", file)
    assert not (photos.parent / "found").exists()
    for number in ("1", "2"):
        folder = photos.rename(photos.with_name(f"cam{number}"))
        assert run(folder, "--output", f"found{number}", "--annotations", file) == 0
        numbers = {row["image_id"] for row in results(f"found{number}")}
        assert numbers == {int(number) * 11, 33}
        photos = folder
    monkeypatch.chdir(photos)
    assert run("a.png", "--output", "../found", "--annotations", file) == 0
    assert {row["image_id"] for row in results("../found")} == {22}


@pytest.fixture
def annotated(tmp_path, monkeypatch):
    """Images that are no squares, and as their objects some of what is found, made narrower."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()
    images = []
    for index, (height, width) in enumerate([(20, 24), (40, 17), (30, 61), (16, 16), (9, 50)]):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "test" / f"{index + 1}.png")
        sides = {"height": height, "width": width}
        images.append({"id": index + 100, "file_name": f"{index + 1}.png", **sides})
    assert run("test", "--output", "first") == 0
    objects = []
    for number, row in enumerate(results("first")[::3]):
        left, top, width, height = row["bbox"]
        share = (0.87, 0.73, 0.58)[number % 3]  # The overlap, by none of COCO's thresholds.
        box = [left + 0.1 * width, top, share * width, height]
        entry = {"image_id": row["image_id"] + 99, "category_id": 3 * row["category_id"]}
        objects.append({"id": number + 1, **entry, "bbox": box, "iscrowd": 0, "area": 99})
    categories = [{"id": 3, "name": "cat"}, {"id": 6, "name": "dog"}]
    file = tmp_path / "annotations" / "instances_test.json"
    file.parent.mkdir()
    file.write_text(
        json.dumps({"images": images, "categories": categories, "annotations": objects})
    )
    return file


def test_it_finds_what_evaluation_finds(annotated):
    assert run("test", "--output", "found", "--annotations", annotated) == 0
    pretrained = flags.load(None)
    module, params = with_detector(pretrained)
    source = open_evaluation(f"folder:{annotated.parents[1]}", split="test", has_boxes=True)
    rule, mesh = pretrained.preprocessing, make_mesh()
    batches = eval_batches(source, batch_size=4, preprocessing=rule)
    expected = detections.detect(make_detecting(module, mesh), params, batches, mesh, rule)
    by_image = {os.path.basename(x): y for x, y in zip(source.ids(), expected, strict=True)}
    assert len(by_image) == 5 and min(len(x.scores) for x in by_image.values()) > 3
    for name, there in by_image.items():
        rows = [row for row in results() if os.path.basename(row["file"]) == name]
        left, top, width, height = np.array([row["bbox"] for row in rows]).T
        corners = np.stack([left, top, left + width, top + height], axis=1)
        np.testing.assert_allclose(corners, there.corners, atol=0.011)
        np.testing.assert_allclose([row["score"] for row in rows], there.scores, rtol=1e-4)
        assert [row["category_id"] for row in rows] == [(3, 6)[x] for x in there.classes]
        assert {row["image_id"] for row in rows} == {int(name[0]) + 99}


@pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
)
def test_its_file_measured_by_pycocotools_has_the_average_precision_of_evaluate(annotated):
    assert run("test", "--output", "found", "--annotations", annotated) == 0
    words = ["--checkpoint", "random", "--dataset", f"folder:{annotated.parents[1]}"]
    assert evaluate.main([*words, "--split", "test", "--json", "result.json"]) == 0
    with open("result.json") as file:
        measured = json.load(file)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    expected = COCO(str(annotated))
    evaluation = COCOeval(expected, expected.loadRes(f"found/{detect.RESULTS}"), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0.1 < measured["AP"] < 0.9
    # A box is rounded to hundredths of a pixel there.
    assert evaluation.stats[0] == pytest.approx(measured["AP"], rel=0.02)
    assert evaluation.stats[1] == pytest.approx(measured["AP50"], rel=0.02)


@pytest.mark.parametrize("output", ["photos", "photos/found"])
def test_an_output_among_the_images_is_refused_before_anything_is_written(photos, output):
    with pytest.raises(UserError, match=r"^--output \S+ has images in it or lies among them \("):
        run("photos", "--output", output)
    assert {x.name for x in photos.iterdir()} == {"a.png", "b.jpg"}


def test_two_images_of_one_name_are_refused(photos):
    Image.new("RGB", (4, 4)).save(photos / "a.jpg")
    with pytest.raises(UserError, match="have pictures of one name: detect them into folders of"):
        run("photos", "--output", "found")


def test_the_exit_code_says_how_many_images_could_be_read(photos, capsys):
    (photos / "c.jpg").write_bytes(b"nothing")
    assert run("photos", "--output", "found") == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "c.jpg is not an image" in told.err
    assert told.out.count("\n") == 2
    assert run("photos/c.jpg", "--output", "other") == 2
