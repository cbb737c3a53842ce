"""Data sets of TFDS, those of VTAB and ReaL among them, as sources. TensorFlow is not imported."""

import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data import labels, vtab
from vit_jax.data.boxes import Boxes
from vit_jax.data.masks import check_indices, open_mask
from vit_jax.data.source import Example, Examples, Source
from vit_jax.data.tfds_records import MALFORMED, RecordExamples
from vit_jax.errors import UserError, brief, first_line
from vit_jax.pixel_classes import numbered

_DATA_DIR = "config.dataset.data_dir (of evaluate: --data_dir)"
_LOOKED_INTO = 100  # masks of a split, before anything is computed
_NO_DATA = "`--config configs/digits.py` needs no data at all"


class TfdsDataset:
    """A data set of images with one class label each, registered with TFDS or only prepared."""

    _LABEL = "label"

    def __init__(self, name: str, data_dir: str, tfds_name: str = ""):
        """Opens the builder.

        Args:
            name: as the user gave it.
            data_dir: where TFDS looks; "" is its default.
            tfds_name: where that is not `name`.

        Raises:
            UserError: TFDS does not know the data set, or it lacks a feature that is needed.
        """
        self._name = name
        self._tfds_name = tfds_name or name
        self._builder = _builder(self._tfds_name, os.path.expanduser(data_dir))
        self._check_features(dict(self._builder.info.features or {}))

    def _check_features(self, features: Mapping[str, Any]) -> None:
        if not (
            isinstance(features.get("image"), tfds.features.Image)
            and self._is_label(features.get(self._LABEL))
        ):
            raise UserError(
                f"data set {self._name!r} is not one of images with one class label each: it needs "
                f"the features image and {self._LABEL}, and has {', '.join(features) or 'none'}"
            )
        label = features[self._LABEL]
        number = getattr(label, "num_classes", None)
        if number is not None and len(self._class_names) != number:
            raise UserError(
                f"data set {self._name!r} names {len(self._class_names):,} classes and has "
                f"{number:,}: prepare it again"
            )

    @staticmethod
    def _is_label(feature: Any) -> bool:
        return isinstance(feature, tfds.features.ClassLabel)

    @property
    def _class_names(self) -> tuple[str, ...]:
        return tuple(self._builder.info.features[self._LABEL].names)

    def _examples(self, split: str) -> Examples:
        features = {"image": True, self._LABEL: True}
        return RecordExamples(self._builder.info, split, features, self._example)

    def _example(self, record: Mapping[str, Any]) -> Example:
        label = record[self._LABEL]
        # TFDS gives -1 to images whose class nobody knows.
        if not -1 <= label < self._builder.info.features[self._LABEL].num_classes:
            raise ValueError(f"its label is {label}")
        return {"image": record["image"], "label": label}

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the prepared splits."""
        return tuple(self._builder.info.splits)

    def source(self, split: str) -> Source:
        """Returns a split, in the syntax of TFDS.

        Raises:
            UserError: the data set is not prepared.
            ValueError: there is no such split, or it is empty.
        """
        info = self._builder.info
        if not info.splits:
            raise _not_prepared(self._name, self._builder, self._tfds_name)
        if "://" in str(self._builder.data_path):
            raise UserError(
                f"data set {self._name!r} lies in {self._builder.data_path}, which is no local "
                f"directory: mount the bucket, such as with gcsfuse, and set {_DATA_DIR} to it"
            )
        try:
            examples = self._examples(split)
        except ValueError:
            raise
        except MALFORMED as error:
            raise ValueError(f"it is not as TFDS writes it ({first_line(error)})") from error
        total = sum(part.num_examples for part in info.splits.values())
        num_bytes = info.dataset_size * len(examples) // total if total else 0
        return Source(self._name, split, self._class_names, num_bytes, examples, turn=False)


class MaskDataset(TfdsDataset):
    """A data set of images with a mask each, the index of the class of every pixel."""

    _LABEL = "segmentation_mask"

    def __init__(self, name: str, data_dir: str, num_classes: int):
        """Opens the builder.

        Args:
            name: as of `TfdsDataset`.
            data_dir: likewise.
            num_classes: of the masks; 0 where the data set itself tells.

        Raises:
            UserError: likewise, or it does not tell, or there is one class alone.
        """
        self._num_classes = num_classes
        super().__init__(name, data_dir)

    def _check_features(self, features: Mapping[str, Any]) -> None:
        images = tfds.features.Image
        if not all(isinstance(features.get(x), images) for x in ("image", self._LABEL)):
            raise UserError(
                f"data set {self._name!r} has no masks: it needs the features image and "
                f"{self._LABEL}, and has {', '.join(features) or 'none'}"
            )
        if not self._class_names:
            raise UserError(
                f"data set {self._name!r} does not tell how many classes its masks have: set "
                "--config.model.num_classes to one more than their largest index"
            )
        if len(self._class_names) == 1:
            raise UserError(
                f"data set {self._name!r} has one class alone, so there is nothing to tell apart: "
                "set --config.model.num_classes to one more than the largest index of its masks"
            )

    def _example(self, record: Mapping[str, Any]) -> Example:
        return {"image": record["image"], "label": record[self._LABEL]}

    @property
    def _class_names(self) -> tuple[str, ...]:
        feature = self._builder.info.features[self._LABEL]
        # Of classes of an unknown number, TFDS raises where it is asked for their names.
        named = getattr(feature, "num_classes", None)
        return tuple(feature.names) if named else numbered(self._num_classes)

    def source(self, split: str) -> Source:
        """Returns a split, as `TfdsDataset.source`.

        Raises:
            UserError: of some masks, evenly spread over it, one cannot be read or has other
                classes.
        """
        source = dataclasses.replace(super().source(split), has_masks=True)
        count = source.num_examples
        for index in np.unique(np.linspace(0, count - 1, _LOOKED_INTO).astype(int)):
            example = source[int(index)]
            try:
                with open_mask("the mask", example["label"]) as mask:
                    check_indices("the mask", mask, len(self._class_names))
            except UserError as error:
                raise UserError(f"image {example['id']}: {error}") from error
        return source


class BoxDataset(TfdsDataset):
    """A data set of images with boxes of objects, as `coco` and `voc` have them.

    Crowds of COCO, and what VOC calls difficult, are `Boxes.crowd`.
    """

    _LABEL = "objects"
    _CROWDS = ("is_crowd", "is_difficult")

    def _check_features(self, features: Mapping[str, Any]) -> None:
        kinds = {"bbox": tfds.features.BBoxFeature, "label": tfds.features.ClassLabel}
        parts = self._parts
        if not (
            isinstance(features.get("image"), tfds.features.Image)
            and all(isinstance(parts.get(name), kind) for name, kind in kinds.items())
        ):
            raise UserError(
                f"data set {self._name!r} has no boxes: it needs the features image and "
                f"{self._LABEL} with bbox and label, and has {', '.join(features) or 'none'}"
            )
        form = getattr(parts["bbox"].bbox_format, "value", "REL_YXYX")
        if form != "REL_YXYX":
            raise UserError(
                f"data set {self._name!r} has boxes as {form}: prepare it with REL_YXYX, shares of "
                "the image's sides"
            )

    @property
    def _parts(self) -> Mapping[str, Any]:
        """The features of an object; none where there are no objects."""
        feature = dict(self._builder.info.features or {}).get(self._LABEL)
        inner = feature.feature if isinstance(feature, tfds.features.Sequence) else None
        return dict(inner) if isinstance(inner, tfds.features.FeaturesDict) else {}

    @property
    def _class_names(self) -> tuple[str, ...]:
        return tuple(self._parts["label"].names)

    def _examples(self, split: str) -> Examples:
        wanted = {"bbox", "label", "area", *self._CROWDS} & set(self._parts)
        features = {"image": True, self._LABEL: dict.fromkeys(sorted(wanted), True)}
        return RecordExamples(self._builder.info, split, features, self._example)

    def _example(self, record: Mapping[str, Any]) -> Example:
        objects = record[self._LABEL]
        classes = np.array(objects["label"], np.int32).reshape(-1)
        top, left, bottom, right = np.array(objects["bbox"], np.float64).reshape(-1, 4).T
        crowd = np.zeros(len(classes), bool)
        for name in self._CROWDS:
            crowd |= np.array(objects.get(name, crowd), bool).reshape(-1)
        areas = np.array(objects.get("area", np.full(len(classes), np.nan)), np.float64)
        boxes = Boxes(
            np.stack([left, top, right, bottom], axis=1),
            classes,
            crowd,
            areas.reshape(-1),
            is_relative=True,
        )
        return {"image": record["image"], "label": boxes}

    def source(self, split: str) -> Source:
        """Returns a split, as `TfdsDataset.source`."""
        return dataclasses.replace(super().source(split), has_boxes=True)


class VtabDataset(TfdsDataset):
    """A task of VTAB-1k, "vtab:TASK", whose labels may be made of other features."""

    def __init__(self, name: str, data_dir: str):
        """Opens the builder of a task.

        Args:
            name: "vtab:TASK".
            data_dir: as of `TfdsDataset`.

        Raises:
            UserError: likewise, or there is no such task.
        """
        self._task = vtab.get_task(name)
        super().__init__(name, data_dir, self._task.builder)

    def _check_features(self, features: Mapping[str, Any]) -> None:
        missing = {"image", *self._task.features} - set(features)
        if missing:
            raise UserError(
                f"data set {self._name!r} needs the features {', '.join(sorted(missing))} of "
                f"{self._builder.info.full_name}, which has {', '.join(features)}: prepare "
                f"{self._tfds_name} anew"
            )

    @property
    def _class_names(self) -> tuple[str, ...]:
        return self._task.class_names or tuple(self._feature.names)

    @functools.cached_property
    def _feature(self) -> Any:
        (name,) = self._task.features
        return self._builder.info.features[name]

    def _examples(self, split: str) -> Examples:
        features = {"image": True, **self._task.features}
        return RecordExamples(self._builder.info, split, features, self._example)

    def _example(self, record: Mapping[str, Any]) -> Example:
        task = self._task
        label = labels.label_fn(task, getattr(self._feature, "num_classes", 0))
        image = record["image"]
        return {
            "image": labels.stretch_binary(image) if task.binary_pixels else image,
            "label": label(record),
        }

    def splits(self, development: bool) -> tuple[str, str]:
        """The protocol's splits to train and to evaluate on, see `vtab.splits`.

        Raises:
            UserError: one of them is not prepared.
        """
        sizes = {name: split.num_examples for name, split in self._builder.info.splits.items()}
        needed = {"train", self._task.validation[0], self._task.test[0]}
        if not needed <= set(sizes):
            raise _not_prepared(self._name, self._builder, self._tfds_name)
        return vtab.splits(self._task, sizes, development)


class RealDataset(TfdsDataset):
    """ImageNet's validation images with every class that they show (Beyer et al., 2020)."""

    _LABEL = "real_label"

    @staticmethod
    def _is_label(feature: Any) -> bool:
        return isinstance(feature, tfds.features.Sequence) and hasattr(feature.feature, "names")

    @property
    def _class_names(self) -> tuple[str, ...]:
        return tuple(self._builder.info.features[self._LABEL].feature.names)

    def _example(self, record: Mapping[str, Any]) -> Example:
        num_classes = self._builder.info.features[self._LABEL].feature.num_classes
        label = np.zeros(num_classes, np.int64)  # The names would be copied for every image.
        label[record[self._LABEL]] = 1
        return {"image": record["image"], "label": label}


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    root = Path(data_dir or os.path.expanduser(tfds.core.constants.DATA_DIR))
    _check_classes(name, root / re.split("[/:]", name)[0])
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, _known(), n=3) or ["digits"]
        raise UserError(
            f"data set {name!r} is not known to TFDS and not prepared in "
            f"{data_dir or tfds.core.constants.DATA_DIR}: did you mean {' or '.join(near)}? "
            f"If it is prepared elsewhere, set {_DATA_DIR}; {_NO_DATA}"
        ) from error
    except MALFORMED as error:
        raise UserError(f"data set {name!r} cannot be opened: {first_line(error)}") from error


def _check_classes(name: str, folder: Path) -> None:
    """Checks that the features of a prepared data set are of classes that are there.

    TFDS would import whatever module its files name.
    """
    for path in folder.rglob("features.json"):
        try:
            classes = list(_feature_classes(json.loads(path.read_text())))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error
        for each in classes:
            module = each.rpartition(".")[0]
            if not (module.startswith("tensorflow_datasets.") or module in sys.modules):
                raise UserError(
                    f"data set {name!r} has a feature of {brief(each)}, which is none of TFDS: "
                    f"import its module first if you trust {path}"
                )


def _feature_classes(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        # Protocol buffers take both for the same.
        keys = ("pythonClassName", "python_class_name")
        yield from (str(document[key]) for key in keys if key in document)
        document = list(document.values())
    if isinstance(document, list):
        for value in document:
            yield from _feature_classes(value)


def _known() -> list[str]:
    try:
        return tfds.list_builders()
    except ImportError:  # Some of TFDS's own data sets cannot be looked up without TensorFlow.
        return []


def _not_prepared(name: str, builder: tfds.core.DatasetBuilder, tfds_name: str) -> UserError:
    root = builder.data_dir_root
    # Of some, TFDS says what to download by hand first.
    by_hand = ", which says what it wants downloaded by hand" * bool(
        builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    )
    writer = "" if importlib.util.find_spec("tensorflow") else "`pip install tensorflow-cpu` and "
    return UserError(
        f"data set {name!r} is not prepared in data_dir {str(root)!r}: run {writer}"
        '`python -c "import '
        f"tensorflow_datasets as tfds; tfds.builder({tfds_name!r}, data_dir={str(root)!r})"
        f'.download_and_prepare()"`{by_hand}, or set {_DATA_DIR} to where it is prepared; '
        f"{_NO_DATA}"
    )
