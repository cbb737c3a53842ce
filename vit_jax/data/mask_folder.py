"""A folder of images and masks as a data set, for semantic segmentation.

`images/` and `masks/` lie in the folder itself, which is divided then, or in each of its splits:

    photos/classes.txt            a name a line, that of class 0 first; it may be left out
    photos/train/images/a/1.jpg   photos/train/masks/a/1.png
    photos/test/images/...        photos/test/masks/...

A mask is a PNG of the indices of classes, see `masks.read_mask`, of the size of its image, at the
same place but for the suffix.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.data.folder import PREFIX, files_below, find_splits
from vit_jax.data.headers import measure, no_image
from vit_jax.data.images import FORMATS, upright_size
from vit_jax.data.labeled_files import (
    Entry,
    File,
    FileRules,
    LabeledFiles,
    divide,
    hashed,
    without_cut_off,
)
from vit_jax.data.masks import check_indices, read_mask
from vit_jax.data.survey import Broken, Survey, listed
from vit_jax.errors import UserError, first_line
from vit_jax.pixel_classes import IGNORED, MOST_CLASSES, numbered

IMAGES, MASKS = "images", "masks"
NAMES = "classes.txt"
_DEFAULTS = FileRules()


@dataclasses.dataclass
class _Found:
    """The files below images/ and masks/ of all splits.

    Attributes:
        survey: of the data set.
        masks: the path of the mask of each image, by the name of the image.
        largest: the largest index of all masks, -1 of none.
        lonely: images without a mask.
        left_over: masks without an image.
        faults: of masks, a sentence each, by their names.
    """

    survey: Survey
    masks: dict[str, str] = dataclasses.field(default_factory=dict)
    largest: int = -1
    lonely: list[str] = dataclasses.field(default_factory=list)
    left_over: list[str] = dataclasses.field(default_factory=list)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)


def open_mask_folder(path: str, rules: FileRules = _DEFAULTS, num_classes: int = 0) -> LabeledFiles:
    """Lists the images of a folder and reads all of their masks, in as many threads as cores.

    Args:
        path: of the folder.
        rules: as in `folder.open_folder`; classes need not be several.
        num_classes: of the masks where the folder has no classes.txt; 0 takes what is in them.

    Raises:
        UserError: all that is wrong with the folder, in one line.
    """
    root = Path(path).expanduser()
    survey = Survey(f"folder {path!r}", rules.broken == "skip", rules.skip_flag, rules.channels)
    named = _class_names(root)
    number = len(named) or num_classes or MOST_CLASSES
    found, partition = _Found(survey), None
    splits = [x for x in find_splits(path).items() if (root / x[0] / IMAGES).is_dir()]
    if (root / IMAGES).is_dir():
        if splits:
            survey.others.append(
                f"folder {path!r} has {IMAGES}/ of its own beside {splits[0][0]}/{IMAGES}/: keep "
                "either"
            )
        entries, partition = divide(_pairs(root, found, "", number), rules, survey)
    else:
        entries = {
            name: _pairs(root / directory, found, f"{directory}/", number)
            for directory, name in splits
        }
        if not entries:
            raise UserError(
                f"folder {path!r} has no {IMAGES}/ and {MASKS}/, nor train/{IMAGES}/ and "
                f"train/{MASKS}/: these are what objective segmentation trains on"
            )
        for name in entries.keys() - {"train"}:
            entries[name] = without_cut_off(entries[name], survey)
    _tell(found)
    survey.check()
    return LabeledFiles(
        survey.what,
        PREFIX + path,
        str(root),
        named or numbered(num_classes or found.largest + 1),
        {name: _files(part, found.masks) for name, part in entries.items()},
        has_masks=True,
        partition=partition,
        notes=survey.notes(),
    )


def _files(entries: list[Entry], masks: Mapping[str, str]) -> tuple[File, ...]:
    return tuple(File(x.path, masks[x.name], x.num_bytes) for x in sorted(entries, key=hashed))


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / NAMES
    try:
        lines = path.read_text("utf-8-sig").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({first_line(error)}): mend it") from error
    names = tuple(line.strip() for line in lines)
    if "" in names or len({*names}) < len(names) or len(names) > MOST_CLASSES:
        raise UserError(
            f"{path} has an empty line, a name twice or more than {MOST_CLASSES}: write one name a "
            "line, that of class 0 first"
        )
    return names


def _pairs(directory: Path, found: _Found, prefix: str, number: int) -> list[Entry]:
    """The images below a directory that have a mask, with names that begin with a prefix."""
    survey, entries, places = found.survey, [], {}
    for name, path in _named(directory / MASKS, survey):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".png":
            places[stem] = path
        else:
            survey.pass_over(os.path.basename(path))
    for name, path in _named(directory / IMAGES, survey):
        full, stem = prefix + name, os.path.splitext(name)[0]
        if (size := _size(path, full, survey)) is None:
            places.pop(stem, None)
        elif (mask := places.pop(stem, None)) is None:
            found.lonely.append(f"{prefix}{IMAGES}/{name}")
        else:
            found.masks[full] = mask
            entries.append(Entry(full, path, (), size))
    found.left_over += [f"{prefix}{MASKS}/{stem}.png" for stem in places]
    _read_masks(entries, found, number)
    return entries


def _named(directory: Path, survey: Survey) -> Iterator[tuple[str, str]]:
    """The files below a directory, with their names in it, in the order of these."""
    if not directory.is_dir():
        survey.others.append(f"{directory} does not exist: {MASKS}/ goes beside {IMAGES}/")
        return
    for path in sorted(files_below(str(directory), survey)):
        yield path.removeprefix(f"{directory}/"), path


def _size(path: str, name: str, survey: Survey) -> int | None:
    """The size of an image in bytes, None of a file that is none."""
    try:
        size, fault = measure(path, survey.channels), ""
    except OSError as error:
        size, fault = None, f"{path} cannot be read ({error.strerror}): mend or remove it"
    if size is None:
        if os.path.splitext(path)[1].lower() in survey.suffixes:
            survey.broken[name] = Broken(fault or no_image(path, survey.channels), "")
        else:
            survey.pass_over(os.path.basename(path))
    return size


def _read_masks(entries: list[Entry], found: _Found, number: int) -> None:
    def check(entry: Entry) -> tuple[int, str]:
        path = found.masks[entry.name]
        try:
            mask = read_mask(path)
            check_indices(path, mask, number)
            _check_size(entry.path, path, mask)
            counted = np.unique(mask)
            return max(counted[counted != IGNORED].tolist(), default=-1), ""
        except UserError as error:
            return -1, str(error)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for entry, (largest, fault) in zip(entries, threads.map(check, entries), strict=True):
            found.largest = max(found.largest, largest)
            if fault:
                found.faults[entry.name] = fault


def _check_size(path: str, mask_path: str, mask: np.ndarray) -> None:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = upright_size(image)
    except Exception:  # An array, or damage: of both is told where the image is read.
        return
    if mask.shape != (height, width):
        raise UserError(
            f"{mask_path} has {mask.shape[1]} x {mask.shape[0]} pixels, and its image {width} x "
            f"{height}: save it in the size of the image"
        )


def _tell(found: _Found) -> None:
    """Adds what is wrong with masks to the survey."""
    others = found.survey.others
    if found.lonely:
        has = "1 image has" if len(found.lonely) == 1 else f"{len(found.lonely):,} images have"
        others.append(
            f"{has} no mask ({listed(found.lonely)}): add a PNG of the same name below {MASKS}/"
        )
    if found.left_over:
        has = "1 mask has" if len(found.left_over) == 1 else f"{len(found.left_over):,} masks have"
        others.append(f"{has} no image ({listed(found.left_over)}): remove what is left over")
    others += list(found.faults.values())[:10]
    if len(found.faults) > 10:
        others.append(f"{len(found.faults) - 10:,} more masks have such faults")
    if found.largest < 0 and not others and not found.survey.broken:
        others.append(f"{found.survey.what} has no mask with a class in it: add images and masks")
