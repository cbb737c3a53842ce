"""A folder of images with annotations in COCO's format as a data set, for detection.

The images lie below a folder that is called as the annotations are, or below images/:

    coco/annotations/instances_train2017.json   coco/train2017/000000000009.jpg
    coco/annotations/instances_val2017.json     coco/val2017/000000000139.jpg

or each split has both:

    photos/train/_annotations.coco.json         photos/train/1.jpg
    photos/valid/_annotations.coco.json         photos/valid/2.jpg

or there are no splits, and the whole is divided:

    photos/annotations/instances_default.json   photos/images/1.jpg

The classes are those of train, in the order of their ids; another split may have others of these
ids, since names count.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_jax.data.boxes import Boxes
from vit_jax.data.coco_file import CocoFile, read_coco
from vit_jax.data.folder import PREFIX, SPLITS, find_splits
from vit_jax.data.headers import measure, no_image, upright_sides
from vit_jax.data.labeled_files import (
    Entry,
    File,
    FileRules,
    LabeledFiles,
    divide,
    hashed,
    without_cut_off,
)
from vit_jax.data.survey import Broken, Survey, listed
from vit_jax.errors import UserError

ANNOTATIONS = "_annotations.coco.json"
_OF_ALL = ("", "default")  # What files are called after that are of no split.
_DEFAULTS = FileRules()


class _Looked(NamedTuple):
    """The bytes of an image, its height and width if its header tells, and what is wrong."""

    num_bytes: int
    sides: tuple[int, int] | None
    fault: str


class _Part(NamedTuple):
    """A file of annotations, the folder of its images, and the split that they are: "" for all."""

    split: str
    annotations: Path
    images: Path


def open_coco_folder(path: str, rules: FileRules = _DEFAULTS) -> LabeledFiles:
    """Reads the annotations of a folder and lists its images.

    Args:
        path: of the folder.
        rules: as in `folder.open_folder`, but there may be one class. To skip what is broken leaves
            images out, too, that are missing or of another size than the annotations say.

    Raises:
        UserError: all that is wrong with the folder, in one line.
    """
    root = Path(path).expanduser()
    survey = Survey(f"folder {path!r}", rules.broken == "skip", rules.skip_flag, rules.channels)
    parts = _parts(path)
    files = {part: read_coco(part.annotations) for part in parts}
    first = next((x for x in parts if x.split == "train"), parts[0])
    class_names = tuple(files[first].categories.values())
    boxes, entries, partition, shared = {}, {}, None, []
    for part, file in files.items():
        looked = _look_at(part, file, survey.channels)
        found = _by_class(file, class_names, survey)
        found = {name: _within(x, looked[name].sides) for name, x in found.items()}
        _tell(file, found, survey)
        entries[part.split] = _entries(part, found, looked, survey)
        of_part = {str(part.images / name): x for name, x in found.items()}
        shared += sorted(name for name in found if str(part.images / name) in boxes)
        boxes |= of_part
    if shared:
        survey.others.append(
            f"{len(shared):,} images are of two splits ({listed(shared, 4)}), so one could be "
            "trained on and evaluated on: leave each in one of the files of annotations"
        )
    if "" in entries:
        entries, partition = divide(entries[""], rules, survey)
    survey.check()
    return LabeledFiles(
        survey.what,
        PREFIX + path,
        str(root),
        class_names,
        {
            name: tuple(File(x.path, boxes[x.path], x.num_bytes) for x in sorted(part, key=hashed))
            for name, part in entries.items()
        },
        has_boxes=True,
        partition=partition,
        notes=survey.notes(),
    )


def _parts(path: str) -> list[_Part]:
    """The files of annotations of a folder, one a split.

    Raises:
        UserError: there is none, or two of one split, or some of splits and one of all.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder {path!r} does not exist: name one with annotations/ in it")
    parts = [
        _Part(name, root / directory / ANNOTATIONS, root / directory)
        for directory, name in find_splits(path).items()
        if (root / directory / ANNOTATIONS).exists()
    ]
    if (root / ANNOTATIONS).exists():
        parts.append(_Part("", root / ANNOTATIONS, root))
    for file, name in _instances(root):
        word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
        if name not in _OF_ALL and word not in SPLITS:
            raise UserError(
                f"{file} is of no split: call it instances_train.json, instances_val.json or "
                "instances_test.json, or instances_default.json if it is of all images"
            )
        parts.append(_Part(SPLITS.get(word, ""), file, _images_of(root, name, word)))
    if not parts:
        raise UserError(
            f"folder {path!r} has no annotations/instances_*.json, nor train/{ANNOTATIONS}: these "
            "are what objective detection trains on"
        )
    for split in {part.split for part in parts}:
        same = [str(part.annotations) for part in parts if part.split == split]
        if len(same) > 1:
            raise UserError(f"{' and '.join(same)} are of one split: keep one of them")
    if len(parts) > 1 and (whole := next((x for x in parts if not x.split), None)):
        raise UserError(
            f"{whole.annotations} is of all images, and {path} has annotations of splits beside "
            "it: keep either"
        )
    return parts


def _instances(root: Path) -> Iterator[tuple[Path, str]]:
    """The files called instances_NAME.json, each with its NAME, and instances.json with ""."""
    for directory in (root / "annotations", root):
        if directory.is_dir():
            for file in sorted(directory.glob("instances*.json")):
                if match := re.fullmatch(r"instances(?:_(.+))?", file.stem):
                    yield file, match[1] or ""


def _images_of(root: Path, name: str, word: str) -> Path:
    """The first of the folders there that may have the images of instances_NAME.json."""
    names = (name, word) if name not in _OF_ALL else ()
    folders = [x for y in names for x in (root / y, root / "images" / y)]
    return next((x for x in (*folders, root / "images") if x.is_dir()), root)


def _by_class(file: CocoFile, class_names: tuple[str, ...], survey: Survey) -> Mapping[str, Boxes]:
    """The boxes of a file with classes as the data set numbers them, which go by names."""
    names = tuple(file.categories.values())
    if names == class_names:
        return file.boxes
    places = {name: index for index, name in enumerate(class_names)}
    new = np.array([places.get(name, -1) for name in names], np.int32)
    used = np.unique(np.concatenate([x.classes for x in file.boxes.values()] or [[]]).astype(int))
    survey.unknown += [f"{names[i]!r} of {file.path}" for i in used if new[i] < 0]
    return {name: dataclasses.replace(x, classes=new[x.classes]) for name, x in file.boxes.items()}


def _look_at(part: _Part, file: CocoFile, channels: int) -> dict[str, _Looked]:
    """Looks at the images of annotations, by their names."""
    with ThreadPoolExecutor() as threads:
        looked = threads.map(lambda name: _look(str(part.images / name), channels), file.boxes)
        return dict(zip(file.boxes, looked, strict=True))


def _look(path: str, channels: int) -> _Looked:
    try:
        size = measure(path, channels)
    except OSError as error:
        return _Looked(0, None, f"{path} cannot be read ({error.strerror}): fetch it")
    if size is None:
        return _Looked(0, None, no_image(path, channels))
    return _Looked(size, upright_sides(path), "")


def _within(boxes: Boxes, sides: tuple[int, int] | None) -> Boxes:
    """The objects in an image; where annotations tell its size, `read_coco` has chosen them."""
    return boxes if boxes.size or not sides else boxes.within(*sides)


def _tell(file: CocoFile, boxes: Mapping[str, Boxes], survey: Survey) -> None:
    """Tells of what is odd in annotations and no mistake."""
    empty = file.empty + sum(len(file.boxes[name]) - len(x) for name, x in boxes.items())
    if empty:
        survey.remarks.append(
            f"{empty:,} annotations of {file.path} are left out, of no height or width or "
            "beyond their image"
        )
    bare = sum(not len(x) for x in boxes.values())
    if bare == len(boxes):
        survey.others.append(f"{file.path} has no object: add annotations")
    elif bare:
        survey.remarks.append(f"{bare:,} of the {len(boxes):,} images of {file.path} show nothing")


def _entries(
    part: _Part, boxes: Mapping[str, Boxes], looked: Mapping[str, _Looked], survey: Survey
) -> list[Entry]:
    """The images of annotations that are there and sound; others are broken."""
    prefix = f"{part.images.name}/" if part.split else ""
    found = []
    for name, objects in boxes.items():
        path, (size, sides, fault) = str(part.images / name), looked[name]
        if not fault and objects.size and sides and objects.size != sides:
            fault = (
                f"{path} has {sides[1]} x {sides[0]} pixels, and {objects.size[1]} x "
                f"{objects.size[0]} by {part.annotations}: mend either"
            )
        if fault:
            survey.broken[prefix + name] = Broken(fault, "")
        else:
            found.append(Entry(prefix + name, path, (), size, objects.digest()))
    return found if part.split in ("train", "") else without_cut_off(found, survey)
