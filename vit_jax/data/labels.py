"""Labels and images of VTAB's tasks from the features that TFDS has of them."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from vit_jax.data import vtab

Record = Mapping[str, Any]


def label_fn(task: vtab.Task, num_values: int) -> Callable[[Record], tf.Tensor]:
    """Returns the function from a record to its label, an int64 scalar.

    Args:
        task: whose `features` a record has.
        num_values: classes of the feature; only "bins" needs them.
    """
    rule = RULES[task.rule]
    (feature,) = task.features

    def label(record: Record) -> tf.Tensor:
        return tf.cast(rule(record[feature], num_values), tf.int64)

    return label


def _class(value, num_values):
    del num_values
    return value


def _bins(value, num_values):
    return value * vtab.DSPRITES_BINS // num_values


def _count(objects, num_values):
    del num_values
    return tf.size(objects["size"]) - vtab.CLEVR_FEWEST


def _closest_object(objects, num_values):
    del num_values
    return _bucket(tf.reduce_min(objects["pixel_coords"][:, 2]), vtab.CLEVR_THRESHOLDS)


def _closest_vehicle(objects, num_values):
    del num_values
    is_vehicle = objects["type"] < vtab.KITTI_VEHICLES
    distances = tf.where(is_vehicle, objects["location"][:, 2], vtab.KITTI_NO_VEHICLE)
    # The minimum over no object at all would be infinite, which is no vehicle as well.
    return _bucket(tf.reduce_min(distances), vtab.KITTI_THRESHOLDS)


def _bucket(distance, thresholds):
    return tf.reduce_sum(tf.cast(tf.constant(thresholds) < distance, tf.int64)) - 1


RULES = {
    "class": _class,
    "bins": _bins,  # equal ones of the feature's values, in their order
    "count": _count,  # of objects, from the fewest on
    "closest object": _closest_object,  # by its depth in the picture
    "closest vehicle": _closest_vehicle,  # metres in front of the camera
}


def stretch_binary(encoded: tf.Tensor) -> tf.Tensor:
    """A PNG whose pixels are 0 and 1, as those of dSprites are, with 255 for 1."""
    pixels = tf.io.decode_png(encoded)
    return tf.io.encode_png(tf.where(pixels > 0, tf.constant(255, tf.uint8), pixels))
