"""The report of an evaluation: a page to look at, its pictures, and the scores of every class."""

import base64
import dataclasses
import io
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vit_jax import webpage
from vit_jax.data import imagenet
from vit_jax.data.preprocess import eval_view
from vit_jax.data.protocols import Preprocessing
from vit_jax.evaluation import pictures
from vit_jax.evaluation.per_class import most_confused, readable_confusion, write_per_class
from vit_jax.files import atomic_files

if TYPE_CHECKING:
    from vit_jax.data.source import Source
    from vit_jax.evaluation.metrics import ClassificationMetrics
    from vit_jax.evaluation.multilabel import MultiLabelMetrics

_WORST = 36  # images of highest loss that are shown
_CONFUSED = 20  # pairs of classes that are listed
_SIDE = 192  # pixels of a shown image, at most
_DPI = 110


@dataclasses.dataclass(frozen=True)
class WorstImage:
    """An image of high loss.

    Attributes:
        pixels: uint8 [height, width, 3], what the model saw.
        name: of the image, its path where it has one.
        truth: its label or labels, in words.
        predicted: what it is taken for, with the probability.
        loss: of the image.
    """

    pixels: np.ndarray
    name: str
    truth: str
    predicted: str
    loss: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of a report; text in it may be anything.

    Attributes:
        title: what was evaluated on what.
        scalars: by name.
        per_class: a row for each class: "name", shares that may be None, and "examples".
        confused: rows of the true class, the one it is taken for, and the number of images.
        worst: the images of highest loss, that of the highest first.
        confusion: the arguments of `pictures.confusion_matrix`; None where an image has several
            labels.
    """

    title: str
    scalars: Mapping[str, float]
    per_class: Sequence[Mapping[str, Any]]
    confused: Sequence[tuple[str, str, int]]
    worst: Sequence[WorstImage]
    confusion: tuple[np.ndarray, np.ndarray, Sequence[str], int] | None = None


def of_classes(
    title: str,
    found: "ClassificationMetrics",
    source: "Source",
    preprocessing: Preprocessing,
    per_class: Sequence[Mapping[str, Any]],
) -> Report:
    """The report of images with one label each.

    Args:
        title: of the report.
        found: the metrics, of the images of the source in their order.
        source: whose class names are those of the model; the worst images are read again.
        preprocessing: of the model.
        per_class: as in `Report`.

    Raises:
        UserError: an image cannot be read any more.
    """
    names = _readable(source)
    confusion = readable_confusion(found.labels, found.predicted, names)

    def words(index: int) -> tuple[str, str]:
        predicted = f"{names[found.predicted[index]]}, {found.confidences[index]:.0%}"
        return names[found.labels[index]], predicted

    worst = _worst(found.losses, source, preprocessing, words)
    pairs = most_confused(found.labels, found.predicted, _CONFUSED)
    confused = [(names[pair.true], names[pair.predicted], pair.images) for pair in pairs]
    return Report(title, found.scalars(), per_class, confused, worst, confusion)


def of_labels(
    title: str,
    found: "MultiLabelMetrics",
    source: "Source",
    preprocessing: Preprocessing,
    per_class: Sequence[Mapping[str, Any]],
) -> Report:
    """The report of images with any number of labels; the arguments are those of `of_classes`."""
    names = _readable(source)

    def words(index: int) -> tuple[str, str]:
        labeled, predicted = (np.flatnonzero(x[index]) for x in (found.labels, found.predicted))
        probable = 1 / (1 + np.exp(-found.logits[index].astype(np.float64)))
        taken_for = [f"{names[i]}, {probable[i]:.0%}" for i in predicted]
        return "; ".join(names[i] for i in labeled) or "nothing", "; ".join(taken_for) or "nothing"

    worst = _worst(found.losses, source, preprocessing, words)
    return Report(title, found.scalars(), per_class, (), worst)


def _readable(source: "Source") -> list[str]:
    return [imagenet.readable(name) for name in source.class_names]


def _worst(
    losses: np.ndarray,
    source: "Source",
    preprocessing: Preprocessing,
    words: Callable[[int], tuple[str, str]],
) -> list[WorstImage]:
    """The images of highest loss; `words` says what one is and what it is taken for."""
    indices = np.argsort(-losses, kind="stable")[:_WORST].tolist()
    return [
        WorstImage(*_seen(source, i, preprocessing), *words(i), float(losses[i])) for i in indices
    ]


def _seen(source: "Source", index: int, preprocessing: Preprocessing) -> tuple[np.ndarray, str]:
    """An image as the model sees it, in at most 192 pixels a side, and its name."""
    example = source[index]
    view = eval_view(example["image"], preprocessing, border=source.border, turn=source.turn)
    image = Image.fromarray(np.uint8(np.rint(preprocessing.to_picture(view) * 255)))
    image.thumbnail((_SIDE, _SIDE))
    return np.asarray(image), example["id"]


def write(folder: pathlib.Path, report: Report) -> list[pathlib.Path]:
    """Writes report.html, worst.png, per_class.csv and, where there is one, confusion.png.

    They take the place of an earlier report, of whose pictures none stays.

    Returns:
        Their paths.

    Raises:
        UserError: the folder cannot be made, or the disk refuses.
    """
    with atomic_files(folder) as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of letters that matplotlib's font lacks.
        write_per_class(new / "per_class.csv", report.per_class)
        title = f"The {len(report.worst)} images of highest loss"
        sheet = pictures.contact_sheet(list(map(_shown, report.worst)), title)
        sheet.savefig(new / "worst.png", dpi=_DPI)
        confusion = None
        if report.confusion is not None:
            figure = pictures.confusion_matrix(*report.confusion)
            figure.savefig(new / "confusion.png", dpi=_DPI)
            confusion = (new / "confusion.png").read_bytes()
        (new / "report.html").write_text(_page(report, confusion), "utf-8")
        written = [folder / path.name for path in sorted(new.iterdir())]
    if confusion is None:
        (folder / "confusion.png").unlink(missing_ok=True)
    return written


def _shown(image: WorstImage) -> pictures.Shown:
    name = pathlib.PurePath(image.name).name
    words = (f"is {image.truth}", f"taken for {image.predicted}", f"loss {image.loss:.2f}")
    return pictures.Shown(image.pixels, (name, *words))


_STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }
figure { margin: 0; font-size: 0.85rem; overflow-wrap: anywhere; }
figcaption b { font-weight: 600; }
figure img { width: 100%; display: block; } img.tiny { image-rendering: pixelated; }
tbody th { overflow-wrap: anywhere; }
"""


def _page(report: Report, confusion: bytes | None) -> str:
    body = [
        f"<h1>{webpage.text(report.title)}</h1>",
        _table(["", ""], [[name.replace("_", " "), x] for name, x in report.scalars.items()]),
        f"<h2>The {len(report.worst)} images of highest loss</h2>",
        f'<div class="sheet">{"".join(map(_figure, report.worst))}</div>',
    ]
    if report.confused:
        rows = [list(row) for row in report.confused]
        body += ["<h2>Confused most</h2>", _table(["is", "taken for", "images"], rows)]
    if confusion is not None:
        body += ["<h2>Confusion matrix</h2>", _chart(confusion)]
    header = [column.replace("_", " ") for column in report.per_class[0]]
    rows = [
        list({**row, "name": imagenet.readable(row["name"])}.values())
        for row in sorted(report.per_class, key=_f1)
    ]
    body += ["<h2>Classes, that of the lowest F1 first</h2>", _table(header, rows)]
    # What a file is called may try to be a script: nothing is loaded from elsewhere, none runs.
    return webpage.document(report.title, body, _STYLE, self_contained=True)


def _chart(content: bytes) -> str:
    words = "images by true and predicted class"
    return f'<div class="picture"><img alt="{words}" src="{_data("png", content)}"></div>'


def _f1(row: Mapping[str, Any]) -> float:
    return 2.0 if row["f1"] is None else row["f1"]


def _figure(image: WorstImage) -> str:
    tiny = max(image.pixels.shape) < 64
    format = "png" if tiny else "jpeg"
    buffer = io.BytesIO()
    Image.fromarray(image.pixels).save(buffer, format, quality=85)
    truth, predicted, name = map(webpage.text, (image.truth, image.predicted, image.name))
    return (
        f'<figure><img class="{"tiny" if tiny else "photo"}" alt="" '
        f'src="{_data(format, buffer.getvalue())}"><figcaption>is <b>{truth}</b><br>'
        f"taken for <b>{predicted}</b><br>loss {image.loss:.2f}<br>{name}</figcaption></figure>"
    )


def _data(format: str, content: bytes) -> str:
    return f"data:image/{format};base64,{base64.b64encode(content).decode()}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    numeric = [bool(rows) and not isinstance(x, str) for x in (rows[0] if rows else header)]
    head = "".join(map(_heading, header, numeric)) if any(header) else ""
    lines = [f"<thead><tr>{head}</tr></thead>" if head else "", "<tbody>"]
    lines += [f"<tr>{''.join(map(_cell, row, numeric))}</tr>" for row in rows]
    return "\n".join(['<div class="table"><table>', *lines, "</tbody></table></div>"])


def _heading(name: str, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    return f"<th{kind}>{webpage.text(name)}</th>"


def _cell(value: Any, numeric: bool) -> str:
    shown = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value}"
    tag = "td" if numeric else "th"  # As on every page names are headings, aligned to the left.
    return f"<{tag}>{webpage.text(shown)}</{tag}>"
