"""The head of a run of detection, beside the trunk that every other use reads."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from vit_jax.checkpoints.layouts import Arrays
from vit_jax.checkpoints.model_info import ModelInfo
from vit_jax.checkpoints.transfer import check_fit
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.detection import (
    HEAD,
    DetectionHead,
    DetectionTransformer,
    HeadShape,
    detector,
    shape_of,
)
from vit_jax.pixel_classes import numbered

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class Detector:
    """A head that finds objects on the grid of a model's patches, see `models.detection`.

    Attributes:
        params: of the head, nested, float32.
        shape: its size.
        class_names: one per class of objects.
    """

    params: dict[str, Any]
    shape: HeadShape
    class_names: tuple[str, ...]


def split_detector(arrays: Arrays, info: ModelInfo) -> tuple[Arrays, ModelInfo, Detector | None]:
    """Takes the head, if there is one, from the arrays of a model and what is said of it.

    Args:
        arrays: by official names, joined by "/".
        info: whose class names are of objects where there is such a head.

    Returns:
        Arrays and info of the trunk, which has no head then, and the detector.

    Raises:
        UserError: it is misshapen, or has more names than classes.
    """
    prefix = f"{HEAD}/"
    head = {
        name.removeprefix(prefix): np.asarray(x)
        for name, x in arrays.items()
        if name.startswith(prefix)
    }
    if not head:
        return arrays, info, None
    (shape, count), given = shape_of(head), info.class_names or ()
    if len(given) > count:
        raise UserError(f"{len(given)} class names for {count} classes of objects: give one each")
    kept = {name: x for name, x in arrays.items() if not name.startswith(prefix)}
    model = {key: x for key, x in info.model.items() if key != "num_classes"}
    names = given + numbered(count)[len(given) :]
    found = Detector(unflatten_dict(head, sep="/"), shape, names)
    return kept, dataclasses.replace(info, model=model, class_names=None), found


def with_detector(
    pretrained: "Pretrained", **overrides: Any
) -> tuple[DetectionTransformer, dict[str, Any]]:
    """The model that finds objects in images, and its parameters.

    Args:
        pretrained: of a run of detection.
        **overrides: replace entries of its `model`.

    Raises:
        UserError: the weights are of no run of detection, or the two do not go together.
    """
    found = pretrained.detection
    if found is None:
        raise UserError(
            f"{pretrained.source} finds no objects: train it with --config detection:..., see "
            "docs/detection.md"
        )
    count = len(found.class_names)
    module = detector(create_model(pretrained.model, num_classes=count, **overrides), found.shape)
    features = jax.ShapeDtypeStruct((1, 2, 2, module.config.hidden_size), np.float32)
    head = DetectionHead(count, found.shape)
    wanted = jax.eval_shape(head.init, jax.random.key(0), features)["params"]
    check_fit(wanted, found.params)
    return module, {**pretrained.params, HEAD: found.params}
