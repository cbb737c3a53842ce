"""Pictures of masks: their colors, over an image, and beside what a model makes of it."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.evaluation.per_class import write_per_class
from vit_jax.evaluation.pictures import Shown, contact_sheet
from vit_jax.files import atomic_files

_DPI = 110
_SIDE = 192  # pixels of a shown image, at most


@functools.cache
def palette() -> np.ndarray:
    """The color of every index, uint8 [256, 3]: that of PASCAL VOC's masks, black for 0.

    The bits of an index are dealt to red, green and blue in turn, the highest places first.
    """
    indices, colors = np.arange(256), np.zeros((256, 3), int)
    for place in range(8):
        for channel in range(3):
            colors[:, channel] |= (indices >> (3 * place + channel) & 1) << (7 - place)
    return colors.astype(np.uint8)


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Half of an image, uint8 [height, width, 3], and half of the colors of its mask."""
    return ((image.astype(np.uint16) + palette()[mask] + 1) // 2).astype(np.uint8)


def save_mask(path: pathlib.Path, mask: np.ndarray) -> None:
    """Writes a mask, uint8 [height, width], as a PNG of indices whose palette shows them."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    image.save(path, "PNG")


def write_report(
    folder: pathlib.Path,
    title: str,
    shown: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    per_class: Sequence[Mapping[str, Any]],
) -> list[pathlib.Path]:
    """Writes masks.png, images beside their true and predicted masks, and per_class.csv.

    Args:
        folder: may exist; what is there of these names is replaced.
        title: of the picture.
        shown: name, pixels uint8 [height, width, 3], true and predicted mask uint8 [height, width].
        per_class: rows for the table, with a "name" each.

    Returns:
        Their paths.

    Raises:
        UserError: the folder cannot be made, or the disk refuses.
    """
    sheet = []
    for name, pixels, truth, predicted in shown:
        colors = palette()
        smooth, nearest = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
        sheet.append(Shown(_small(pixels, smooth), (pathlib.PurePath(name).name,)))
        # Between the colors of two classes lies that of a third.
        sheet.append(Shown(_small(colors[truth], nearest), ("true mask",)))
        sheet.append(Shown(_small(colors[predicted], nearest), ("predicted mask",)))
    with atomic_files(folder) as new:
        contact_sheet(sheet, title).savefig(new / "masks.png", dpi=_DPI)
        write_per_class(new / "per_class.csv", per_class)
        return [folder / path.name for path in sorted(new.iterdir())]


def _small(pixels: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE), resampling)
    return np.asarray(image)
