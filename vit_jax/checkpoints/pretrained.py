"""Weights with all that must travel with them, from any format: see `load_pretrained`."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.checkpoints import foreign_configs, infer, layouts, remote
from vit_jax.checkpoints.arrays import read_arrays, read_sharded
from vit_jax.checkpoints.layouts import Arrays
from vit_jax.checkpoints.model_info import ModelInfo, of_run, read_sidecar, sidecar
from vit_jax.checkpoints.transfer import check_fit, transfer
from vit_jax.data import imagenet
from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.errors import UserError, shortlist
from vit_jax.models import masked

_ACCEPTED = (
    "a run's workdir or a checkpoint in it; a file of weights (.npz, .safetensors, .pth) under "
    "Google's or timm's names; a folder of Hugging Face's or timm's; or a name such as ViT-B_16 or "
    "hf:OWNER/NAME"
)


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
    """

    params: dict[str, Any]
    model: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    loss: str
    source: str
    masked: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def has_untrained_head(self) -> bool:
        """Whether the head is as every one begins here: all classes are as probable."""
        flat = flatten_dict(self.params, sep="/")
        head = models.family_of(self.model["architecture"]).head
        if f"{head}/kernel" not in flat:
            return False
        return bool(not flat[f"{head}/kernel"].any() and np.ptp(flat[f"{head}/bias"]) == 0)

    def check_head(self) -> None:
        """Raises a UserError if there is no head that knows classes, with the way out."""
        if not self.model["num_classes"]:
            raise UserError(f"{self.source} has no head, so it knows no classes: fine-tune it")
        if self.has_untrained_head:
            raise UserError(
                f"{self.source} has a head of zeros, as before training, so it tells no class from "
                "another: fine-tune it"
            )


def load_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Pretrained:
    """Reads a model from any format, which is recognized from what is there.

    The architecture is read off the shapes. What shapes cannot tell comes from the configuration
    beside the weights: a run's, Hugging Face's, timm's, or the JSON file that `vit_jax.convert`
    writes. Without one the format's conventions stand: Google's weights have the tanh form of GELU,
    timm's and Hugging Face's the exact one, the heads are those of the paper's model of this size,
    and 1,000 classes are ImageNet's, named by their WordNet ids.

    Args:
        path: a run's workdir or its `checkpoints` or `best` directory, of which the newest step is
            read, or one step (of a run that averaged its parameters, the average is read); a file;
            a folder of Hugging Face's or timm's; or a published name, see `checkpoints.remote`.
        **overrides: `num_heads`, `gelu` or `layer_norm_epsilon`, where what is read is silent or
            wrong; `image_size`, to which position embeddings are interpolated. None is no override.

    Raises:
        UserError: the path is none of these; the weights are damaged, not finite, of no ViT, or do
            not fit together; something can be neither read nor inferred, and is asked for by name.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    image_size = overrides.pop("image_size", None)
    name = os.fspath(path)
    path = Path(remote.fetch(name) if remote.is_remote_name(name) else name)
    if not path.exists():
        raise UserError(f"{path} does not exist: give {_ACCEPTED}")
    try:
        if path.is_dir() and _weights_of(path) == path:
            path, arrays, known = _read_run(path)
        else:
            arrays, known = _read_weights(path, overrides)
            if known.class_names is None and infer.infer_model(arrays)["num_classes"] == 1000:
                known = dataclasses.replace(known, class_names=tuple(imagenet.classes()))
        pretrained = _assemble(arrays, known, overrides, str(path))
        if image_size is not None and image_size != pretrained.preprocessing.image_size:
            pretrained = resize(pretrained, image_size)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from error
    return pretrained


def resize(pretrained: Pretrained, image_size: int) -> Pretrained:
    """The model for square images of another size: position embeddings are interpolated (3.2)."""
    fresh = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), abstract_params(pretrained.model, image_size)
    )
    params, _ = transfer(fresh, pretrained.params, keep_head=True)
    preprocessing = dataclasses.replace(pretrained.preprocessing, image_size=image_size)
    return dataclasses.replace(pretrained, params=params, preprocessing=preprocessing)


def fold_normalization(pretrained: Pretrained) -> dict[str, Any]:
    """The parameters of the same model for images in [-1, 1], as training here feeds them.

    Weights made for other channel means and standard deviations get the difference put into their
    patch embedding, which is linear: E (x - mean) / std + b = E' (2x - 1) + b'.

    Raises:
        UserError: the model is a hybrid or a ResNet with such statistics: its root is normalized.
    """
    preprocessing = pretrained.preprocessing
    mean, std = np.float64(preprocessing.mean), np.float64(preprocessing.std)
    if np.all(mean == 0.5) and np.all(std == 0.5):
        return pretrained.params
    if not models.family_of(pretrained.model["architecture"]).embeds_pixels:
        raise UserError(
            f"{pretrained.source} was trained on images of mean {preprocessing.mean} and standard "
            f"deviation {preprocessing.std}: only a ViT without a ResNet goes on from these, "
            "others from images in [-1, 1]"
        )
    kernel, bias = (np.float64(pretrained.params["embedding"][x]) for x in ("kernel", "bias"))
    # x = (y + 1) / 2, so (x - mean) / std = y / (2 std) + (1/2 - mean) / std.
    embedding = {
        "kernel": np.float32(kernel / (2 * std)[:, None]),
        "bias": np.float32(bias + np.einsum("hwio,i->o", kernel, (0.5 - mean) / std)),
    }
    return {**pretrained.params, "embedding": embedding}


def abstract_params(model: dict[str, Any], image_size: int) -> dict[str, Any]:
    """The parameter tree of a model for square images, as shapes and dtypes."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    module = models.create_model(model)
    key = jax.ShapeDtypeStruct((2,), np.uint32)  # A real key would be computed.
    return jax.eval_shape(module.init, key, images)["params"]


def _assemble(
    arrays: Arrays, known: ModelInfo, overrides: dict[str, Any], source: str
) -> Pretrained:
    """Checks that the arrays are one whole model."""
    sizes = infer.infer_model(arrays)
    if other := sorted(overrides.keys() - models.model_keys(sizes["architecture"])):
        raise UserError(f"a model of the architecture {sizes['architecture']} has no {other[0]}")
    told = {**known.model, **overrides}
    told = {key: x for key, x in told.items() if x is not None}
    if not told.get("num_classes"):  # In a run's config 0 stands for those of the data set.
        told["num_classes"] = sizes["num_classes"]
    for key in sizes.keys() & told.keys():
        if sizes[key] != told[key]:
            raise UserError(
                f"{key} is {told[key]} by what is said of it, {sizes[key]} by its shapes"
            )
    model = {**models.prediction_defaults(sizes["architecture"]), **told, **sizes}
    for key in ("layer_norm_epsilon", "group_norm_epsilon"):
        if not 0 < model.get(key, 1e-6) < 1:
            raise UserError(f"{key} {model[key]} is not between 0 and 1")
    preprocessing = known.preprocessing
    if preprocessing is None:
        image_size = models.describe(model).image_size(arrays)
        has_positions = model.get("position_embedding") not in ("none", "sincos2d")
        # A hidden layer before the head is pre-training's, which evaluates on a central crop.
        # So does the code that computes positions, of "Better plain ViT baselines".
        is_pretraining = model.get("representation_size") or not has_positions
        protocol = "big_vision" if is_pretraining else "inception"
        preprocessing = evaluation(protocol, image_size)
    params = unflatten_dict(arrays, sep="/")
    of_masked = {name: params.pop(name) for name in masked.PARAMETERS if name in params}
    check_fit(abstract_params(model, preprocessing.image_size), params)
    names = known.class_names
    if names is not None and len(names) != model["num_classes"]:
        raise UserError(
            f"{len(names)} class names for {model['num_classes']} classes: give one for each"
        )
    loss = known.loss or "softmax"
    return Pretrained(params, model, preprocessing, names, loss, source, of_masked)


def _read_weights(path: Path, overrides: dict[str, Any]) -> tuple[Arrays, ModelInfo]:
    """The arrays of a file or folder under official names, and what is known of them."""
    weights = _weights_of(path)
    arrays = read_sharded(weights) if weights.suffix == ".json" else read_arrays(weights)
    arrays, layout = _detect_format(weights, arrays)
    # PyTorch's layouts do not tell the heads: one is as good as any to learn the other sizes.
    official = layouts.to_official(arrays, layout, num_heads=1)
    sizes = infer.infer_model(official)
    # Those of another library tell it; of ours it may be told by the sidecar alone.
    image_size = 0 if layout == "official" else models.describe(sizes).image_size(official)
    known = _known(path, layout, sizes, image_size)
    if layout == "official":
        if layouts.has_fixed_positions(arrays):
            model = {"position_embedding": "sincos2d", **known.model}
            known = dataclasses.replace(known, model=model)
        return official, known
    num_heads = {**known.model, **overrides}.get("num_heads")
    if num_heads is None:
        keys = ("hidden_size", "num_layers", "mlp_dim")
        num_heads = infer.usual_num_heads(**{key: sizes[key] for key in keys})
    return layouts.to_official(arrays, layout, num_heads), known


def _detect_format(path: Path, arrays: Arrays) -> tuple[Arrays, str]:
    """The arrays without what a model may be wrapped in, and their layout."""
    what = layouts.other_model(arrays)
    if what is None:
        arrays = layouts.unwrap(arrays)
        layout = layouts.detect_format(arrays)
        if layout is not None:
            return arrays, layout
        names = shortlist(sorted(arrays), 2)
        raise UserError(f"{path} has no ViT's parameter names ({names}): give {_ACCEPTED}")
    raise UserError(
        f"{path} is of {what}, not part of a plain or hybrid ViT: only those are read, for example "
        "hf:google/vit-base-patch16-224"
    )


def _known(path: Path, layout: str, sizes: dict[str, Any], image_size: int) -> ModelInfo:
    """What is said of weights: by the sidecar of a file, by the files of their folder, by both."""
    folder = foreign_configs.find_folder(path, layout)
    said = foreign_configs.describe(folder, layout, sizes, image_size)
    if folder is None or layout == "official" or (path != folder and sidecar(path).is_file()):
        return read_sidecar(path, said)
    return foreign_configs.reconcile(
        said, read_sidecar(folder, said), folder, layout, sizes, image_size
    )


# The first of these in a folder is read, the safe formats first.
_STEMS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")


def _weights_of(path: Path) -> Path:
    names = [x + suffix for x in _STEMS for suffix in ("", ".index.json")] if path.is_dir() else ()
    return next((path / name for name in names if (path / name).is_file()), path)


def _read_run(path: Path) -> tuple[Path, Arrays, ModelInfo]:
    # Orbax takes a second to import.
    from vit_jax.checkpoints import integrity
    from vit_jax.checkpoints.training import saved_steps

    steps = [path] if (path / "metadata").is_dir() and (path / "state").is_dir() else []
    for directory in (path, path / "checkpoints"):
        steps += [directory / str(step) for step in saved_steps(directory)[:1]]
    if not steps:
        raise UserError(f"{path} holds no checkpoint: give {_ACCEPTED}")
    try:
        document = integrity.read_document(steps[0])
        averaged = any(name.startswith("ema_params/") for name in document["arrays"])
        params = integrity.read_subtree(steps[0], "ema_params" if averaged else "params")
    except integrity.DamagedError as error:
        raise UserError(
            f"checkpoint {steps[0]} is damaged: {error}; name another step of the run"
        ) from error
    arrays = flatten_dict(params, sep="/")
    if bad := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
        raise UserError(f"{steps[0]} has NaN or infinite values in {shortlist(bad)}")
    return steps[0], arrays, of_run(document["metadata"])
