import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import imagenet
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export import parity

PREPROCESSING = Preprocessing(image_size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def reference(outputs, labels=None, data=parity.SYNTHETIC):
    images = np.zeros((len(outputs), 8, 8, 3), np.float32)
    return parity.Reference(images, np.asarray(outputs, np.float32), labels, data)


def test_measures_are_those_of_their_definitions():
    expected = reference([[0.0, 3.0, 4.0], [2.0, 0.0, 0.0]], labels=np.array([2, 1]))
    outputs = np.array([[0.0, 4.0, 3.0], [2.0, 0.0, 0.0]], np.float32)
    row = parity.compare(expected, outputs)
    assert row["max_difference"] == 1
    assert row["mean_difference"] == pytest.approx(2 / 6)
    assert row["relative_difference"] == 0.25
    assert row["cosine"] == pytest.approx(24 / 25)
    assert row["top1_agreement"] == 0.5
    assert (row["accuracy"], row["reference_accuracy"]) == (0.0, 0.5)


def test_of_pixels_the_first_class_is_that_of_each_and_ignored_ones_do_not_count():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    labels = expected.argmax(-1).astype(np.uint8)
    labels[:, 0] = 255
    labels[0, 1, 1] = (labels[0, 1, 1] + 1) % 6
    found = expected.copy()
    found[1, 2, 2] = np.roll(expected[1, 2, 2], 1)
    row = parity.compare(reference(expected, labels), found)
    assert row["top1_agreement"] == pytest.approx(59 / 60)
    assert row["reference_accuracy"] == pytest.approx(44 / 45)
    assert row["accuracy"] == pytest.approx(43 / 45)
    vectors = (x.astype(np.float64).reshape(3, -1) for x in (expected, found))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*vectors, strict=True)]
    assert row["cosine"] == pytest.approx(min(cosines), rel=1e-12)


def test_comparing_takes_no_copy_of_the_whole_in_float64():
    outputs = np.ones((32, 64, 64, 8), np.float32)
    expected = reference(outputs)
    tracemalloc.start()
    try:
        parity.compare(expected, outputs)
        assert tracemalloc.get_traced_memory()[1] < outputs.nbytes
    finally:
        tracemalloc.stop()


def test_images_with_large_outputs_are_few():
    image = 4 * 512 * 512 * 150  # bytes: the logits of every pixel
    assert parity.at_a_time(image) == 1 and parity.compared(image, 256) == 6
    assert parity.at_a_time(4 * 1000) == 16 and parity.compared(4 * 1000, 256) == 256
    assert parity.at_a_time(2**40) == parity.compared(2**40, 256) == 1


def test_the_file_of_a_reference_with_large_outputs_has_few_images(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_OF_A_CALL", 3 * 4 * 100)
    parity.save_reference(reference(np.zeros((9, 10, 10))), tmp_path)
    loaded = parity.load_reference(tmp_path)
    assert len(loaded.outputs) == len(loaded.images) == 3


def test_thresholds_of_a_precision_fail_what_is_beyond_them():
    expected = reference([[1.0, 0.5]])
    near = parity.compare(expected, expected.outputs + np.float32(5e-6))
    far = parity.compare(expected, expected.outputs + np.float32(5e-5))
    assert parity.failures(near, "fp32", expected) == []
    (failure,) = parity.failures(far, "fp32", expected)
    assert "5e-05 is above 1e-05" in failure
    assert parity.failures(far, "fp16", expected) == []


def test_an_overflow_is_told_where_it_makes_a_failure_and_not_where_it_does_none():
    expected = reference([[1.0, 0.5]])
    ranges = {"largest": 1e5, "largest_at": "b/Add", "overflow_at": "a/MatMul"}
    lost = parity.compare(expected, np.array([[np.nan, 0.5]], np.float32)) | ranges
    (failure,) = parity.failures(lost, "fp16", expected)
    assert failure.startswith("a/MatMul is beyond 65504") and "--precision bf16" in failure
    assert (
        parity.failures(parity.compare(expected, expected.outputs) | ranges, "fp16", expected) == []
    )
    lines = parity.table(
        [
            {"name": name, "precision": "fp16", **lost, "largest": largest}
            for name, largest in (("x", 1e5), ("y", 7.0))
        ]
    ).splitlines()
    assert lines[0].endswith("| largest, of 65504 |") and lines[2].endswith("| 1e+05 at b/Add |")
    assert {line.count("|") for line in lines} == {8}


def test_outputs_that_are_not_finite_fail():
    expected = reference([[1.0, 0.5]])
    row = parity.compare(expected, np.array([[np.nan, 0.5]], np.float32))
    assert len(parity.failures(row, "int8", expected)) == 2


def test_first_classes_count_where_there_are_enough_photographs():
    outputs = np.tile(np.float32([[1.0, 0.9999]]), (400, 1))
    swapped = outputs.copy()
    swapped[:4] = [0.9999, 1.0]
    for data, failing in [("flowers", True), (parity.SYNTHETIC, False)]:
        expected = reference(outputs, data=data)
        found = parity.failures(parity.compare(expected, swapped), "fp16", expected)
        assert any("top1_agreement 0.99 is below 0.995" in each for each in found) == failing
    few = reference(outputs[:100], data="flowers")
    assert parity.failures(parity.compare(few, swapped[:100]), "fp16", few) == []


def test_directories_with_the_names_of_classes_are_labels(tmp_path):
    for name, value in [("rose", 0), ("iris", 255)]:
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name / f"{i}.png")
    names = ("rose", "lily", "iris")
    images, labels = parity.read_images(str(tmp_path), PREPROCESSING, names, 100)
    assert labels.tolist() == [2, 2, 2, 0, 0, 0]
    np.testing.assert_allclose(images[0, 0, 0], [2.5, 2.0, 1.75], rtol=1e-6)
    images, labels = parity.read_images(str(tmp_path), PREPROCESSING, names, 2)
    assert labels.tolist() == [2, 0]  # Spread over all.
    assert parity.read_images(str(tmp_path), PREPROCESSING, ("rose", "lily"), 6)[1] is None


def test_directories_with_wordnet_ids_are_labels_of_imagenet(tmp_path):
    for name in ("n01443537", "American_robin"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    names = ("tench", imagenet.classes()["n01443537"], "american robin")
    assert parity.read_images(str(tmp_path), PREPROCESSING, names, 6)[1].tolist() == [2, 1]


def test_images_of_a_data_set_are_spread_over_it(tmp_path):
    from vit_jax.data.datasets import open_evaluation

    for label, name in enumerate(("iris", "lily", "rose")):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = (30 * label + 10 * i,) * 3
                Image.new("RGB", (8, 8), pixels).save(tmp_path / split / name / f"{i}.png")
    source = open_evaluation(f"folder:{tmp_path}")
    images, labels = parity.read_dataset(source, PREPROCESSING, 100)
    every = parity.as_pixels(images, PREPROCESSING)[:, 0, 0, 0].tolist()
    assert sorted(every) == list(range(0, 90, 10))
    assert labels.tolist() == [pixel // 30 for pixel in every]
    for number in (1, 2, 4, 5, 8, 9):
        images, labels = parity.read_dataset(source, PREPROCESSING, number)
        pixels = parity.as_pixels(images, PREPROCESSING)[:, 0, 0, 0].tolist()
        assert labels.tolist() == [pixel // 30 for pixel in pixels]
        places = [every.index(pixel) for pixel in pixels]
        assert len(places) == number
        assert set(np.diff([-1, *places])) <= {9 // number, -(-9 // number)}


def test_a_directory_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        parity.read_images(str(tmp_path), PREPROCESSING, None, 6)


def test_synthetic_images_have_the_range_of_pixels_and_are_smooth():
    images = parity.synthetic_images(4, PREPROCESSING)
    pixels = images * PREPROCESSING.std + PREPROCESSING.mean
    assert images.shape == (4, 8, 8, 3)
    assert pixels.min() >= 0 and pixels.max() <= 1 and np.ptp(pixels) > 0.5
    wide = parity.synthetic_images(2, Preprocessing(image_size=64))
    assert np.abs(np.diff(wide, axis=1)).max() < 0.3 < np.ptp(wide)


def test_pixels_are_the_inverse_of_normalization():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = ((pixels / 255 - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32)
    assert (parity.as_pixels(images, PREPROCESSING) == pixels).all()


def test_batches_have_one_size_and_every_image_once():
    sizes = []

    def predict(images):
        sizes.append(len(images))
        return images[:, 0, 0]

    images = np.arange(5 * 12, dtype=np.float32).reshape(5, 2, 2, 3)
    np.testing.assert_array_equal(parity.in_batches(predict, images, 2), images[:, 0, 0])
    assert sizes == [2, 2, 2]


def test_latency_times_every_batch_size_after_warming_up():
    calls = []
    rows = parity.latency(lambda images: calls.append(len(images)), np.zeros((2, 2, 3)), [1, 4], 0)
    assert calls == [1] * 7 + [4] * 7
    assert [row["batch"] for row in rows] == [1, 4]
    for row in rows:
        assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["images_per_second"] > 0


def test_a_reference_is_read_as_it_was_saved(tmp_path):
    saved = reference(np.eye(3), labels=np.array([0, 1, 2]), data="flowers")
    parity.save_reference(saved, tmp_path, number=2)
    loaded = parity.load_reference(tmp_path)
    np.testing.assert_array_equal(loaded.outputs, np.eye(3)[:2])
    assert loaded.labels.tolist() == [0, 1]
    assert loaded.data == "flowers"


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_reference_that_is_missing_or_damaged_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "parity_reference.npz").write_bytes(content)
    with pytest.raises(UserError, match="--stages onnx"):
        parity.load_reference(tmp_path)


def test_the_report_holds_all_hops_and_the_table_their_times(tmp_path):
    expected = reference([[1.0, 0.5]])
    row = {"name": "ONNX fp32", **parity.compare(expected, expected.outputs)}
    row["latency"] = parity.latency(lambda images: None, np.zeros((2, 2, 3)), [8], 0)
    parity.save_report(expected, [row], tmp_path)
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["hops"][0]["latency"][0]["batch"] == 8
    assert report["thresholds"]["fp32"]["relative_difference"] == 1e-5
    assert parity.load_report(tmp_path) == report["hops"]
    lines = parity.table([row]).splitlines()
    assert lines[2].startswith("| ONNX fp32 | 0.0e+00 |")
    assert lines[-1].startswith("| ONNX fp32 | 8 |")
    (tmp_path / "parity.json").write_text("{")
    assert parity.load_report(tmp_path) == []


def test_a_head_of_zeros_is_as_close_as_can_be_or_lost():
    zeros = reference(np.zeros((3, 5)))
    same = parity.compare(zeros, np.zeros((3, 5)))
    assert (same["relative_difference"], same["cosine"]) == (0, 1)
    other = parity.compare(zeros, np.full((3, 5), 1e-9))
    assert parity.failures(other, "fp32", zeros)
