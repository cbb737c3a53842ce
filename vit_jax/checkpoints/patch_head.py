"""The head of a run of masked patch prediction, beside the trunk that every other use reads."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vit_jax.checkpoints.transfer import check_fit
from vit_jax.errors import UserError
from vit_jax.models import create_model, masked
from vit_jax.state import init_params

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained


def with_patch_head(
    pretrained: "Pretrained",
) -> tuple[masked.MaskedVisionTransformer, dict[str, Any], str]:
    """The model that predicts patches, its parameters, and its target, one of `masked.TARGETS`.

    The number of outputs tells the target.

    Raises:
        UserError: the weights are of no run of masked patch prediction, or what they have of one
            does not go with their trunk.
    """
    source = pretrained.source
    if not pretrained.masked:
        raise UserError(
            f"{source} has no head that predicts patches: train it with --config restoration:... "
            "or --config.objective=masked_patches, see docs/restoration.md"
        )
    params, trunk = {**pretrained.params, **pretrained.masked}, create_model(pretrained.model)
    outputs = np.size(pretrained.masked.get("patch_head", {}).get("bias", ()))
    target = masked.target_of(outputs, trunk.downsampling)
    if target is None:
        raise UserError(
            f"{source} has a patch_head of {outputs} outputs, which are no prediction of patches "
            f"of {trunk.downsampling} pixels: fetch it again"
        )
    model = masked.predictor(trunk, target)
    size = pretrained.preprocessing.image_size
    check_fit(jax.eval_shape(lambda: init_params(model, seed=0, image_size=size)), params)
    return model, params, target
