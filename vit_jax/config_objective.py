"""The objective of a run: the keys of a config that another one would not read."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vit_jax.data.augmentation import Augmentation, parse_augment
from vit_jax.errors import UserError

# What is about classes, of which masked patch prediction has none.
OF_CLASSES = (
    "class_weights",
    "dataset.sampling",
    "label_smoothing",
    "model.head_bias_init",
    "model.num_classes",
    "model.representation_size",
)
# What is about the one class of an image, of which segmentation and detection have none.
OF_IMAGES = ("class_weights", "dataset.sampling", "label_smoothing", "model.representation_size")


def check_objective(config: ConfigDict) -> None:
    """Checks that nothing is asked for which the objective of a config does not do.

    Args:
        config: whose values are right, each for itself.

    Raises:
        UserError: it does not, with the flag to add.
    """
    values = flatten_dict(config.to_dict(), sep=".")
    objective, augmentation = values["objective"], parse_augment(values["augment"])
    if objective == "masked_patches":
        _check_masked(values, augmentation)
    if objective == "segmentation":
        _check_dense(values, augmentation, "masks", "one class a pixel", "pixels")
    if objective == "detection":
        _check_dense(values, augmentation, "boxes", "a loss of its own", "objects")
    if values["class_weights"] and values["dataset.sampling"]:
        raise UserError(
            "config.class_weights and config.dataset.sampling are both 'balanced', which would "
            "balance the classes twice: set one of them to ''"
        )


def _check_masked(values: Mapping[str, Any], augmentation: Augmentation) -> None:
    if augmentation.mixup_alpha or augmentation.cutmix_alpha:
        raise UserError(
            f"config.augment is {values['augment']!r}, but objective masked_patches has no labels "
            "to mix: leave mixup and cutmix out"
        )
    if values.get("model.classifier") == "map":
        raise UserError(
            "config.model.classifier is 'map', but objective masked_patches has no pooling to "
            "train: set --config.model.classifier=gap or token, and fine-tune with map"
        )
    _check_off(values, OF_CLASSES, "masked_patches has no classes")


def _check_dense(
    values: Mapping[str, Any], augmentation: Augmentation, labels: str, loss: str, what: str
) -> None:
    """Checks a config whose labels are places in the image.

    Args:
        values: of the config.
        augmentation: that it asks for.
        labels: what an image has, for messages.
        loss: how they are learned, likewise.
        what: it is that has classes, likewise.

    Raises:
        UserError: something is asked for that is not done.
    """
    objective = values["objective"]
    if augmentation._replace(erase_probability=0.0) != Augmentation():
        raise UserError(
            f"config.augment is {values['augment']!r}, but objective {objective} moves and mixes "
            f"no {labels} with it: use none or erase(0.25) alone"
        )
    for key, needed in (("loss", "softmax"), ("keep_head", "never")):
        if values[key] != needed:
            raise UserError(
                f"config.{key} is {values[key]!r}, but objective {objective} has {loss} and a new "
                f"head: set --config.{key}={needed}"
            )
    _check_off(values, OF_IMAGES, f"{objective} has classes of {what} alone")


def _check_off(values: Mapping[str, Any], keys: tuple[str, ...], reason: str) -> None:
    for key in keys:
        if values.get(key):
            off = "''" if isinstance(values[key], str) else 0
            raise UserError(
                f"config.{key} is {values[key]}, but objective {reason}: add --config.{key}={off}"
            )
