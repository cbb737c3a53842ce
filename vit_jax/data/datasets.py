"""Data sets by name, and the splits that they are trained and evaluated on by default."""

import dataclasses
import os
import re
from typing import NamedTuple, Protocol

from vit_jax.data import coco_folder, digits, folder, listing, mask_folder, vtab
from vit_jax.data.labeled_files import FileRules, LabeledFiles
from vit_jax.data.source import Source, check_splits, relabel
from vit_jax.errors import UserError, brief, first_line

__all__ = [
    "FileRules",
    "Source",
    "default_splits",
    "is_known",
    "is_of_files",
    "is_same",
    "name_of",
    "open_dataset",
    "open_evaluation",
    "open_real",
    "relabel",
]


class _Splits(NamedTuple):
    train: str
    evaluation: str
    development: int  # percent of train that Table 4's learning rates are chosen on


_SPLITS = {
    "imagenet2012": _Splits("train", "validation", 1),
    "cifar10": _Splits("train", "test", 2),
    "cifar100": _Splits("train", "test", 2),
    "oxford_iiit_pet": _Splits("train", "test", 10),
    # The official train split has 1,020 images. Kornblith et al. (2019), and BiT and the paper
    # after them, train on the 2,040 of train and validation together.
    "oxford_flowers102": _Splits("train+validation", "test", 10),
}
_OTHER_SPLITS = _Splits("train", "", 10)
_AS_THEY_ARE = FileRules()
REAL = "imagenet2012_real"


def name_of(path: str) -> str:
    """The name of the data set at a path: "folder:PATH" or "list:PATH".

    Raises:
        UserError: there is neither a folder nor a list.
    """
    if os.path.isdir(os.path.expanduser(path)):
        return folder.PREFIX + (path.rstrip("/") or "/")
    if path.lower().endswith(listing.SUFFIXES) and os.path.isfile(os.path.expanduser(path)):
        return listing.PREFIX + path
    raise UserError(
        f"{path!r} is no data set: give a folder with a directory of images for each class, or a "
        "list of images and labels that ends in .csv or .jsonl"
    )


def is_known(name: str) -> bool:
    """Tells whether a name is that of a data set here, whatever lies at a path of that name."""
    kind = name.startswith((folder.PREFIX, listing.PREFIX)) or vtab.is_vtab(name)
    return kind or name == digits.NAME or (name.split(":")[0].split("/")[0] in _SPLITS)


def name_or_path(text: str) -> str:
    """The name of the data set that a user has named, or at the path that a user has given.

    That of a folder that is called like a data set begins with "./".

    Raises:
        UserError: as `name_of` does.
    """
    is_path = not is_known(text) and os.path.exists(os.path.expanduser(text))
    return name_of(text) if is_path else text


def is_of_files(name: str) -> bool:
    """Tells whether a data set is a folder or list of image files, whose `FileRules` count."""
    return name.startswith((folder.PREFIX, listing.PREFIX))


def is_same(name: str, other: str) -> bool:
    """Tells whether two names are of one data set: a path may be written in several ways."""
    return name == other or (is_of_files(name) and _resolved(name) == _resolved(other))


def _resolved(name: str) -> tuple[str, str]:
    kind, _, path = name.partition(":")
    return kind, os.path.realpath(os.path.expanduser(path))


def open_dataset(
    name: str,
    *,
    data_dir: str = "",
    train_split: str = "",
    eval_split: str = "",
    development: bool = False,
    files: FileRules = _AS_THEY_ARE,
    mask_classes: int | None = None,
    has_boxes: bool = False,
) -> tuple[Source, Source]:
    """Returns the sources to train and to evaluate on.

    Args:
        name: a TFDS name ("cifar10", "name/config:1.2.*"), registered or only prepared in
            `data_dir`; "digits"; "folder:PATH" (see `folder`); "list:PATH" (see `listing`); or
            "vtab:TASK" (see `vtab`).
        data_dir: where TFDS looks; "" is its default.
        train_split: in TFDS syntax; "" is the default of the data set.
        eval_split: likewise; for a data set the paper does not use, validation or else test.
        development: evaluate on the last part of the training split and train on the rest
            (paper, Appendix B.1.1: 10% of Pets and Flowers, 2% of CIFAR, 1% of ImageNet, the 200
            validation images of a VTAB task).
        files: what is done with those of a folder or list.
        mask_classes: the number of classes that masks have, 0 where the data set tells it: then
            an image's label is its mask, in a folder as `mask_folder` says. None for labels.
        has_boxes: whether an image's label are the boxes of its objects, in a folder as
            `coco_folder` says.

    Raises:
        UserError: if the data set is unknown, not prepared or not one of labeled images, or if a
            split does not exist or is empty, or images that are held out would be trained on.
    """
    check_splits(train_split=train_split, eval_split=eval_split, development=development)
    usual = default_splits(name, development=development)
    wanted = (train_split or usual[0], eval_split or usual[1])
    dataset = _open(name, data_dir, files, mask_classes, has_boxes, wanted)
    default_train, default_eval = _default_splits(dataset, name, development)
    divided = _divided(dataset)
    if divided and re.search(r"\bvalidation\b", train_split):
        raise UserError(
            f"train_split is {brief(train_split)} but {divided.what} has no splits, and validation "
            "is what is held out to evaluate on: leave it out of train_split, or hold out less by "
            "dataset.holdout"
        )
    train = _open_split(dataset, name, train_split or default_train)
    if divided:
        sizes = [f"{len(divided.splits[split]):,}" for split in ("train", "validation")]
        note = f"it has no splits, so {sizes[0]} images are to train on and {sizes[1]} are held out"
        train = _with_note(train, divided, note)
    eval_split = eval_split or default_eval or _infer_eval_split(dataset, name)
    return train, _open_split(dataset, name, eval_split)


def open_evaluation(
    name: str,
    *,
    data_dir: str = "",
    split: str = "",
    files: FileRules = _AS_THEY_ARE,
    mask_classes: int | None = None,
    has_boxes: bool = False,
) -> Source:
    """Returns the source to evaluate on alone: the data set need not have any other split.

    Args:
        name: as in `open_dataset`. A folder or list without splits is taken as a whole, unless
            `files.partition` is of it: then what that holds out is.
        data_dir: likewise.
        split: `eval_split` of `open_dataset`.
        files: as in `open_dataset`.
        mask_classes: likewise.
        has_boxes: likewise.

    Raises:
        UserError: as `open_dataset` does.
    """
    wanted = split or default_splits(name, development=False)[1]
    dataset = _open(name, data_dir, files, mask_classes, has_boxes, (wanted,))
    if not split and (divided := _divided(dataset)):
        followed = divided.partition is files.partition
        source = _open_split(dataset, name, "validation" if followed else "train+validation")
        which = (
            "the images that the run held out" if followed else "it has no splits, so all images"
        )
        return _with_note(source, divided, f"{which} are scored, {source.num_examples:,}")
    _, default_eval = _default_splits(dataset, name)
    split = split or default_eval or _infer_eval_split(dataset, name)
    return _open_split(dataset, name, split)


def _divided(dataset: "_Dataset") -> LabeledFiles | None:
    """The data set if it has no splits of its own."""
    is_divided = isinstance(dataset, LabeledFiles) and dataset.partition is not None
    return dataset if is_divided else None


def _with_note(source: Source, dataset: LabeledFiles, note: str) -> Source:
    return dataclasses.replace(source, notes=(f"{dataset.what}: {note}", *source.notes))


def open_real(*, data_dir: str = "", split: str = "validation") -> Source:
    """Returns ImageNet's validation images with the labels of ReaL (Beyer et al., 2020).

    A label is int64 [1000]: 1 for every class that the image shows, nothing but 0 for an image
    that was found to show none.

    Raises:
        UserError: `imagenet2012_real` is not prepared, or the split does not exist.
    """
    from vit_jax.data.tfds_datasets import RealDataset

    return _open_split(RealDataset(REAL, data_dir), REAL, split)


class _Dataset(Protocol):
    @property
    def split_names(self) -> tuple[str, ...]: ...

    def source(self, split: str) -> Source: ...


def _open(
    name: str,
    data_dir: str,
    files: FileRules,
    mask_classes: int | None,
    has_boxes: bool,
    wanted: tuple[str, ...],
) -> _Dataset:
    """Opens a data set, of one of masks the splits that are wanted, see `mask_folder`."""
    if has_boxes:
        return _open_boxes(name, data_dir, files)
    if mask_classes is not None:
        return _open_masks(name, data_dir, files, mask_classes, wanted)
    if name.startswith(folder.PREFIX):
        return folder.open_folder(name.removeprefix(folder.PREFIX), files)
    if name.startswith(listing.PREFIX):
        return listing.open_list(name.removeprefix(listing.PREFIX), files)
    if name == digits.NAME:
        return digits.DigitsDataset()
    from vit_jax.data.tfds_datasets import TfdsDataset, VtabDataset  # They import TFDS.

    return (VtabDataset if vtab.is_vtab(name) else TfdsDataset)(name, data_dir)


def _open_masks(
    name: str, data_dir: str, files: FileRules, mask_classes: int, wanted: tuple[str, ...]
) -> _Dataset:
    if name.startswith(folder.PREFIX):
        path = name.removeprefix(folder.PREFIX)
        return mask_folder.open_mask_folder(path, files, mask_classes, wanted)
    if name.startswith(listing.PREFIX) or name == digits.NAME or vtab.is_vtab(name):
        raise UserError(
            f"data set {brief(name)} has labels of images, and no masks: give folder:PATH with "
            "images/ and masks/ in it, or a data set of TFDS with a segmentation_mask"
        )
    from vit_jax.data.tfds_datasets import MaskDataset

    return MaskDataset(name, data_dir, mask_classes)


def _open_boxes(name: str, data_dir: str, files: FileRules) -> _Dataset:
    if name.startswith(folder.PREFIX):
        return coco_folder.open_coco_folder(name.removeprefix(folder.PREFIX), files)
    if name.startswith(listing.PREFIX) or name == digits.NAME or vtab.is_vtab(name):
        raise UserError(
            f"data set {brief(name)} has labels of images, and no boxes: give folder:PATH with "
            "annotations/instances_*.json in it, or a data set of TFDS with objects and their bbox"
        )
    from vit_jax.data.tfds_datasets import BoxDataset

    return BoxDataset(name, data_dir)


def _default_splits(dataset: _Dataset, name: str, development: bool = False) -> tuple[str, str]:
    if vtab.is_vtab(name):
        from vit_jax.data.tfds_datasets import VtabDataset

        assert isinstance(dataset, VtabDataset)
        return dataset.splits(development)
    return default_splits(name, development=development)


def default_splits(name: str, *, development: bool) -> tuple[str, str]:
    """The splits of a data set of TFDS to train and to evaluate on, see `open_dataset`.

    The latter is "" where the data set itself tells.
    """
    default = _SPLITS.get(name.split(":")[0].split("/")[0], _OTHER_SPLITS)
    if not development:
        return default.train, default.evaluation
    kept = 100 - default.development
    return _slice_each(default.train, f"[:{kept}%]"), _slice_each(default.train, f"[{kept}%:]")


def _slice_each(split: str, bounds: str) -> str:
    return "+".join(part + bounds for part in split.split("+"))


def _infer_eval_split(dataset: _Dataset, name: str) -> str:
    for split in ("validation", "test"):
        if split in dataset.split_names:
            return split
    raise UserError(
        f"data set {name!r} has neither validation nor test, only {', '.join(dataset.split_names)}"
        ": name one or a slice of one in eval_split, such as eval_split='train[90%:]'"
    )


def _open_split(dataset: _Dataset, name: str, split: str) -> Source:
    try:
        return dataset.source(split)
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"split {split!r} of data set {name!r} cannot be read: {first_line(error)} "
            f"(its splits: {', '.join(dataset.split_names)})"
        ) from error
