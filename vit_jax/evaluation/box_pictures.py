"""Pictures of images with boxes around their objects, those that are there and those found."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax.data.boxes import Boxes
from vit_jax.data.images import read_image
from vit_jax.evaluation.detections import Detections
from vit_jax.evaluation.mask_pictures import palette
from vit_jax.evaluation.per_class import write_per_class
from vit_jax.evaluation.pictures import Shown, contact_sheet, shortened
from vit_jax.files import atomic_files

if TYPE_CHECKING:  # It imports TFDS.
    from vit_jax.data.source import Source

# What is drawn: an object of less is as probable as not.
SHOWN_SCORE = 0.5
_DPI = 110
_SIDE = 256  # pixels of a shown image, at most
_SHOWN = 12  # images of a picture, in rows of three
_LETTERS = 40  # of a name


def draw(
    pixels: np.ndarray,
    corners: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Draws boxes on an image, each in the color of its class and with its name.

    Args:
        pixels: uint8 [height, width, 3].
        corners: [objects, 4] in pixels of the image; the first are drawn last, above the others.
        classes: [objects], indices of `names`.
        names: of the classes; none for boxes alone.
        scores: [objects], written beside the name.

    Returns:
        uint8 [height, width, 3].
    """
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    line = max(round(max(image.size) / 200), 2)
    font = ImageFont.load_default(max(round(max(image.size) / 40), 10))
    for index in range(len(corners) - 1, -1, -1):
        color = _color(int(classes[index]))
        left, top, right, bottom = corners[index].tolist()
        canvas.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), None, color, line)
        if not names:
            continue
        text = shortened(names[int(classes[index])], _LETTERS)
        if scores is not None:
            text += f" {scores[index]:.2f}"
        _write(canvas, text, (left, top), color, font)
    return np.asarray(image)


def _color(label: int) -> tuple[int, ...]:
    """The color of a class as masks have it, but as bright as it can be."""
    color = palette()[label % 254 + 1].astype(int)
    return tuple((255 * color // color.max()).tolist())


def _write(
    canvas: ImageDraw.ImageDraw,
    text: str,
    place: tuple[float, float],
    color: tuple[int, ...],
    font: Any,
) -> None:
    """Writes above a place, or below it at the upper edge of the image, on a ground of a color."""
    left, top, right, bottom = canvas.textbbox(place, text, font)
    up = bottom - place[1] if bottom - place[1] <= place[1] else 0
    canvas.rectangle((left, place[1] - up, right, bottom - up), color)
    # Black on what is bright, by the luma of ITU-R 601.
    bright = np.dot(color[:3], (0.299, 0.587, 0.114)) > 128
    canvas.text((place[0], place[1] - up), text, "black" if bright else "white", font)


def examples(
    source: "Source",
    found: Sequence[Detections],
    truth: Sequence[Boxes],
    channels: int,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """A few images, evenly spread over a source, with what is there and what was found.

    Args:
        source: of the images.
        found: in each of them.
        truth: the objects of each.
        channels: of an image.

    Returns:
        Of each its id, and it with the true boxes and with those found of `SHOWN_SCORE` or more,
        uint8 [height, width, 3].
    """
    shown = []
    for index in np.unique(np.linspace(0, source.num_examples - 1, _SHOWN).astype(int)):
        example, there = source[int(index)], found[index].above(SHOWN_SCORE)
        image = read_image(example["id"], example["image"], turn=source.turn, channels=channels)
        boxes = truth[index].of_image(*image.shape[:2])
        small, scale = _small(rgb(image))
        true = draw(small, boxes.corners * scale, boxes.classes, ())
        shown.append((example["id"], true, draw(small, there.corners * scale, there.classes, ())))
    return shown


def rgb(image: np.ndarray) -> np.ndarray:
    """An image of three channels; of others than three the first is shown."""
    return image if image.shape[-1] == 3 else image[..., :1].repeat(3, axis=-1)


def _small(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """An image of the size of a sheet's, and how many times as large it is as before."""
    scale = _SIDE / max(pixels.shape[:2])
    size = [max(round(side * scale), 1) for side in pixels.shape[1::-1]]
    return np.asarray(Image.fromarray(pixels).resize((size[0], size[1]))), scale


def write_report(
    folder: pathlib.Path,
    title: str,
    shown: Sequence[tuple[str, np.ndarray, np.ndarray]],
    per_class: Sequence[Mapping[str, Any]],
) -> list[pathlib.Path]:
    """Writes boxes.png, images with their true and with the found boxes, and per_class.csv.

    Args:
        folder: may exist; what is there of these names is replaced.
        title: of the picture.
        shown: from `examples`.
        per_class: rows for the table, with a "name" each.

    Returns:
        Their paths.

    Raises:
        UserError: the folder cannot be made, or the disk refuses.
    """
    sheet = []
    for name, true, found in shown:
        sheet.append(Shown(true, (pathlib.PurePath(name).name,)))
        sheet.append(Shown(found, (f"found, of {SHOWN_SCORE} or more",)))
    with atomic_files(folder) as new:
        contact_sheet(sheet, title).savefig(new / "boxes.png", dpi=_DPI)
        write_per_class(new / "per_class.csv", per_class)
        return [folder / path.name for path in sorted(new.iterdir())]
