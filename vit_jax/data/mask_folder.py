"""A folder of images and masks as a data set, for semantic segmentation.

`images/` and `masks/` lie in the folder itself, which is divided then, or in each of its splits:

    photos/classes.txt            a name a line, that of class 0 first; it may be left out
    photos/train/images/a/1.jpg   photos/train/masks/a/1.png
    photos/test/images/...        photos/test/masks/...

A mask is a PNG of the indices of classes, see `masks.open_mask`, of the size of its image, at the
same place but for the suffix.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vit_jax.data.folder import IMAGES, MASKS, PREFIX, files_below, find_splits
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
from vit_jax.data.masks import check_largest, indices_of, open_mask
from vit_jax.data.survey import Broken, Survey, listed
from vit_jax.errors import UserError, first_line
from vit_jax.pixel_classes import IGNORED, MOST_CLASSES, numbered

NAMES = "classes.txt"
_DEFAULTS = FileRules()
_NAMED = 10  # masks with a fault in a message; the rest are counted


@dataclasses.dataclass
class _Found:
    """The files below images/ and masks/ of all splits.

    Attributes:
        survey: of the data set.
        masks: the path of the mask of each image, by the name of the image.
        indices: likewise, of the masks that were read, see `masks.indices_of`.
        lonely: the paths of images without a mask, by their names.
        faults: of masks, a sentence each, by the names of their images.
        left_over: masks without an image.
    """

    survey: Survey
    masks: dict[str, str] = dataclasses.field(default_factory=dict)
    indices: dict[str, bytes] = dataclasses.field(default_factory=dict)
    lonely: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    left_over: list[str] = dataclasses.field(default_factory=list)


def open_mask_folder(
    path: str,
    rules: FileRules = _DEFAULTS,
    num_classes: int = 0,
    wanted: Sequence[str] = (),
) -> LabeledFiles:
    """Lists the images of a folder and reads their masks, in as many threads as cores.

    Args:
        path: of the folder.
        rules: as in `folder.open_folder`, but there are always two classes or more. To skip what is
            broken leaves images out, too, whose masks are missing, damaged or of another size.
        num_classes: of the masks where the folder has no classes.txt; 0 takes what is in them.
        wanted: the splits that will be asked for, in TFDS syntax, "" for that of evaluation. Of
            others no mask is read, unless the classes are to be found in them; of none all are.

    Raises:
        UserError: all that is wrong with the folder, in one line.
    """
    root = Path(path).expanduser()
    survey = Survey(f"folder {path!r}", rules.broken == "skip", rules.skip_flag, rules.channels)
    named = _class_names(root)
    number, found, partition = len(named) or num_classes, _Found(survey), None
    directories = find_splits(path)
    with_images = [x for x in directories if (root / x / IMAGES).is_dir()]
    if (root / IMAGES).is_dir():
        if with_images:
            survey.others.append(
                f"folder {path!r} has {IMAGES}/ of its own beside {with_images[0]}/{IMAGES}/: keep "
                "either"
            )
        whole = _pairs(root, found, "", is_read=True)
        entries, partition = divide(whole, rules, survey)
    elif with_images:
        are_read = _wanted(directories, wanted) if number else directories.keys()
        entries = {
            name: _of_split(root / directory, found, name, is_read=directory in are_read)
            for directory, name in directories.items()
        }
    else:
        raise UserError(
            f"folder {path!r} has no {IMAGES}/ and {MASKS}/, nor train/{IMAGES}/ and "
            f"train/{MASKS}/: these are what objective segmentation trains on"
        )
    _tell(found)
    class_names = _check_classes(found, entries, named or numbered(num_classes))
    survey.check()
    return LabeledFiles(
        survey.what,
        PREFIX + path,
        str(root),
        class_names,
        {name: _files(part, found.masks) for name, part in entries.items()},
        has_masks=True,
        partition=partition,
        notes=survey.notes(),
    )


def _wanted(directories: Mapping[str, str], wanted: Sequence[str]) -> Collection[str]:
    """The directories of the splits that are wanted, see `open_mask_folder`."""
    # As `datasets` chooses what to evaluate on.
    default = next((x for x in ("validation", "test") if x in directories.values()), "")
    text = "+".join(x or default for x in wanted)
    return [
        directory
        for directory, name in directories.items()
        if not wanted or re.search(rf"\b({name}|all)\b", text)
    ]


def _of_split(directory: Path, found: _Found, name: str, *, is_read: bool) -> list[Entry]:
    entries = _pairs(directory, found, f"{directory.name}/", is_read=is_read)
    return entries if name == "train" else without_cut_off(entries, found.survey)


def _files(entries: list[Entry], masks: Mapping[str, str]) -> tuple[File, ...]:
    return tuple(File(x.path, masks[x.name], x.num_bytes) for x in sorted(entries, key=hashed))


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / NAMES
    try:
        if not path.exists():
            return ()
        if not path.is_file():  # A named pipe would be waited for, forever.
            raise UserError(f"{path} is not a file: make it one of a name a line, or remove it")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({first_line(error)}): mend it") from error
    names = tuple(line.strip() for line in lines)
    if not names:
        raise UserError(f"{path} is empty: write one name a line, or remove it")
    if "" in names or len({*names}) < len(names) or len(names) > MOST_CLASSES:
        raise UserError(
            f"{path} has an empty line, a name twice or more than {MOST_CLASSES}: write one name a "
            "line, that of class 0 first"
        )
    return names


def _pairs(directory: Path, found: _Found, prefix: str, *, is_read: bool) -> list[Entry]:
    """The images below a directory that have a mask, with names that begin with a prefix.

    Where masks are read, these are sound. What is left out is counted as broken.
    """
    survey, entries, places = found.survey, [], {}
    for name, path in _named(directory / MASKS, survey):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() != ".png":
            survey.pass_over(os.path.basename(path))
        elif stem in places:
            survey.others.append(f"{path} is beside {places[stem]}, of the same image: keep one")
        else:
            places[stem] = path
    for name, path in _named(directory / IMAGES, survey):
        full = prefix + name
        size = _size(path, full, survey)
        if size is None and full not in survey.broken:
            continue
        mask = places.pop(os.path.splitext(name)[0], None)
        if size is not None and mask is not None:
            found.masks[full] = mask
            entries.append(Entry(full, path, (), size))
        elif size is not None:
            found.lonely[full] = prefix + path.removeprefix(f"{directory}/")
            survey.broken[full] = Broken(f"{path} has no mask: add it below {MASKS}/", "")
    found.left_over += [prefix + path.removeprefix(f"{directory}/") for path in places.values()]
    return _with_masks(entries, found) if is_read else entries


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


def _with_masks(entries: list[Entry], found: _Found) -> list[Entry]:
    """The images whose masks can be read, and these looked into; others are broken."""

    def read(entry: Entry) -> tuple[bytes, str] | UserError:
        try:
            with open_mask(found.masks[entry.name], size=upright_sides(entry.path)) as mask:
                digest = hashlib.blake2b(np.ascontiguousarray(mask), digest_size=8)
                return indices_of(mask), digest.hexdigest()
        except UserError as error:
            return error

    sound = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for entry, mask in zip(entries, threads.map(read, entries), strict=True):
            if isinstance(mask, UserError):
                found.faults[entry.name] = str(mask)
                found.survey.broken[entry.name] = Broken(str(mask), "")
            else:
                found.indices[entry.name], digest = mask
                sound.append(entry._replace(mask=digest))
    return sound


def _tell(found: _Found) -> None:
    """Adds what is wrong with masks to the survey, unless what is broken is skipped.

    Of a run that goes on only those count that are still broken: it began without the others.
    """
    survey, others = found.survey, found.survey.others
    if not survey.skip:
        lonely = [path for name, path in found.lonely.items() if survey.broken.pop(name, None)]
        faults = [fault for name, fault in found.faults.items() if survey.broken.pop(name, None)]
        if lonely:
            has = "1 image has" if len(lonely) == 1 else f"{len(lonely):,} images have"
            others.append(
                f"{has} no mask ({listed(lonely)}): add a PNG of the same name below {MASKS}/"
            )
        _name_some(faults, survey)
    if found.left_over:
        has = "1 mask has" if len(found.left_over) == 1 else f"{len(found.left_over):,} masks have"
        others.append(f"{has} no image ({listed(found.left_over)}): remove what is left over")


def _name_some(faults: Sequence[str], survey: Survey) -> None:
    survey.others += faults[:_NAMED]
    if len(faults) > _NAMED:
        survey.others.append(f"{len(faults) - _NAMED:,} more masks have such faults")


def _check_classes(
    found: _Found, entries: Mapping[str, Sequence[Entry]], known: tuple[str, ...]
) -> tuple[str, ...]:
    """The names of the classes, found in the masks where they are not known; faults are told."""
    survey, there, faults = found.survey, set(), []
    for entry in (x for part in entries.values() for x in part):
        indices = found.indices.get(entry.name, b"")
        there.update(indices)
        try:
            check_largest(
                found.masks[entry.name], max(indices, default=-1), len(known) or MOST_CLASSES
            )
        except UserError as error:
            faults.append(str(error))
    _name_some(faults, survey)
    names = known or numbered(max(there, default=-1) + 1)
    if survey.others or survey.broken and not survey.skip:
        return names
    if not there and (found.indices or not any(entries.values())):
        survey.others.append(f"{survey.what} has no mask with a class in it: add images and masks")
    elif len(names) == 1:
        survey.others.append(
            f"{survey.what} has one class alone, {names[0]!r}, so there is nothing to tell apart: "
            f"give other pixels another index, but {IGNORED}, which counts for nothing"
        )
    elif not known and len(there) < len(names):
        missing = [name for index, name in enumerate(names) if index not in there]
        survey.remarks.append(
            f"no pixel of a mask has {len(missing):,} of the {len(names):,} indices up to the "
            f"largest ({listed(missing)}): each is a class all the same"
        )
    return names
