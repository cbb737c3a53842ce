"""Labels and images of VTAB's tasks from the features that TFDS has of them."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data import vtab

Record = Mapping[str, Any]


def label_fn(task: vtab.Task, num_values: int) -> Callable[[Record], int]:
    """Returns the function from a record to its label.

    Args:
        task: whose `features` a record has.
        num_values: classes of the feature; only "bins" needs them.
    """
    rule = RULES[task.rule]
    (feature,) = task.features

    def label(record: Record) -> int:
        return int(rule(record[feature], num_values))

    return label


def _class(value, num_values):
    del num_values
    return value


def _bins(value, num_values):
    return value * vtab.DSPRITES_BINS // num_values


def _count(objects, num_values):
    del num_values
    return len(objects["size"]) - vtab.CLEVR_FEWEST


def _closest_object(objects, num_values):
    del num_values
    return _bucket(objects["pixel_coords"][:, 2].min(), vtab.CLEVR_THRESHOLDS)


def _closest_vehicle(objects, num_values):
    del num_values
    distances = objects["location"][:, 2][objects["type"] < vtab.KITTI_VEHICLES]
    return _bucket(distances.min(initial=vtab.KITTI_NO_VEHICLE), vtab.KITTI_THRESHOLDS)


def _bucket(distance, thresholds):
    # In 32 bits, as the distances are stored.
    return np.sum(np.array(thresholds, np.float32) < distance) - 1


RULES = {
    "class": _class,
    "bins": _bins,  # equal ones of the feature's values, in their order
    "count": _count,  # of objects, from the fewest on
    "closest object": _closest_object,  # by its depth in the picture
    "closest vehicle": _closest_vehicle,  # metres in front of the camera
}


def stretch_binary(encoded: bytes) -> bytes:
    """A PNG whose pixels are 0 and 1, as those of dSprites are, with 255 for 1."""
    with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    buffer = io.BytesIO()
    stretched = np.where(pixels > 0, 255, 0).astype(np.uint8)
    Image.fromarray(stretched).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
