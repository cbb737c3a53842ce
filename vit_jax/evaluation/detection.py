"""The scores of a model that finds objects: COCO's average precision, by pycocotools."""

import contextlib
import dataclasses
import importlib.util
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.data.boxes import Boxes
from vit_jax.errors import UserError
from vit_jax.evaluation.detections import Detections

if TYPE_CHECKING:  # It imports TFDS.
    from vit_jax.data.source import Source

# The axes of pycocotools' table of precisions: overlaps from 0.5 to 0.95, recalls, classes, sizes
# of objects, and numbers of objects that are looked at, of which the last is 100.
_HALF, _THREE_QUARTERS = 0, 5
_SIZES = {"AP_small": 1, "AP_medium": 2, "AP_large": 3}


@dataclasses.dataclass(frozen=True)
class DetectionMetrics:
    """The result of `detection_metrics`.

    Attributes:
        precision: float64 [10 overlaps, 101 recalls, classes, 4 sizes], -1 where there is no
            object. Sizes are all, below 32 x 32 pixels, up to 96 x 96 and above, of the area that
            the data set tells.
        examples: the number of images.
        objects: int64 [classes], those that are looked for.
    """

    precision: np.ndarray = dataclasses.field(repr=False)
    examples: int
    objects: np.ndarray = dataclasses.field(repr=False)

    def scalars(self) -> dict[str, float]:
        """All that is a number, as COCO calls it, without what no object tells anything of.

        "examples", how many images there were; "AP", the mean of the average precisions at overlaps
        of 0.5, 0.55 and so on to 0.95; "AP50" and "AP75", at one of them; "AP_small", "AP_medium"
        and "AP_large", of objects of a size.
        """
        everywhere = self.precision[..., 0]
        found = {
            "AP": _mean(everywhere),
            "AP50": _mean(everywhere[_HALF]),
            "AP75": _mean(everywhere[_THREE_QUARTERS]),
            **{name: _mean(self.precision[..., size]) for name, size in _SIZES.items()},
        }
        known = {name: value for name, value in found.items() if not np.isnan(value)}
        return {"examples": self.examples, **known}

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The "name" of each class, its "AP" and "AP50", None without objects, and "objects"."""
        rows = []
        for index, name in enumerate(names):
            own = self.precision[:, :, index, 0]
            values = {"AP": _mean(own), "AP50": _mean(own[_HALF])}
            known = {key: None if np.isnan(x) else x for key, x in values.items()}
            rows.append({"name": name, **known, "objects": int(self.objects[index])})
        return rows


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")


def check_installed() -> None:
    """Raises a UserError if there is no pycocotools."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            "the average precision of detections is pycocotools', which is not installed: run "
            "`pip install pycocotools`, or in a clone `pip install -e '.[detection]'`"
        )


def truth(source: "Source") -> list[Boxes]:
    """The objects of all images of a source that `has_boxes`."""
    return [source.boxes(index) for index in range(source.num_examples)]


def detection_metrics(
    found: Sequence[Detections], truth: Sequence[Boxes], class_names: Sequence[str]
) -> DetectionMetrics:
    """Measures what was found in images against the objects that are there.

    Objects of a crowd are not looked for, and what is found within one counts for nothing.

    Args:
        found: in every image, in the order of `truth`.
        truth: the objects of each image.
        class_names: of the data set.

    Raises:
        UserError: there is no object to look for, or no pycocotools.
    """
    check_installed()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(found) != len(truth):
        raise ValueError(f"{len(found)} images were looked at, and there are {len(truth)}")
    objects = [x.of_image(y.height, y.width) for x, y in zip(truth, found, strict=True)]
    counts = sum(
        (np.bincount(x.classes[~x.crowd], minlength=len(class_names)) for x in objects),
        start=np.zeros(len(class_names), np.int64),
    )
    if not counts.any():
        raise UserError("no image of the split has an object: choose another one")
    with contextlib.redirect_stdout(io.StringIO()):  # It tells of its progress.
        expected, actual = COCO(), COCO()
        for data, annotations in ((expected, _expected(objects)), (actual, _found(found))):
            data.dataset = {
                "info": {},
                "images": [
                    {"id": index, "height": x.height, "width": x.width}
                    for index, x in enumerate(found)
                ],
                "categories": [{"id": i, "name": name} for i, name in enumerate(class_names)],
                "annotations": annotations,
            }
            data.createIndex()
        evaluation: Any = COCOeval(expected, actual, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    tables: Any = evaluation.eval
    return DetectionMetrics(tables["precision"][..., -1], len(found), counts)


def _expected(objects: Sequence[Boxes]) -> list[dict[str, Any]]:
    return _numbered(
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": _left_top_size(corners),
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for image, boxes in enumerate(objects)
        for corners, label, area, crowd in zip(
            boxes.corners, boxes.classes, boxes.areas, boxes.crowd, strict=True
        )
    )


def _found(found: Sequence[Detections]) -> list[dict[str, Any]]:
    rows = []
    for image, each in enumerate(found):
        for corners, label, score in zip(each.corners, each.classes, each.scores, strict=True):
            box = _left_top_size(corners)
            row = {"image_id": image, "category_id": int(label), "bbox": box}
            rows.append(row | {"score": float(score), "area": box[2] * box[3], "iscrowd": 0})
    return _numbered(rows)


def _numbered(rows: Any) -> list[dict[str, Any]]:
    # To pycocotools 0 is no number of an object.
    return [{"id": number, **row} for number, row in enumerate(rows, 1)]


def _left_top_size(corners: np.ndarray) -> list[float]:
    left, top, right, bottom = corners.tolist()
    return [left, top, right - left, bottom - top]
