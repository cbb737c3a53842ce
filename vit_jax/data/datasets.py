"""Data sets by name: their splits, class names and encoded records."""

import dataclasses
import difflib
import functools
import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.data import folder, labels, vtab
from vit_jax.data.digits import prepare_digits
from vit_jax.errors import UserError, first_line

# TensorFlow only reads images here; it would otherwise take the accelerator's memory from JAX.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
        name: of the data set, as it was asked for.
        split: in TFDS syntax, such as "train[:98%]".
        class_names: by label.
        num_examples: in the split.
        num_bytes: of all encoded images, about; 0 if unknown.
        records: `records(seed=None)` reads the split once as {"image": scalar string, encoded;
            "label": int64, of `open_real` int64 [classes]; "id": scalar string, names the record;
            of a folder also "tensorflow_reads": bool, see `headers.tensorflow_reads`}.
            The order is fixed; with an int64 scalar `seed`, which may be a tensor, it is another
            one (TFDS: of whole files) and a pure function of the seed.
        border: pixels of every side of an image that evaluation cuts off.
        ids: the ids of all records, without reading any; None if only reading tells.
        select: `select(chosen)`, of a bool for each of `ids`, returns `records` of the chosen ones
            that does not read the others; None if no record can be had without those before it.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    num_examples: int
    num_bytes: int
    records: Callable[..., tf.data.Dataset] = dataclasses.field(repr=False)
    border: int = 0
    ids: Callable[[], list[str]] | None = dataclasses.field(default=None, repr=False)
    select: Callable[[np.ndarray], Callable] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class _Usual:
    train: str
    evaluation: str
    development: int  # percent of train that Table 4's learning rates are chosen on


_USUAL = {
    "imagenet2012": _Usual("train", "validation", 1),
    "cifar10": _Usual("train", "test", 2),
    "cifar100": _Usual("train", "test", 2),
    "oxford_iiit_pet": _Usual("train", "test", 10),
    # The official train split has 1,020 images. Kornblith et al. (2019), and BiT and the paper
    # after them, train on the 2,040 of train and validation together.
    "oxford_flowers102": _Usual("train+validation", "test", 10),
}
_OTHER = _Usual("train", "", 10)
REAL = "imagenet2012_real"
_DATA_DIR = "config.dataset.data_dir (of evaluate: --data_dir)"
_NO_DATA = "`--config configs/digits.py` needs no data at all"


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
        train_split: in TFDS syntax; "" is the usual one of the data set.
        eval_split: likewise; for a data set the paper does not use, validation or else test.
        development: evaluate on the last part of the training split and train on the rest
            (paper, Appendix B.1.1: 10% of Pets and Flowers, 2% of CIFAR, 1% of ImageNet, the 200
            validation images of a VTAB task).

    Raises:
        UserError: if the data set is unknown, not prepared or not one of labeled images, or if a
            split does not exist or is empty.
    """
    if development and (train_split or eval_split):
        raise UserError(
            f"development=True chooses both splits: drop it or train_split={train_split!r}, "
            f"eval_split={eval_split!r}"
        )
    data_set = _open(name, data_dir)
    usual_train, usual_eval = _usual_splits(data_set, name, development)
    train = _open_split(data_set, name, train_split or usual_train)
    eval_split = eval_split or usual_eval or _infer_eval_split(data_set, name)
    return train, _open_split(data_set, name, eval_split)


def open_evaluation(name: str, *, data_dir: str = "", split: str = "") -> Source:
    """Returns the source to evaluate on alone: the data set need not have any other split.

    Args:
        name: as in `open_dataset`.
        data_dir: likewise.
        split: `eval_split` of `open_dataset`.

    Raises:
        UserError: as `open_dataset` does.
    """
    data_set = _open(name, data_dir)
    _, usual_eval = _usual_splits(data_set, name)
    split = split or usual_eval or _infer_eval_split(data_set, name)
    return _open_split(data_set, name, split)


def open_real(*, data_dir: str = "", split: str = "validation") -> Source:
    """Returns ImageNet's validation images with the labels of ReaL (Beyer et al., 2020).

    A label is int64 [1000]: 1 for every class that the image shows, nothing but 0 for an image
    that was found to show none.

    Raises:
        UserError: `imagenet2012_real` is not prepared, or the split does not exist.
    """
    return _open_split(_RealDataset(REAL, data_dir), REAL, split)


def relabel(source: Source, labels: Sequence[int], class_names: Sequence[str]) -> Source:
    """Returns a source with other labels.

    Args:
        source: whose records have a label, or one for every class as of `open_real`.
        labels: the new one of each class of `source`; of a record without (-1) it stays.
        class_names: by new label.
    """
    table = tf.constant(labels, tf.int64)

    def new_label(label: tf.Tensor) -> tf.Tensor:
        if label.shape.rank:
            return tf.scatter_nd(table[:, None], label, [len(class_names)])
        return tf.where(label < 0, label, tf.gather(table, tf.maximum(label, 0)))

    def relabeled(records: Callable[..., tf.data.Dataset]) -> Callable[..., tf.data.Dataset]:
        return lambda seed=None: records(seed).map(lambda r: r | {"label": new_label(r["label"])})

    select = source.select and (lambda chosen: relabeled(source.select(chosen)))
    return dataclasses.replace(
        source,
        class_names=tuple(class_names),
        records=relabeled(source.records),
        select=select,
    )


def _open(name, data_dir):
    if name.startswith("folder:"):
        return _FolderDataset(name)
    return (_VtabDataset if vtab.is_vtab(name) else _TfdsDataset)(name, data_dir)


def _usual_splits(data_set, name, development=False):
    if vtab.is_vtab(name):
        return data_set.splits(development)
    usual = _USUAL.get(name.split(":")[0].split("/")[0], _OTHER)
    if not development:
        return usual.train, usual.evaluation
    kept = 100 - usual.development
    return _slice_each(usual.train, f"[:{kept}%]"), _slice_each(usual.train, f"[{kept}%:]")


def _slice_each(split, bounds):
    return "+".join(part + bounds for part in split.split("+"))


def _infer_eval_split(data_set, name):
    for split in ("validation", "test"):
        if split in data_set.split_names:
            return split
    raise UserError(
        f"data set {name!r} has neither validation nor test, only {', '.join(data_set.split_names)}"
        ": name one or a slice of one in eval_split, such as eval_split='train[90%:]'"
    )


def _open_split(data_set, name, split):
    try:
        return data_set.source(split)
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"split {split!r} of data set {name!r} cannot be read: {first_line(error)} "
            f"(its splits: {', '.join(data_set.split_names)})"
        ) from error


class _FolderDataset:
    def __init__(self, name):
        self._name = name
        self._folder = folder.open_folder(name.removeprefix("folder:"))

    @property
    def split_names(self):
        return tuple(self._folder.splits)

    def source(self, split):
        files = self._folder.select(split)
        return Source(
            self._name,
            split,
            self._folder.class_names,
            num_examples=len(files),
            num_bytes=sum(file.num_bytes for file in files),
            records=functools.partial(folder.records, files),
            ids=lambda: [file.path for file in files],
            select=lambda chosen: functools.partial(
                folder.records, tuple(itertools.compress(files, chosen))
            ),
        )


class _TfdsDataset:
    _LABEL = "label"

    def __init__(self, name, data_dir):
        self._name = self._tfds_name = name
        self._builder = _builder(name, os.path.expanduser(data_dir))
        features = dict(self._builder.info.features or {})
        if not (
            isinstance(features.get("image"), tfds.features.Image)
            and self._is_label(features.get(self._LABEL))
        ):
            raise UserError(
                f"data set {name!r} is not one of images with one class label each: it needs the "
                f"features image and {self._LABEL}, and has {', '.join(features) or 'none'}"
            )

    @staticmethod
    def _is_label(feature):
        return isinstance(feature, tfds.features.ClassLabel)

    @property
    def _class_names(self):
        return tuple(self._builder.info.features[self._LABEL].names)

    def _records(self, split, seed=None):
        features = {self._LABEL: True}
        return _tfds_records(self._builder, split, features, lambda r: r[self._LABEL], seed)

    @property
    def split_names(self):
        return tuple(self._builder.info.splits)

    def source(self, split):
        try:
            num_examples = int(self._records(split).cardinality())
        except AssertionError as error:
            raise _not_prepared(self._name, self._builder, self._tfds_name) from error
        info = self._builder.info
        total = sum(part.num_examples for part in info.splits.values())
        return Source(
            self._name,
            split,
            self._class_names,
            num_examples,
            num_bytes=info.dataset_size * num_examples // total if total else 0,
            records=functools.partial(self._records, split),
            ids=functools.partial(_tfds_ids, self._builder, split),
        )


class _VtabDataset(_TfdsDataset):
    def __init__(self, name, data_dir):
        self._name = name
        self._task = vtab.get_task(name)
        self._tfds_name = self._task.builder
        self._builder = _builder(self._tfds_name, os.path.expanduser(data_dir))
        features = self._builder.info.features
        missing = {"image", *self._task.features} - set(features)
        if missing:
            raise UserError(
                f"data set {name!r} needs the features {', '.join(sorted(missing))} of "
                f"{self._builder.info.full_name}, which has {', '.join(features)}: prepare "
                f"{self._tfds_name} anew"
            )

    @property
    def _class_names(self):
        return self._task.class_names or tuple(self._feature.names)

    @property
    def _feature(self):
        (name,) = self._task.features
        return self._builder.info.features[name]

    def _records(self, split, seed=None):
        task = self._task
        label = labels.label_fn(task, getattr(self._feature, "num_classes", 0))
        records = _tfds_records(self._builder, split, task.features, label, seed)
        if task.binary_pixels:
            records = records.map(lambda r: r | {"image": labels.stretch_binary(r["image"])})
        return records

    def splits(self, development):
        """The protocol's splits to train and to evaluate on."""
        sizes = {name: split.num_examples for name, split in self._builder.info.splits.items()}
        needed = {"train", self._task.validation[0], self._task.test[0]}
        if not needed <= set(sizes):
            raise _not_prepared(self._name, self._builder, self._tfds_name)
        return vtab.splits(self._task, sizes, development)


class _RealDataset(_TfdsDataset):
    _LABEL = "real_label"

    @staticmethod
    def _is_label(feature):
        return isinstance(feature, tfds.features.Sequence) and hasattr(feature.feature, "names")

    @property
    def _class_names(self):
        return tuple(self._builder.info.features[self._LABEL].feature.names)

    def _records(self, split, seed=None):
        def multi_hot(record):
            labels = tf.one_hot(record["label"], len(self._class_names), True, False)
            return record | {"label": tf.cast(tf.reduce_any(labels, 0), tf.int64)}

        return super()._records(split, seed).map(multi_hot)


def _builder(name, data_dir):
    try:
        if name == "digits":
            return prepare_digits(data_dir)
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, tfds.list_builders(), n=3) or ["digits"]
        raise UserError(
            f"data set {name!r} is not known to TFDS and not prepared in "
            f"{data_dir or tfds.core.constants.DATA_DIR}: did you mean {' or '.join(near)}? "
            f"If it is prepared elsewhere, set {_DATA_DIR}; {_NO_DATA}"
        ) from error
    except (ValueError, AssertionError, OSError, ImportError) as error:
        raise UserError(f"data set {name!r} cannot be opened: {first_line(error)}") from error


def _not_prepared(name, builder, tfds_name):
    root = builder.data_dir_root
    # Of some, TFDS says what to download by hand first.
    by_hand = ", which says what it wants downloaded by hand" * bool(
        builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    )
    return UserError(
        f'data set {name!r} is not prepared in data_dir {str(root)!r}: run `python -c "import '
        f"tensorflow_datasets as tfds; tfds.builder({tfds_name!r}, data_dir={str(root)!r})"
        f'.download_and_prepare()"`{by_hand}, or set {_DATA_DIR} to where it is prepared; '
        f"{_NO_DATA}"
    )


def _tfds_ids(builder, split):
    # As TFDS makes them: the name of the file and the place in it.
    return [
        f"{os.path.basename(part.filename)}__{index}"
        for part in builder.info.splits[split].file_instructions
        for index in range(part.skip, part.skip + part.take)
    ]


def _tfds_records(builder, split, features, label, seed=None):
    config = tfds.ReadConfig(
        add_tfds_id=True,
        try_autocache=False,
        skip_prefetch=True,
        shuffle_seed=seed,
        shuffle_reshuffle_each_iteration=False,
    )
    dataset = builder.as_dataset(
        split=split,
        shuffle_files=seed is not None,
        read_config=config,
        decoders=tfds.decode.PartialDecoding(
            {"image": True, **features}, decoders={"image": tfds.decode.SkipDecoding()}
        ),
    )
    return dataset.map(
        lambda record: {
            "image": record["image"],
            "label": label(record),
            "id": record["tfds_id"],
        }
    )
