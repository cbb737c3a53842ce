"""A folder of images as a data set: one directory per class, in train/ and test/ or directly."""

import os
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from vit_jax.data import classes
from vit_jax.data.headers import check_format, measure, no_image
from vit_jax.data.images import SUFFIXES
from vit_jax.data.labeled_files import (
    Entry,
    File,
    FileRules,
    LabeledFiles,
    divide,
    in_hashed_order,
    without_cut_off,
)
from vit_jax.data.survey import Broken, Survey, listed
from vit_jax.errors import UserError, first_line

PREFIX = "folder:"
SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
}
# What a folder for segmentation has in place of classes, see `mask_folder`.
IMAGES, MASKS = "images", "masks"
_NOT_OF_A_USER = "__MACOSX"  # What a Mac puts into an archive beside what it packs.
_DEFAULTS = FileRules()


def open_folder(path: str, rules: FileRules = _DEFAULTS) -> LabeledFiles:
    """Lists the images below `path`, and reads the first bytes of each.

    Of those to evaluate on the last bytes are read too, see `headers.check_end`.

    Classes are the directories of train/, or where there is none of all splits together: numbers
    in the order of their values, other names as text. A folder without any of the splits' own
    directories has those of the classes itself, and is divided, see `labeled_files.divide`. All
    images below a class are its own, however deep. A file that begins like an image is one,
    whatever it is called; another is broken if it has the suffix of one, and else passed over. A
    class may be a link to a directory, but not to one in which it lies itself.

    Args:
        path: of the folder.
        rules: for what is not as it should be.

    Raises:
        UserError: all that is wrong with the folder, in one line.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"folder {path!r} does not exist: name one with a directory per class in it, or with "
            "train/, and test/ or validation/"
        )
    survey = Survey(f"folder {path!r}", rules.broken == "skip", rules.skip_flag, rules.channels)
    found, partition = find_splits(path), None
    _refuse_masks(path, found or ("",))
    if found:
        _look_beside(root, found, survey)
        class_names, entries = _of_splits(root, found, survey)
    else:
        images = [x for part in _scan(root, survey).values() for x in part]
        entries, partition = divide(images, rules, survey)
        class_names = classes.in_order({x.labels[0] for part in entries.values() for x in part})
    if class_names and len(class_names) < rules.least_classes:
        survey.others.append(
            f"folder {path!r} has one class alone, {class_names[0]!r}, so there is nothing to tell "
            "apart: add a directory for another"
        )
    survey.check()
    return LabeledFiles(
        survey.what,
        PREFIX + path,
        str(root),
        class_names,
        {name: in_hashed_order(part, class_names) for name, part in entries.items()},
        partition=partition,
        notes=survey.notes(),
    )


def find_splits(path: str) -> dict[str, str]:
    """The splits that a folder has directories of, by the names of these.

    Raises:
        UserError: there are two of one split.
    """
    root = Path(path).expanduser()
    found = {directory: name for directory, name in SPLITS.items() if (root / directory).is_dir()}
    for name in found.values():
        same = [f"{directory}/" for directory, other in found.items() if other == name]
        if len(same) > 1:
            raise UserError(f"folder {path!r} has both {' and '.join(same)}: keep one of them")
    return found


def _refuse_masks(path: str, directories: Collection[str]) -> None:
    """Refuses a folder for segmentation: images and their masks would be learned as two classes.

    Args:
        path: of the folder.
        directories: those in it that would have the classes.
    """
    for directory in directories:
        both = [os.path.join(directory, name, "") for name in (IMAGES, MASKS)]
        if all(os.path.isdir(os.path.join(os.path.expanduser(path), name)) for name in both):
            config = shlex.quote(f"segmentation:ViT-S/16,{PREFIX}{path}")
            raise UserError(
                f"folder {path!r} has {' and '.join(both)}, which look like images and their masks "
                f"and not like classes: to learn masks give --config {config} "
                "--config.init_from=WEIGHTS; if they are classes, rename one of them"
            )


def _look_beside(root: Path, found: Collection[str], survey: Survey) -> None:
    """Tells of images beside the splits: those of classes, one of which is called like a split."""
    beside = [
        f"{entry.name}/"
        for entry in _listed(str(root))
        if entry.name not in found and _is_directory(entry) and _has_images(entry.path)
    ]
    if not beside:
        return
    splits = [f"{name}/" for name in found]
    mistaken = [x for x in splits if not any(map(_is_directory, _listed(str(root / x))))]
    if mistaken:
        survey.others.append(
            f"{listed(mistaken, 4)} would be a split and has no classes in it, and beside it are "
            f"{listed(beside, 4)}: if it is a class, rename it or move all classes into train/; "
            "if it is a split, make one directory per class in it"
        )
    else:
        survey.remarks.append(
            f"passed over are the images of {listed(beside, 4)}, beside {listed(splits)}"
        )


def _has_images(directory: str) -> bool:
    try:
        paths = files_below(directory, Survey(directory))
        return any(os.path.splitext(path)[1].lower() in SUFFIXES for path in paths)
    except UserError:  # It may not be read, nor need it be.
        return False


def _of_splits(
    root: Path, found: dict[str, str], survey: Survey
) -> tuple[tuple[str, ...], dict[str, list[Entry]]]:
    """The class names, and the images of each split."""
    scans = {
        name: _scan(root / directory, survey, f"{directory}/") for directory, name in found.items()
    }
    sources = ["train"] if "train" in found else found.values()
    class_names = classes.in_order({x for name in sources for x in scans[name]})
    entries = {}
    for directory, name in found.items():
        known = {x: images for x, images in scans[name].items() if x in class_names}
        unknown = scans[name].keys() - known.keys()
        survey.unknown += [f"{x!r} of {root / directory}" for x in sorted(unknown)]
        images = [x for part in known.values() for x in part]
        if name != "train":
            images = without_cut_off(images, survey, f"{directory}/")
        entries[name] = images
    return class_names, entries


def _scan(directory: Path, survey: Survey, prefix: str = "") -> dict[str, list[Entry]]:
    """The images below a directory by class; what is found beside them goes to the survey.

    Args:
        directory: has one directory per class.
        survey: of the data set.
        prefix: of the names of files in it.
    """
    found = {}
    for entry in _listed(str(directory)):
        if not _is_directory(entry):
            survey.pass_over(entry.name)
            continue
        if _leads_back(entry):
            survey.links += 1
            continue
        images, broken = [], len(survey.broken)
        found[entry.name] = images
        for path in files_below(entry.path, survey):
            name = path.removeprefix(f"{directory}/")
            if (size := _size(path, prefix + name, entry.name, survey)) is not None:
                images.append(Entry(name, path, (entry.name,), size))
        if not images and (survey.skip or len(survey.broken) == broken):
            survey.empty.append(entry.path)
    if not found:
        survey.others.append(f"{directory} holds no classes: make one directory per class in it")
    return found


def _size(path: str, name: str, class_name: str, survey: Survey) -> int | None:
    """The size of an image in bytes, None for a file that is none."""
    try:
        size, fault = measure(path, survey.channels), ""
    except OSError as error:
        size, fault = None, f"{path} cannot be read ({error.strerror}): mend or remove it"
    if size is None:
        if os.path.splitext(path)[1].lower() in survey.suffixes:
            survey.broken[name] = Broken(fault or no_image(path, survey.channels), class_name)
        else:
            survey.pass_over(path.rpartition("/")[2])
    return size


def files_below(directory: str, survey: Survey) -> Iterator[str]:
    """The paths of all files that are not hidden, in no order; links to directories are counted.

    A loop of links would have no end.

    Args:
        directory: below which they lie.
        survey: counts the links.
    """
    directories = [directory]
    while directories:
        for entry in _listed(directories.pop()):
            if not _is_directory(entry):
                yield entry.path
            elif entry.is_symlink():
                survey.links += 1
            else:
                directories.append(entry.path)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _leads_back(entry: os.DirEntry[str]) -> bool:
    """Tells whether it is a link to a directory that it lies in: all classes would be in it."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    lies_in = os.path.realpath(os.path.dirname(entry.path))
    return os.path.commonpath([target, lies_in]) == target


def _listed(directory: str) -> list[os.DirEntry[str]]:
    """The entries of a directory that are not hidden, by name."""
    try:
        with os.scandir(directory) as entries:
            found = [x for x in entries if not x.name.startswith(".") and x.name != _NOT_OF_A_USER]
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"directory {directory} cannot be read: {reason}") from error
    return sorted(found, key=lambda entry: entry.name)


def visible(directory: Path) -> list[Path]:
    """Lists what is in a directory and not hidden, by name."""
    return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))


def check_image(path: Path, label: int) -> File:
    """The file of an image, recognized by its first bytes.

    Raises:
        UserError: it is not one.
    """
    return File(str(path), label, check_format(path))
