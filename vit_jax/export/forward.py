"""The function that is exported: from a batch of images to one of `stages.OUTPUTS`."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.checkpoints.decoder import with_decoder
from vit_jax.checkpoints.detector import with_detector
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export.stages import BOXES, DENSE, PIXELS
from vit_jax.models.base import ModelConfig
from vit_jax.models.dense import check_dense, dense_features, prefix_names, whole_patches
from vit_jax.models.detection import UPSAMPLES, scores_and_boxes
from vit_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class Forward:
    """The function that is exported, and all that is needed to run it.

    Attributes:
        apply: (params, images) to the output; a pure function that JAX can trace.
        params: nested dicts of float32 arrays.
        image_shape: (height, width, channels) of one image.
        image_dtype: "float32" for images that went through the preprocessing, "uint8" for pixels of
            images that were resized and cropped: then mean and std are in the function.
        output_name: one of `stages.OUTPUTS`, the name of the output everywhere.
        num_layers: Transformer layers L; 0 for a ResNet.
        metadata: what goes into the file beside the graph, JSON by name.
        free_size: whether height and width of the images are free, beside the batch.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: dict[str, Any]
    image_shape: tuple[int, int, int]
    image_dtype: str
    output_name: str
    num_layers: int
    metadata: dict[str, str]
    free_size: bool = False

    def flat_params(self) -> dict[str, np.ndarray]:
        """The weights by their path: "Transformer/encoder_norm/bias" and so on."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.params)
        return {"/".join(key.key for key in path): leaf for path, leaf in leaves}

    def apply_flat(self, images: jax.Array, *weights: jax.Array) -> jax.Array:
        """The function of images and of the weights in the order of `flat_params`."""
        return self.apply(jax.tree.unflatten(jax.tree.structure(self.params), weights), images)

    @property
    def output_bytes(self) -> int:
        """The bytes of an image's output."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), self.image_dtype)
        output = jax.eval_shape(self.apply, self.params, images)
        return output.size * output.dtype.itemsize

    @property
    def step(self) -> int:
        """The side in pixels of what becomes a token or a position of the features."""
        return models.describe(json.loads(self.metadata["model"])).downsampling

    @property
    def sizes(self) -> set[int]:
        """The sizes in a graph of it: of weights, of tokens, and of an image's feature maps."""
        config, sides = models.describe(json.loads(self.metadata["model"])), self.image_shape[:2]
        sizes = {size for leaf in jax.tree.leaves(self.params) for size in leaf.shape}
        sizes |= {-(-side >> halvings) for side in sides for halvings in range(6)}
        if isinstance(config, ViTConfig):
            rows, columns = whole_patches(config, *sides)
            sizes.add(rows * columns + config.num_prefix_tokens)
            if self.output_name == PIXELS:
                classes = len(json.loads(self.metadata["pixel_classes"]))
                sizes |= {rows, columns, classes * columns}
            if self.output_name == BOXES:
                sizes |= {times * side for times in UPSAMPLES for side in (rows, columns)}
                sizes |= {times**2 * rows * columns for times in UPSAMPLES}
        return sizes

    def with_params(self, params: Mapping[str, Any]) -> "Forward":
        """The same function of other weights, of which those that it has no use for are left."""
        kept, given = flatten_dict(self.params), flatten_dict(params)
        return dataclasses.replace(self, params=unflatten_dict({k: given[k] for k in kept}))

    def jitted(self) -> Callable[[np.ndarray], np.ndarray]:
        """The Flax model as it is, in float32: what every stage is compared with."""
        apply, params = jax.jit(self.apply), jax.device_put(self.params)
        return lambda images: np.asarray(apply(params, images))


def check_free_size(config: ModelConfig, outputs: str) -> None:
    """Checks that a graph of a model can be one for images of any height and width.

    Args:
        config: of the model.
        outputs: see `make_forward`.

    Raises:
        UserError: it cannot.
    """
    if outputs in (PIXELS, BOXES):
        raise UserError(f"{outputs} are exported for one size of images: leave --free_size out")
    if type(config) is not ViTConfig:
        raise UserError(
            "a hybrid, an axial model or a ResNet is exported for one size of images: leave "
            "--free_size out"
        )
    if config.position_embedding == "relative" or config.position_placement != "stem":
        raise UserError(
            "position embeddings that are relative or in every layer are exported for one size of "
            "images: leave --free_size out"
        )


def _name(source: Path) -> str:
    """The name of weights; of a run's step with the run's, as `flowers/best/40`."""
    parts = 3 if source.name.isdecimal() else 1
    return "/".join(source.absolute().parts[-parts:])


def make_forward(
    pretrained: Pretrained,
    *,
    outputs: str = "logits",
    layer: int | None = None,
    include_preprocessing: bool = False,
    free_size: bool = False,
) -> Forward:
    """Builds the function to export from pretrained weights.

    Args:
        pretrained: the model.
        outputs: "logits", "probabilities" (their softmax, or sigmoid if the model was trained so),
            "features" (what the head would be applied to), [batch, features], or "tokens" or "grid"
            (those of every patch, see `models.dense`), [batch, tokens, hidden_size] and [batch,
            rows, columns, hidden_size], or "pixels" (the logits of each, of a run of segmentation,
            see `models.segmentation`), [batch, height, width, classes], or "boxes" (of a run of
            detection, see `models.detection.scores_and_boxes`), [batch, cells, classes + 4].
        layer: the number of the layer whose result tokens or grid are, before any LayerNorm; None:
            after the last LayerNorm.
        include_preprocessing: take uint8 pixels, with mean and std folded into the graph; resizing
            and cropping are the caller's in any case.
        free_size: leave height and width free, where the model permits, see `export.free_size`.

    Raises:
        UserError: the model has no head, and features are not what is asked for; it has no tokens,
            not so many layers, or is for images of one size.
    """
    config = _trunk(models.prediction_fields(pretrained.model), outputs, layer)
    params = pretrained.params
    preprocessing = pretrained.preprocessing
    if free_size:
        check_free_size(models.describe(config), outputs)
    if outputs in ("features", *DENSE):
        kept = flatten_dict(abstract_params(config, preprocessing.image_size))
        params = unflatten_dict(
            {path: x for path, x in flatten_dict(params).items() if path in kept}
        )
    elif outputs not in (PIXELS, BOXES) and not config["num_classes"]:
        more = " or pixels" if pretrained.segmentation else ""
        more += " or boxes" if pretrained.detection else ""
        raise UserError(
            f"{pretrained.source} has no head, so no {outputs}: use --outputs features{more}"
        )
    # Without a backward pass nothing is computed again, and jax2onnx does not know the call.
    plain = {"dtype": "float32", "remat": "nothing"}
    if outputs == PIXELS:
        module, params = with_decoder(pretrained, **plain)
    elif outputs == BOXES:
        module, params = with_detector(pretrained, **plain)
    else:
        module = models.create_model(config, **plain)
    scale, offset = normalization(preprocessing)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        if include_preprocessing:
            images = images.astype(jnp.float32) * scale - offset
        if outputs in DENSE:
            return tokens_of(module, params, images, layer, outputs == "grid")
        x: Any = module.apply({"params": params}, images)
        if outputs == BOXES:
            return scores_and_boxes(x)
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
        "output": outputs,
    }
    if outputs in DENSE:
        metadata["layer"] = json.dumps(layer)
    if outputs == "tokens":
        metadata["prefix"] = json.dumps(prefix_names(check_dense(module.config)))
    if outputs == PIXELS and pretrained.segmentation is not None:
        names = pretrained.segmentation.class_names
        metadata["pixel_classes"] = json.dumps(names, ensure_ascii=False)
    if outputs == BOXES and pretrained.detection is not None:
        names = pretrained.detection.class_names
        metadata["box_classes"] = json.dumps(names, ensure_ascii=False)
    if pretrained.class_names is not None and config["num_classes"]:
        metadata["class_names"] = json.dumps(pretrained.class_names, ensure_ascii=False)
    return Forward(
        apply=apply,
        params=params,
        image_shape=preprocessing.image_shape,
        image_dtype="uint8" if include_preprocessing else "float32",
        output_name=outputs,
        num_layers=config.get("num_layers", 0),
        metadata=metadata,
        free_size=free_size,
    )


def normalization(preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """The factors of pixels up to 255, and what is subtracted then, float32 [channels] each.

    x / 255 is a product, and so is the division by std: one Mul and one Sub in the graph.
    """
    mean, std = (np.asarray(x, np.float64) for x in (preprocessing.mean, preprocessing.std))
    return (1.0 / (255.0 * std)).astype(np.float32), (mean / std).astype(np.float32)


def _trunk(model: Mapping[str, Any], outputs: str, layer: int | None) -> dict[str, Any]:
    """The model without what an output does not need."""
    if outputs not in DENSE:
        if layer is not None:
            raise UserError(f"layer {layer} goes with tokens and grid, not with {outputs}")
        return {**model, "num_classes": 0} if outputs == "features" else dict(model)
    check_dense(models.describe(model), [] if layer is None else [layer])
    trunk = {**model, "num_classes": 0, "representation_size": 0}
    if trunk.get("classifier") == "map":
        trunk["classifier"] = "gap"
    return trunk if layer is None else {**trunk, "num_layers": layer}


def tokens_of(
    module: Any,
    params: Any,
    images: jax.Array,
    layer: int | None = None,
    on_grid: bool = False,
) -> jax.Array:
    """The tokens of `models.dense.dense_features` after a layer, or else at the end."""
    _, tokens, layers = dense_features(module, params, images, [] if layer is None else [layer])
    tokens = layers[0] if layers else tokens
    if not on_grid:
        return tokens
    patches = tokens[:, module.config.num_prefix_tokens :]
    grid = whole_patches(module.config, *images.shape[1:3])
    return patches.reshape(-1, *grid, tokens.shape[-1])
