"""The page, pictures and table of an evaluation, of names that are anything."""

import csv
import io

import numpy as np
import PIL.Image
import pytest

from vit_jax.data.protocols import Preprocessing
from vit_jax.evaluation import pictures, report
from vit_jax.evaluation.metrics import ClassificationMetrics
from vit_jax.evaluation.multilabel import MultiLabelMetrics

from ..handmade import HOSTILE
from ..sources import tiny_source
from ..webpages import Page


def source_of(labels, names):
    """Gray images of 8 x 8 pixels, the i-th of gray level i, with paths that are hostile."""
    source, _, _ = tiny_source((1,) * len(labels), size=8)
    for i, example in enumerate(source.examples.examples):
        buffer = io.BytesIO()
        PIL.Image.new("L", (8, 8), i).save(buffer, "PNG")
        example |= {"id": f"/data/{HOSTILE}/{i}.png", "image": buffer.getvalue()}
        source.examples.examples[i] = example | {"label": labels[i]}
    object.__setattr__(source, "class_names", tuple(names))
    return source


def found_of(labels, predicted, losses, num_classes):
    return ClassificationMetrics(
        accuracy=0.5, top5_accuracy=1.0, loss=float(np.mean(losses)), calibration_error=0.1,
        num_classes=num_classes, labels=labels, predicted=predicted, losses=losses,
        confidences=np.linspace(0.5, 1, len(labels)),
    )  # fmt: skip


def rows_of(found, names):
    scores = found.per_class()
    return [{"name": name, **scores.row(i)} for i, name in enumerate(names)]


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_a_report_shows_the_worst_images_first_and_no_name_does_harm(tmp_path, num_classes):
    names = [HOSTILE, "=1+1", "\udcff"] + [f"class {i}" for i in range(3, num_classes)]
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, num_classes, (2, 60))
    losses = rng.permutation(60) / 10
    found = found_of(labels, predicted, losses, num_classes)
    source = source_of(labels.tolist(), names)
    rows = rows_of(found, names)
    made = report.of_classes(f"runs/{HOSTILE} on it", found, source, Preprocessing(8), rows)
    written = report.write(tmp_path / "report", made)
    assert [x.name for x in written] == [
        "confusion.png", "per_class.csv", "report.html", "worst.png",
    ]  # fmt: skip
    # The 36 of highest loss, as the model sees them.
    worst = np.argsort(-losses)[:36]
    assert [image.pixels.max() for image in made.worst] == worst.tolist()
    assert [image.loss for image in made.worst] == sorted(losses, reverse=True)[:36]
    text = (tmp_path / "report/report.html").read_text("utf-8")
    page = Page(tmp_path / "report/report.html")
    policy = {each.get("http-equiv"): each.get("content") for each in page.all("meta")}
    assert policy["Content-Security-Policy"].startswith("default-src 'none'; img-src data:;")
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "form"}
    assert not [
        key for _, attributes in page.elements for key in attributes if key.startswith("on")
    ]
    images = [attributes["src"] for attributes in page.all("img")]
    assert len(images) == 37 and all(x.startswith("data:image/") for x in images)
    assert "\x1b" not in text and "<script>alert" not in text
    assert "<script>alert('|')</script>\\x1b[2J\\n# forged" in page.text  # It is shown.
    with (tmp_path / "report/per_class.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == num_classes
    assert [row["name"] for row in table[1:3]] == ["'=1+1", "\\udcff"]
    recall = np.mean(predicted[labels == 1] == 1) if (labels == 1).any() else None
    assert table[1]["recall"] == ("" if recall is None else str(recall))
    for name in ("worst", "confusion"):
        with PIL.Image.open(tmp_path / f"report/{name}.png") as picture:
            # Opaque and white around, so that it can be read on any page; of a size to look at.
            assert max(picture.size) < 2000
            assert picture.convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 255)


def test_images_of_several_labels_are_shown_with_all_of_them(tmp_path):
    logits = np.array([[3.0, -1, 2], [-1, -1, -1], [0.5, 0.25, -3]], np.float32)
    labels = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    found = MultiLabelMetrics(logits, labels, np.array([0.5, 0.7, 0.1]))
    source = source_of(list(labels.astype(np.int64)), ["a", "b", "c"])
    rows = rows_of(found, ["a", "b", "c"])
    (tmp_path / "confusion.png").write_bytes(b"of an earlier report")
    made = report.of_labels("it", found, source, Preprocessing(8), rows)
    assert [(x.truth, x.predicted) for x in made.worst] == [
        ("nothing", "nothing"), ("a; b", "a, 95%; c, 88%"), ("a", "a, 62%; b, 56%"),
    ]  # fmt: skip
    written = report.write(tmp_path, made)
    assert [x.name for x in written] == ["per_class.csv", "report.html", "worst.png"]
    assert sorted(tmp_path.iterdir()) == written
    assert "Confusion" not in (tmp_path / "report.html").read_text()


def test_the_cells_of_a_confusion_matrix_are_colored_by_their_share_of_the_row():
    counts = np.array([[8, 2, 0], [0, 0, 0], [5, 0, 5]])
    figure = pictures.confusion_matrix(counts, counts.sum(1), ["a", "b", "c"], 3)
    (axes,) = figure.axes
    colors = axes.images[0].get_array()
    blue, orange = np.array([0x1F, 0x5F, 0xA8]) / 255, np.array([0xC2, 0x5A, 0]) / 255
    np.testing.assert_allclose(colors[0, 0], 1 + 0.8 * (blue - 1))
    np.testing.assert_allclose(colors[0, 1], 1 + np.sqrt(0.2) * (orange - 1))
    np.testing.assert_allclose(colors[1], 1)
    assert [x.get_text() for x in axes.texts] == ["8", "2", "5", "5"]
    assert [x.get_text() for x in axes.get_yticklabels()] == ["a", "b", "c"]


def test_a_long_name_is_cut_in_its_middle():
    assert pictures.shortened("a" * 9 + "b" * 9, 9) == "aaaa…bbbb"
    assert pictures.shortened("abc\n", 9) == "abc\\n"
