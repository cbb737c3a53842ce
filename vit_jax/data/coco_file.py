"""Annotations of objects in COCO's format (Lin et al., 2014, cocodataset.org/#format-data): JSON.

    {"images": [{"id": 9, "file_name": "a/9.jpg", "height": 480, "width": 640}],
     "categories": [{"id": 18, "name": "dog"}],
     "annotations": [{"image_id": 9, "category_id": 18, "bbox": [left, top, width, height],
                      "area": 120.5, "iscrowd": 0}]}

`height`, `width`, `area` and `iscrowd` may be left out or null, and all else is passed over.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.data.boxes import Boxes
from vit_jax.errors import UserError, brief, first_line, shortlist
from vit_jax.printable import printable

# Four times that of COCO's train2017, which has outlines of all objects.
_MOST_BYTES = 2**31
_MOST_CLASSES = 2**16
_KEPT = frozenset(
    ["images", "annotations", "categories", "id", "file_name", "height", "width", "name"]
    + ["image_id", "category_id", "bbox", "area", "iscrowd"]
)
_NAMED = 5  # faults in a message; the rest are counted


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """The content of a file of annotations.

    Attributes:
        path: of the file.
        categories: names by id, in the order of the ids, which is that of the classes.
        image_ids: by file name.
        boxes: the objects of each image, by file name; their classes are places in `categories`.
        empty: annotations that were left out: of no height or width, or beyond their image.
    """

    path: str
    categories: Mapping[int, str]
    image_ids: Mapping[str, int]
    boxes: Mapping[str, Boxes]
    empty: int


@dataclasses.dataclass
class _Objects:
    """The annotations of an image, while they are collected."""

    name: str
    size: tuple[int, int] | None
    corners: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    classes: list[int] = dataclasses.field(default_factory=list)
    crowd: list[bool] = dataclasses.field(default_factory=list)
    areas: list[float] = dataclasses.field(default_factory=list)

    def boxes(self) -> Boxes:
        return Boxes(
            np.array(self.corners, np.float64).reshape(-1, 4),
            np.array(self.classes, np.int32),
            np.array(self.crowd, bool),
            np.array(self.areas, np.float64),
            size=self.size,
        )


class _Fault(Exception):
    """The fault of an entry, in a sentence that its place comes before."""


def read_coco(path: str | os.PathLike[str]) -> CocoFile:
    """Reads a file of annotations.

    Raises:
        UserError: it cannot be read, is no JSON of this form, or is larger than 2 GiB; the first
            faults are named.
    """
    document = _read(path)
    faults: list[str] = []
    categories = _categories(document, faults)
    images = _images(document, faults)
    empty = _annotations(document, {x: i for i, x in enumerate(categories)}, images, faults)
    if faults:
        raise UserError(f"{path}: {shortlist(faults, _NAMED)}")
    if not categories:
        raise UserError(f"{path} has no categories: add the classes of the objects")
    return CocoFile(
        str(path),
        categories,
        {x.name: image_id for image_id, x in images.items()},
        {x.name: x.boxes() for x in images.values()},
        empty,
    )


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        if not os.path.isfile(path):  # A pipe would be waited for, forever.
            raise UserError(f"{path} is not a file: give annotations in COCO's format")
        if os.path.getsize(path) > _MOST_BYTES:
            raise ValueError("larger than 2 GiB")
        with open(path, encoding="utf-8-sig") as file:
            document = json.load(file, object_pairs_hook=_pick)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is no readable JSON ({first_line(error)}): mend it") from error
    if not isinstance(document, dict):
        raise UserError(
            f"{path} is {brief(document)}: it must be an object with images, annotations and "
            "categories"
        )
    return document


def _pick(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without what is not read: outlines are most of a file."""
    found = {}
    for key, value in pairs:
        if key in _KEPT:
            if key in found:
                raise ValueError(f"an object has {key} twice")
            found[key] = value
    return found


def _entries(
    document: Mapping[str, Any], key: str, faults: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list, with their places in it for a message."""
    found = document.get(key)
    if not isinstance(found, list):
        told = "lacks" if key not in document else f"is {brief(found)}, no list"
        faults.append(f"{key} {told}: the format of COCO has a list of objects there")
        return
    for index, entry in enumerate(found):
        if isinstance(entry, dict):
            yield f"{key}[{index}]", entry
        else:
            faults.append(f"{key}[{index}] is {brief(entry)}, no object")


def _categories(document: Mapping[str, Any], faults: list[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    names = set()
    for place, entry in _entries(document, "categories", faults):
        try:
            number, name = _whole(entry, "id"), entry.get("name")
            if not isinstance(name, str) or not name.strip() or len(name) > 1000:
                raise _Fault(f"has the name {brief(name)}, which is none")
            if printable(name) != name:
                raise _Fault(f"has the name {brief(name)}, which cannot be printed")
            if number in found or name in names:
                raise _Fault(f"has an id or name that another has: {number}, {brief(name)}")
            names.add(name)
            found[number] = name
        except _Fault as fault:
            faults.append(f"{place} {fault}")
        if len(found) > _MOST_CLASSES:
            faults.append(f"there are more than {_MOST_CLASSES:,} categories")
            break
    return {number: found[number] for number in sorted(found)}


def _images(document: Mapping[str, Any], faults: list[str]) -> dict[int, _Objects]:
    found, names = {}, set()
    for place, entry in _entries(document, "images", faults):
        try:
            number, name = _whole(entry, "id"), _file_name(entry)
            if number in found or name in names:
                raise _Fault(f"has an id or file_name that another has: {number}, {brief(name)}")
            told = [key for key in ("height", "width") if entry.get(key) is not None]
            sizes = [_side(entry, key) for key in told]
            names.add(name)
            found[number] = _Objects(name, (sizes[0], sizes[1]) if len(sizes) == 2 else None)
        except _Fault as fault:
            faults.append(f"{place} {fault}")
    return found


def _annotations(
    document: Mapping[str, Any],
    classes: Mapping[int, int],
    images: Mapping[int, _Objects],
    faults: list[str],
) -> int:
    """Adds the objects to their images; returns how many are empty."""
    empty, numbers = 0, set()
    for place, entry in _entries(document, "annotations", faults):
        try:
            number = entry.get("id")
            if isinstance(number, int | str):  # It is not needed, and others give none.
                if number in numbers:
                    raise _Fault(f"has the id {brief(number)}, which another has")
                numbers.add(number)
            image, category = _whole(entry, "image_id"), _whole(entry, "category_id")
            if image not in images:
                raise _Fault(f"has image_id {image}, which no image has")
            if category not in classes:
                raise _Fault(f"has category_id {category}, which no category has")
            corners, area = _corners(entry), entry.get("area")
            if area is not None and not (_is_number(area) and area >= 0):
                raise _Fault(f"has area {brief(area)}: it must be a number of square pixels")
            crowd = entry.get("iscrowd")
            if crowd not in (None, 0, 1):
                raise _Fault(f"has iscrowd {brief(crowd)}: it must be 0 or 1")
        except _Fault as fault:
            faults.append(f"{place} {fault}")
            continue
        objects = images[image]
        if not _shows(corners, objects.size):
            empty += 1
            continue
        objects.corners.append(corners)
        objects.classes.append(classes[category])
        objects.crowd.append(bool(crowd))
        objects.areas.append(math.nan if area is None else float(area))
    return empty


def _corners(entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise _Fault(f"has bbox {brief(box)}: it must be left, top, width and height in pixels")
    left, top, width, height = map(float, box)
    return left, top, left + width, top + height


def _shows(corners: tuple[float, ...], size: tuple[int, int] | None) -> bool:
    left, top, right, bottom = corners
    height, width = size or (math.inf, math.inf)
    return max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)


def _file_name(entry: Mapping[str, Any]) -> str:
    """The path of an image below the folder of images."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 4096:
        raise _Fault(f"has file_name {brief(name)}, which is none")
    name = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(name) or name.split("/")[0] == ".." or name == ".":
        raise _Fault(f"has file_name {brief(name)}: it must lie below the folder of the images")
    return name


def _whole(entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise _Fault(f"has {key} {brief(value)}: it must be a whole number")
    return value


def _side(entry: Mapping[str, Any], key: str) -> int:
    side = _whole(entry, key)
    if not 0 < side < 2**31:
        raise _Fault(f"has {key} {side}: it must be a number of pixels")
    return side


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e9  # Of NaN as well.
