"""The linear decoder of a run of segmentation, beside the trunk that every other use reads."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.checkpoints.layouts import Arrays
from vit_jax.checkpoints.model_info import ModelInfo
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.segmentation import HEAD, SegmentationTransformer, segmenter
from vit_jax.pixel_classes import MOST_CLASSES, numbered

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A linear layer on the patches of a model, see `models.segmentation`.

    Attributes:
        params: "kernel" [hidden_size, classes] and "bias" [classes], float32.
        class_names: one per class of pixels.
    """

    params: dict[str, np.ndarray]
    class_names: tuple[str, ...]


def split_decoder(arrays: Arrays, info: ModelInfo) -> tuple[Arrays, ModelInfo, Decoder | None]:
    """Takes the decoder, if there is one, from the arrays of a model and what is said of it.

    Args:
        arrays: by official names, joined by "/".
        info: whose class names are of pixels where there is a decoder.

    Returns:
        Arrays and info of the trunk, which has no head then, and the decoder.

    Raises:
        UserError: it is misshapen, or has more names than classes.
    """
    names = {f"{HEAD}/{x}": x for x in ("kernel", "bias")}
    if not names.keys() & arrays.keys():
        return arrays, info, None
    params = {x: np.asarray(arrays[name]) for name, x in names.items() if name in arrays}
    shapes = [x.shape for x in params.values()]
    if [len(shape) for shape in shapes] != [2, 1] or shapes[0][1:] != shapes[1]:
        raise UserError(f"{HEAD} has the shapes {shapes}, which is no linear layer")
    (count,), given = shapes[1], info.class_names or ()
    if not len(given) <= count <= MOST_CLASSES:
        raise UserError(
            f"{len(given)} class names for {count} classes of pixels: give one for each"
        )
    kept = {name: x for name, x in arrays.items() if name not in names}
    model = {key: x for key, x in info.model.items() if key != "num_classes"}
    decoder = Decoder(params, given + numbered(count)[len(given) :])
    return kept, dataclasses.replace(info, model=model, class_names=None), decoder


def with_decoder(
    pretrained: "Pretrained", **overrides: Any
) -> tuple[SegmentationTransformer, dict[str, Any]]:
    """The model that maps images to logits of their pixels, and its parameters.

    Args:
        pretrained: of a run of segmentation.
        **overrides: replace entries of its `model`.

    Raises:
        UserError: the weights are of no run of segmentation, or the two do not go together.
    """
    decoder = pretrained.segmentation
    if decoder is None:
        raise UserError(
            f"{pretrained.source} tells no pixels apart: train it with --config segmentation:..., "
            "see docs/segmentation.md"
        )
    module = segmenter(
        create_model(pretrained.model, num_classes=len(decoder.class_names), **overrides)
    )
    if (found := len(decoder.params["kernel"])) != module.config.hidden_size:
        raise UserError(
            f"{pretrained.source} has a {HEAD} of {found} features and a trunk of "
            f"{module.config.hidden_size}: fetch it again"
        )
    return module, {**pretrained.params, HEAD: decoder.params}
