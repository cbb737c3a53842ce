"""Weights with all that must travel with them, from any format: see `load_pretrained`."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import lora, models
from vit_jax.checkpoints import (
    foreign_configs,
    infer,
    interpolation,
    layouts,
    remote,
    torch_names,
)
from vit_jax.checkpoints.arrays import read_arrays, read_sharded
from vit_jax.checkpoints.decoder import Decoder, split_decoder
from vit_jax.checkpoints.detector import Detector, split_detector
from vit_jax.checkpoints.formats import checks
from vit_jax.checkpoints.layouts import Arrays
from vit_jax.checkpoints.model_info import ModelInfo, info_from_run
from vit_jax.checkpoints.transfer import check_fit, transfer
from vit_jax.data import imagenet
from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.errors import UserError, first_line, shortlist
from vit_jax.image_size import ImageSize, sides
from vit_jax.models import masked
from vit_jax.models.base import Grid, Model
from vit_jax.models.vit import DISTILLATION_HEAD, POSITIONS, num_class_tokens
from vit_jax.printable import printable

_ACCEPTED = (
    "a run's workdir or a checkpoint in it; a file of weights (.npz, .safetensors, .pth) under "
    "Google's or timm's names; a folder of Hugging Face's or timm's; or a name such as ViT-B_16 or "
    "hf:OWNER/NAME"
)


_EXPORTED = (".onnx", ".engine", ".plan")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model: its weights, and what must be known to use them rightly.

    Attributes:
        params: nested dicts of float32 NumPy arrays, in the official tree.
        model: for `models.create_model`: the architecture, its sizes, `num_classes`, and the GELU
            and LayerNorm epsilon that the weights were trained with.
        preprocessing: what evaluation makes of an image.
        class_names: one per class in the order of the logits, None if nobody knows them.
        loss: "softmax" or "sigmoid", for which the logits were trained.
        source: the file or directory that was read.
        masked: the parameters of a run of masked patch prediction that are not the trunk's: its
            head and mask embedding, which only more such training reads.
        segmentation: of a run of segmentation its decoder; `params` and `model` are of the trunk,
            which has no head then.
        detection: of a run of detection its head, likewise.
        multi_label: whether it predicts any number of classes of an image; its loss is "sigmoid".
    """

    params: dict[str, Any]
    model: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    loss: str
    source: str
    masked: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    multi_label: bool = False
    segmentation: Decoder | None = dataclasses.field(default=None, repr=False, compare=False)
    detection: Detector | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def has_untrained_head(self) -> bool:
        """Tells whether every head is as initialized here: all classes are equally probable."""
        flat = flatten_dict(self.params, sep="/")
        names = (models.family_of(self.model["architecture"]).head, DISTILLATION_HEAD)
        heads = [name for name in names if f"{name}/kernel" in flat]
        return bool(heads) and all(
            not flat[f"{name}/kernel"].any() and np.ptp(flat[f"{name}/bias"]) == 0 for name in heads
        )

    def check_head(self) -> None:
        """Raises a UserError if there is no head that knows classes, with the way out."""
        if self.segmentation is not None:
            raise UserError(
                f"{self.source} predicts the classes of pixels, none of whole images: use vit-jax "
                "segment, evaluate, or export --outputs pixels"
            )
        if self.detection is not None:
            raise UserError(
                f"{self.source} predicts the classes of objects, none of whole images: use vit-jax "
                "detect or evaluate"
            )
        if not self.model["num_classes"]:
            raise UserError(f"{self.source} has no head, so it knows no classes: fine-tune it")
        if self.has_untrained_head:
            raise UserError(
                f"{self.source} has a head of zeros, as before training, so it tells no class from "
                "another: fine-tune it"
            )


def check_exists(path: str) -> None:
    """Raises a UserError if a path of weights is neither there nor a published name."""
    if not remote.is_remote_name(path) and not os.path.exists(path):
        raise UserError(f"{path} does not exist: give {_ACCEPTED}")


def load_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Pretrained:
    """Reads a model from any format, which is recognized from what is there.

    The architecture is read off the shapes. What shapes cannot tell comes from the configuration
    beside the weights: a run's, Hugging Face's, timm's, or the info file that `vit_jax.convert`
    writes. Without one the format's conventions stand: Google's weights have the tanh form of GELU,
    timm's and Hugging Face's the exact one, the heads are those of the paper's model of this size,
    and 1,000 classes are ImageNet's, named by their WordNet ids.

    Args:
        path: a run's workdir or its `checkpoints` or `best` directory, of which the newest step is
            read, or one step (of a run that averaged its parameters, the average is read); a file;
            a folder of Hugging Face's or timm's; or a published name, see `checkpoints.remote`.
        **overrides: `num_heads`, `gelu` or `layer_norm_epsilon`, where what is read lacks them or
            is wrong; `image_size`, to which position embeddings are interpolated. None is no
            override.

    Raises:
        UserError: the path is none of these; the weights are damaged, not finite, of no ViT, or do
            not fit together; something can be neither read nor inferred, and is asked for by name.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    image_size = overrides.pop("image_size", None)
    name = os.fspath(path)
    check_exists(name)
    if name.endswith(_EXPORTED):
        raise UserError(
            f"{name} is an exported model, not weights: run it by vit_jax.export.runtime, or give "
            f"{_ACCEPTED}"
        )
    path = Path(remote.fetch(name) if remote.is_remote_name(name) else name)
    try:
        if path.is_dir() and _find_weights(path) is None:
            path = _find_step(path)
            arrays, info = _read_step(path)
        else:
            arrays, info = _read_weights(path, overrides)
        pretrained = _assemble(arrays, info, overrides, str(path))
        if image_size is not None and image_size != pretrained.preprocessing.image_size:
            pretrained = resize(pretrained, image_size)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from error
    return pretrained


def resize(pretrained: Pretrained, image_size: ImageSize) -> Pretrained:
    """Returns the model for another image size: position embeddings are interpolated (Sec. 3.2)."""
    module = models.create_model(pretrained.model)
    old = pretrained.preprocessing
    preprocessing = dataclasses.replace(old, image_size=image_size)
    params = fit_params(
        module, image_size, pretrained.params, old_size=old.image_size, keep_head=True
    )
    return dataclasses.replace(pretrained, params=params, preprocessing=preprocessing)


def fit_params(
    module: Model,
    image_size: ImageSize,
    params: dict[str, Any],
    *,
    old_size: ImageSize,
    keep_head: bool = False,
) -> dict[str, Any]:
    """Fits pretrained parameters to a model, without initializing it; what is new is zero.

    Args:
        module: of the model.
        image_size: of the images that the model is for.
        params: nested dicts of arrays.
        old_size: of the images that these are for.
        keep_head: as in `transfer`.

    Raises:
        UserError: parameters are missing, misshapen or left over; it lists them.
    """
    channels = type(module.config).channels(flatten_dict(params, sep="/"))
    shapes = _param_shapes(module, image_size, channels)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    grids = {"pretrained_grid": grid_of(module, old_size), "grid": grid_of(module, image_size)}
    fitted, _ = transfer(zeros, params, keep_head=keep_head, **grids)
    return fitted


def grid_of(module: Model, image_size: ImageSize) -> Grid:
    """The rows and columns of patches, or of positions of the features, of an image."""
    height, width = sides(image_size)
    return height // module.downsampling, width // module.downsampling


def fold_normalization(pretrained: Pretrained) -> dict[str, Any]:
    """Returns the parameters of the same model for images in [-1, 1], as training here feeds them.

    Weights made for other channel means and standard deviations get the difference put into their
    patch embedding, which is linear: E (x - mean) / std + b = E' (2x - 1) + b'.

    Raises:
        UserError: the model is a hybrid or a ResNet with such statistics: its root is normalized.
    """
    preprocessing = pretrained.preprocessing
    mean, std = (np.asarray(x, np.float64) for x in (preprocessing.mean, preprocessing.std))
    if np.all(mean == 0.5) and np.all(std == 0.5):
        return pretrained.params
    if not models.family_of(pretrained.model["architecture"]).embeds_pixels:
        raise UserError(
            f"{pretrained.source} was trained on images of mean {preprocessing.mean} and standard "
            f"deviation {preprocessing.std}: only a ViT without a ResNet goes on from these, "
            "others from images in [-1, 1]"
        )
    embedding = pretrained.params["embedding"]
    kernel, bias = (np.asarray(embedding[x], np.float64) for x in ("kernel", "bias"))
    # x = (y + 1) / 2, so (x - mean) / std = y / (2 std) + (1/2 - mean) / std.
    embedding = {
        "kernel": np.float32(kernel / (2 * std)[:, None]),
        "bias": np.float32(bias + np.einsum("hwio,i->o", kernel, (0.5 - mean) / std)),
    }
    return {**pretrained.params, "embedding": embedding}


def abstract_params(
    model: dict[str, Any], image_size: ImageSize, channels: int = 3
) -> dict[str, Any]:
    """Returns the parameter tree of a model for images of a size, as shapes and dtypes."""
    # Traced once for all layers, whose parameters have the same names and shapes then.
    scan = {"scan_layers"} & models.model_keys(model["architecture"])
    module = models.create_model(model, **dict.fromkeys(scan, True))
    return _param_shapes(module, image_size, channels)


def _param_shapes(module: nn.Module, image_size: ImageSize, channels: int) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, *sides(image_size), channels), np.float32)
    key = jax.ShapeDtypeStruct((2,), np.uint32)  # A real key would be computed.
    return jax.eval_shape(module.init, key, images)["params"]


def _find_step(path: Path) -> Path:
    """Returns the checkpoint that a path names: itself, or the newest of a run."""
    # Orbax takes a second to import.
    from vit_jax.checkpoints.training import saved_steps

    if (path / "metadata").is_dir() and (path / "state").is_dir():
        return path
    for directory in (path, path / "checkpoints"):
        if steps := saved_steps(directory):
            return directory / str(steps[0])
    raise UserError(f"{path} holds no checkpoint: give {_ACCEPTED}")


def _read_step(step_dir: Path) -> tuple[Arrays, ModelInfo]:
    """Returns the parameters of a run's checkpoint, and what is known of them.

    It may be a stranger's: a checksum in it only tells that it is as it was written.
    """
    from vit_jax.checkpoints import integrity

    try:
        _check_document_size(step_dir)
        document = integrity.read_document(step_dir)
        is_averaged = any(name.startswith("ema_params/") for name in document["arrays"])
        field = "ema_params" if is_averaged else "params"
        _check_state_size(step_dir, field)
        params = _merged(integrity.read_subtree(step_dir, field), document["metadata"])
        info = info_from_run(document["metadata"])
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Beside a DamagedError, what entries of another type lead to.
        reason = printable(first_line(error)) or type(error).__name__
        raise UserError(
            f"checkpoint {step_dir} is damaged: {reason}; name another step of the run"
        ) from error
    arrays = flatten_dict(params, sep="/")
    if bad := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
        raise UserError(
            f"{step_dir} has NaN or infinite values in {checks.printable_shortlist(bad)}"
        )
    return arrays, info


def _merged(params: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the model itself, of a run that adapted them by LoRA too."""
    if lora.ADAPTERS not in params:
        return params
    return lora.merge(params, metadata["config"]["lora"]["alpha"])


def _check_document_size(step_dir: Path) -> None:
    path = step_dir / "metadata" / "metadata"
    if path.is_file() and path.stat().st_size > _MAX_DOCUMENT:
        raise UserError(f"{path} has more than {_MAX_DOCUMENT >> 20} MiB: name another checkpoint")


def _check_state_size(step_dir: Path, field: str) -> None:
    """Checks before any is read that the files of a checkpoint can back the arrays of a field.

    Those of which nothing is stored would be filled with zeros, of any shape.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    state = epath.Path((step_dir / "state").absolute())
    try:
        described = ocp.PyTreeCheckpointHandler().metadata(state)
    except Exception as error:  # orbax and tensorstore have no class for what is unreadable
        raise ValueError(f"its arrays cannot be read: {first_line(error)}") from error
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(described.tree[field])]
    if len(shapes) > checks.MAX_ARRAYS:
        raise UserError(
            f"{step_dir} holds {len(shapes)} parameters: at most {checks.MAX_ARRAYS} are read"
        )
    size = sum(path.stat().st_size for path in step_dir.rglob("*") if path.is_file())
    checks.check_total(step_dir, size, sum(8 * math.prod(shape) for shape in shapes))


# The shapes, types and fingerprints of all arrays, the config and the names of classes.
_MAX_DOCUMENT = 16 << 20

# A folder's weights under official names, with its info file, as `save.write_official` writes it.
OFFICIAL = "model.npz"

# The first of these in a folder is read, the safe formats first.
_WEIGHTS = tuple(
    name + suffix
    for name in ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
    for suffix in ("", ".index.json")
) + (OFFICIAL,)


def _find_weights(folder: Path) -> Path | None:
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def _read_weights(path: Path, overrides: dict[str, Any]) -> tuple[Arrays, ModelInfo]:
    """Returns the arrays of a file or folder under official names, and what is known of them."""
    weights = _find_weights(path) or path
    arrays = read_sharded(weights) if weights.suffix == ".json" else read_arrays(weights)
    arrays, format = _detect_format(weights, arrays)
    # PyTorch's formats do not tell the heads: one is as good as any to learn the other sizes.
    official = layouts.to_official(arrays, format, num_heads=1)
    sizes = infer.infer_model(official)
    image_size: ImageSize = 0  # Of the official format the info file alone may tell it.
    if format != "official":
        image_size = models.describe(sizes).image_size(official)
    channels = models.family_of(sizes["architecture"]).channels(official)
    info = foreign_configs.read_info(path, format, {**sizes, "channels": channels}, image_size)
    if info.class_names is None and sizes["num_classes"] == 1000:
        info = dataclasses.replace(info, class_names=tuple(imagenet.classes()))
    if format == "official":
        if layouts.has_fixed_positions(arrays):
            model = {"position_embedding": "sincos2d", **info.model}
            info = dataclasses.replace(info, model=model)
        return official, info
    num_heads = {**info.model, **overrides}.get("num_heads")
    if num_heads is None:
        keys = ("hidden_size", "num_layers", "mlp_dim")
        num_heads = infer.usual_num_heads(**{key: sizes[key] for key in keys})
    official = layouts.to_official(arrays, format, num_heads, _patches(info, sizes))
    if format == "huggingface" and info.preprocessing is not None and sizes.get("layer_scale"):
        official = _fitted_to_view(official, info.preprocessing.image_size, sizes, image_size)
    return official, info


def _patches(info: ModelInfo, model: dict[str, Any]) -> int | None:
    """The number of patches of an image that is known to be no square, None of any other."""
    if info.preprocessing is None or isinstance(info.preprocessing.image_size, int):
        return None
    return math.prod(grid_of(models.create_model(model), info.preprocessing.image_size))


def _fitted_to_view(
    arrays: Arrays, wanted: ImageSize, model: dict[str, Any], image_size: ImageSize
) -> Arrays:
    """Fits DINOv2's position embeddings to the smaller images that its folder shows it."""
    height, width = sides(wanted)
    patch, square = model["patch_size"], max(sides(image_size))
    if max(height, width) > square or wanted == image_size or height % patch or width % patch:
        return arrays
    fitted = interpolation.interpolate(
        arrays[POSITIONS],
        num_class_tokens(arrays),
        (height // patch, width // patch),
        antialias=bool(model["num_registers"]),  # As Transformers' two models do.
    )
    return {**arrays, POSITIONS: fitted}


def _detect_format(path: Path, arrays: Arrays) -> tuple[Arrays, str]:
    """Returns the arrays without what a model may be wrapped in, and their format."""
    arrays = torch_names.without_text(arrays)
    other_model = torch_names.other_model(arrays)
    if other_model is not None:
        raise UserError(
            f"{path} is of {other_model}, not part of a ViT that is read, for example "
            "hf:google/vit-base-patch16-224"
        )
    arrays = torch_names.unwrap(arrays)
    if torch_names.are_torchvisions(arrays):
        return torch_names.to_timm(arrays), "torchvision"
    arrays = torch_names.to_timm(arrays)
    format = layouts.detect_format(arrays)
    if format is None:
        names = shortlist(sorted(arrays), 2)
        raise UserError(f"{path} has no ViT's parameter names ({names}): give {_ACCEPTED}")
    return arrays, format


def _assemble(
    arrays: Arrays, info: ModelInfo, overrides: dict[str, Any], source: str
) -> Pretrained:
    """Makes a model of arrays, checking that they are one whole model."""
    arrays, info, decoder = split_decoder(arrays, info)
    arrays, info, detector = split_detector(arrays, info)
    model = _complete_model(info.model, overrides, infer.infer_model(arrays))
    channels = models.family_of(model["architecture"]).channels(arrays)
    preprocessing = info.preprocessing or _default_preprocessing(arrays, model)
    preprocessing = preprocessing.with_channels(channels)
    params = unflatten_dict(arrays, sep="/")
    of_masked = {name: params.pop(name) for name in masked.PARAMETERS if name in params}
    check_fit(abstract_params(model, preprocessing.image_size, channels), params)
    names = info.class_names
    if names is not None and len(names) != model["num_classes"]:
        raise UserError(
            f"{len(names)} class names for {model['num_classes']} classes: give one for each"
        )
    loss = info.loss or "softmax"
    if info.multi_label and loss != "sigmoid":
        raise UserError(f"multi_label is true and loss {loss!r}: several labels want the sigmoid")
    return Pretrained(
        params,
        model,
        preprocessing,
        names,
        loss,
        source,
        of_masked,
        info.multi_label,
        decoder,
        detector,
    )


def _complete_model(
    described: dict[str, Any], overrides: dict[str, Any], sizes: dict[str, Any]
) -> dict[str, Any]:
    """Joins what a configuration describes, what overrides it and what shapes tell of a model."""
    if other := sorted(overrides.keys() - models.model_keys(sizes["architecture"])):
        raise UserError(f"a model of the architecture {sizes['architecture']} has no {other[0]}")
    described = {**described, **overrides}
    described = {key: x for key, x in described.items() if x is not None}
    if not described.get("num_classes"):  # In a run's config 0 stands for those of the data set.
        described["num_classes"] = sizes["num_classes"]
    for key in sizes.keys() & described.keys():
        is_same = sizes[key] == described[key]
        if not (is_same or (key == "layer_scale" and sizes[key] and described[key])):
            raise UserError(
                f"{key} is {described[key]} by what is said of it, {sizes[key]} by its shapes"
            )
    if sizes.get("layer_scale"):  # Shapes tell that there are scales, not what they began with.
        sizes = {**sizes, "layer_scale": described.get("layer_scale") or sizes["layer_scale"]}
    model = {**models.prediction_defaults(sizes["architecture"]), **described, **sizes}
    for key in ("layer_norm_epsilon", "group_norm_epsilon"):
        if not 0 < model.get(key, 1e-6) < 1:
            raise UserError(f"{key} {model[key]} is not between 0 and 1")
    return model


def _default_preprocessing(arrays: Arrays, model: dict[str, Any]) -> Preprocessing:
    """Returns how the code that trained a model evaluates, where nothing beside it tells."""
    has_positions = model.get("position_embedding") not in ("none", "sincos2d")
    image_size = models.describe(model).image_size(arrays)
    if not image_size:
        raise UserError(
            f"{POSITIONS} has {arrays[POSITIONS].shape[1]} tokens, which are no square of patches: "
            'write the size of the images to a file beside the weights, {"preprocessing": '
            '{"image_size": "HEIGHTxWIDTH"}}, see vit_jax.checkpoints.model_info'
        )
    # A hidden layer before the head is pre-training's, which evaluates on a central crop.
    # So does the code that computes positions, of "Better plain ViT baselines".
    is_pretraining = model.get("representation_size") or not has_positions
    return evaluation("big_vision" if is_pretraining else "inception", image_size)
