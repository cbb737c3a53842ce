"""Data sets by name, and the splits that they are trained and evaluated on by default."""

import os
from typing import NamedTuple, Protocol

from vit_jax.data import digits, folder, vtab
from vit_jax.data.source import Source, check_splits, relabel
from vit_jax.data.tfds_datasets import RealDataset, TfdsDataset, VtabDataset
from vit_jax.errors import UserError, first_line

__all__ = ["Source", "default_splits", "open_dataset", "open_evaluation", "open_real", "relabel"]


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
REAL = "imagenet2012_real"


def open_dataset(
    name: str,
    *,
    data_dir: str = "",
    train_split: str = "",
    eval_split: str = "",
    development: bool = False,
) -> tuple[Source, Source]:
    """Returns the sources to train and to evaluate on.

    Args:
        name: a TFDS name ("cifar10", "name/config:1.2.*"), registered or only prepared in
            `data_dir`; "digits"; "folder:PATH" (see `folder`); or "vtab:TASK" (see `vtab`).
        data_dir: where TFDS looks; "" is its default.
        train_split: in TFDS syntax; "" is the default of the data set.
        eval_split: likewise; for a data set the paper does not use, validation or else test.
        development: evaluate on the last part of the training split and train on the rest
            (paper, Appendix B.1.1: 10% of Pets and Flowers, 2% of CIFAR, 1% of ImageNet, the 200
            validation images of a VTAB task).

    Raises:
        UserError: if the data set is unknown, not prepared or not one of labeled images, or if a
            split does not exist or is empty.
    """
    check_splits(train_split=train_split, eval_split=eval_split, development=development)
    dataset = _open(name, data_dir)
    default_train, default_eval = _default_splits(dataset, name, development)
    train = _open_split(dataset, name, train_split or default_train)
    eval_split = eval_split or default_eval or _infer_eval_split(dataset, name)
    return train, _open_split(dataset, name, eval_split)


def name_of(path: str) -> str:
    """The name of the data set that a folder of images is.

    Raises:
        UserError: there is no such folder.
    """
    if not os.path.isdir(path):
        raise UserError(f"{path} is no folder: give one that has images in folders of classes")
    return folder.PREFIX + path


def open_evaluation(name: str, *, data_dir: str = "", split: str = "") -> Source:
    """Returns the source to evaluate on alone: the data set need not have any other split.

    Args:
        name: as in `open_dataset`.
        data_dir: likewise.
        split: `eval_split` of `open_dataset`.

    Raises:
        UserError: as `open_dataset` does.
    """
    dataset = _open(name, data_dir)
    _, default_eval = _default_splits(dataset, name)
    split = split or default_eval or _infer_eval_split(dataset, name)
    return _open_split(dataset, name, split)


def open_real(*, data_dir: str = "", split: str = "validation") -> Source:
    """Returns ImageNet's validation images with the labels of ReaL (Beyer et al., 2020).

    A label is int64 [1000]: 1 for every class that the image shows, nothing but 0 for an image
    that was found to show none.

    Raises:
        UserError: `imagenet2012_real` is not prepared, or the split does not exist.
    """
    return _open_split(RealDataset(REAL, data_dir), REAL, split)


class _Dataset(Protocol):
    @property
    def split_names(self) -> tuple[str, ...]: ...

    def source(self, split: str) -> Source: ...


def _open(name: str, data_dir: str) -> _Dataset:
    if name.startswith(folder.PREFIX):
        return folder.open_folder(name.removeprefix(folder.PREFIX))
    if name == digits.NAME:
        return digits.DigitsDataset()
    return (VtabDataset if vtab.is_vtab(name) else TfdsDataset)(name, data_dir)


def _default_splits(dataset: _Dataset, name: str, development: bool = False) -> tuple[str, str]:
    if isinstance(dataset, VtabDataset):
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
