"""The function that is exported: from a batch of images to logits, probabilities or features."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Forward:
    """The function that is exported, and all that is needed to run it.

    Attributes:
        apply: (params, images) to the output; a pure function that JAX can trace.
        params: nested dicts of float32 arrays.
        image_shape: (height, width, channels) of one image.
        image_dtype: "float32" for images that went through the preprocessing, "uint8" for pixels of
            images that were resized and cropped: then mean and std are in the function.
        output_name: "logits", "probabilities" or "features", the name of the output everywhere.
        num_layers: Transformer layers L; 0 for a ResNet.
        metadata: what goes into the file beside the graph, JSON by name.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: dict[str, Any]
    image_shape: tuple[int, int, int]
    image_dtype: str
    output_name: str
    num_layers: int
    metadata: dict[str, str]

    def flat_params(self) -> dict[str, np.ndarray]:
        """The weights by their path: "Transformer/encoder_norm/bias" and so on."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.params)
        return {"/".join(key.key for key in path): leaf for path, leaf in leaves}

    def apply_flat(self, images: jax.Array, *weights: jax.Array) -> jax.Array:
        """The function of images and of the weights in the order of `flat_params`."""
        return self.apply(jax.tree.unflatten(jax.tree.structure(self.params), weights), images)

    def jitted(self) -> Callable[[np.ndarray], np.ndarray]:
        """The Flax model as it is, in float32: what every stage is compared with."""
        apply, params = jax.jit(self.apply), jax.device_put(self.params)
        return lambda images: np.asarray(apply(params, images))


def _name(source: Path) -> str:
    """The name of weights; of a run's step with the run's, as `flowers/best/40`."""
    parts = 3 if source.name.isdecimal() else 1
    return "/".join(source.absolute().parts[-parts:])


def make_forward(
    pretrained: Pretrained, *, outputs: str = "logits", include_preprocessing: bool = False
) -> Forward:
    """Builds the function to export from pretrained weights.

    Args:
        pretrained: the model.
        outputs: "logits", "probabilities" (their softmax, or sigmoid if the model was trained so)
            or "features" (what the head would be applied to).
        include_preprocessing: take uint8 pixels, with mean and std folded into the graph; resizing
            and cropping are the caller's in any case.

    Raises:
        UserError: the model has no head, and features are not what is asked for.
    """
    params, config = pretrained.params, dict(pretrained.model)
    preprocessing = pretrained.preprocessing
    if outputs == "features":
        config["num_classes"] = 0
        kept = flatten_dict(abstract_params(config, preprocessing.image_size))
        params = unflatten_dict(
            {path: x for path, x in flatten_dict(params).items() if path in kept}
        )
    elif not config["num_classes"]:
        raise UserError(f"{pretrained.source} has no head, so no {outputs}: use --outputs features")
    # Without a backward pass nothing is computed again, and jax2onnx does not know the call.
    module = models.create_model(config, dtype="float32", remat="nothing")
    # x / 255 is a product, and so is the division by std: one Mul and one Sub in the graph.
    scale = 1.0 / (255.0 * np.asarray(preprocessing.std, np.float64))
    offset = np.asarray(preprocessing.mean, np.float64) / np.asarray(preprocessing.std, np.float64)
    scale, offset = scale.astype(np.float32), offset.astype(np.float32)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        if include_preprocessing:
            images = images.astype(jnp.float32) * scale - offset
        x: Any = module.apply({"params": params}, images)
        if outputs == "probabilities":
            return jax.nn.sigmoid(x) if pretrained.loss == "sigmoid" else jax.nn.softmax(x)
        return x

    metadata = {
        "preprocessing": json.dumps(dataclasses.asdict(preprocessing)),
        "architecture": config["architecture"],
        "model": json.dumps(config),
        "loss": pretrained.loss,
        "source": _name(Path(pretrained.source)),
        "pixels": "uint8" if include_preprocessing else "preprocessed",
    }
    if pretrained.class_names is not None and outputs != "features":
        metadata["class_names"] = json.dumps(pretrained.class_names, ensure_ascii=False)
    return Forward(
        apply=apply,
        params=params,
        image_shape=preprocessing.image_shape,
        image_dtype="uint8" if include_preprocessing else "float32",
        output_name=outputs,
        num_layers=config.get("num_layers", 0),
        metadata=metadata,
    )
