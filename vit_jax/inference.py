"""A model ready for use: `vit_jax.load("ViT-B_16-224").predict("photo.jpg")`."""

import dataclasses
import functools
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.data.image_files import find_images, read_batches, read_view
from vit_jax.data.images import check_channels, convert, preprocess
from vit_jax.data.protocols import Preprocessing
from vit_jax.dense_features import DenseFeatures, Extractor
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import one_ahead
from vit_jax.evaluation.ranking import TOP_K, top
from vit_jax.image_size import ImageSize, in_words
from vit_jax.models import create_model, model_keys
from vit_jax.printable import printable
from vit_jax.xla_flags import compiler_options

# What the methods of `VisionModel` take.
Images = (
    str
    | os.PathLike[str]
    | Image.Image
    | np.ndarray
    | jax.Array
    | Sequence["str | os.PathLike[str] | Image.Image | np.ndarray"]
)

# Of ViT-B/16 at 384 pixels, the attention weights of all layers of 8 images are 1.5 GB.
_ATTENTION_BATCH_SIZE = 8

_GIVE = (
    "give a path, a PIL image, uint8 pixels [height, width, {2}] or [n, height, width, {2}], a "
    "list of these, or what is preprocessed already as float32 [n, {0}, {1}, {2}]"
)


def load(path: str | os.PathLike[str], *, batch_size: int = 32, **overrides: Any) -> "VisionModel":
    """Loads a model from any format, ready for use.

    >>> vit = vit_jax.load("ViT-B_16-224")
    >>> vit.predict("photo.jpg", topk=1)
    [[{'index': 985, 'label': 'daisy', 'probability': ...}]]

    Args:
        path: a run's workdir, a file or folder of weights in Google's, timm's or Hugging Face's
            format, or a published name (ViT-B_16-224, B_16, hf:OWNER/NAME).
        batch_size: how many images are computed at a time, at most.
        **overrides: `image_size`, `num_heads`, `gelu`, `layer_norm_epsilon`, see
            `vit_jax.checkpoints.pretrained.load_pretrained`.

    Raises:
        UserError: as `load_pretrained`.
    """
    try:
        return VisionModel(load_pretrained(path, **overrides), batch_size)
    except UserError as error:
        raise error from None  # Its line says all; what led to it would be a screen of tracebacks.


class VisionModel:
    """A pretrained model, compiled when it is first used.

    Its methods take images in any of these forms:

    - a path, of an image or of a folder, which stands for the images below it, sorted
    - a PIL image
    - uint8 pixels, [height, width, 3] or [n, height, width, 3], RGB; of a model for images of
      other channels with as many
    - a list of these
    - floats [n, height, width, channels] of the model's image_size, fed to the model as they are

    All but the last are resized, cropped and scaled as the model's evaluation does. Results have a
    row for every image, also where there is one; they are NumPy arrays in float32.

    Attributes:
        pretrained: the weights with all that goes with them.
        batch_size: how many images are computed at a time, at most.
    """

    def __init__(self, pretrained: Pretrained, batch_size: int = 32):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1")
        self.pretrained = pretrained
        self.batch_size = batch_size
        self._extractors: dict[str, Extractor] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The architecture and its sizes, as `vit_jax.create_model` takes them."""
        return self.pretrained.model

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters under their official names, float32."""
        return self.pretrained.params

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of the logits, None if they are not known."""
        return self.pretrained.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of an image in evaluation, before the model."""
        return self.pretrained.preprocessing

    def predict(self, images: Images, topk: int | None = None) -> list[list[dict[str, Any]]]:
        """Returns the most probable classes of every image, see `top`.

        Args:
            images: see the class.
            topk: how many classes; all if there are fewer. None is 5, or of a model that was
                trained on several labels an image all that are more probable than not, which may be
                none.

        Raises:
            UserError: as `logits`.
        """
        if topk is not None and topk < 1:
            raise UserError(f"topk is {topk}: it must be at least 1")
        return [
            predictions(logits, self.class_names, self.pretrained, topk)
            for logits in self.logits(images)
        ]

    def logits(self, images: Images) -> np.ndarray:
        """Returns the logits, [n, num_classes].

        Args:
            images: see the class.

        Raises:
            UserError: an image is none or cannot be read; the model has no head or an untrained
                one, or its logits are not finite.
        """
        self.pretrained.check_head()
        logits = self._map(self._logits, images)
        if not np.isfinite(logits).all():
            raise UserError(f"{self.pretrained.source} gives logits that are not finite: mend it")
        return logits

    def features(self, images: Images) -> np.ndarray:
        """Returns what the head is applied to, [n, features].

        That is the class token or the mean of the patches after the last LayerNorm (Eq. 4), and
        after the hidden layer of a head of pre-training; of a ResNet the pooled feature map.

        Args:
            images: see the class.

        Raises:
            UserError: an image is none or cannot be read.
        """
        return self._map(self._features, images)

    def dense_features(
        self, images: Images, layers: Sequence[int] = (), image_size: ImageSize | None = None
    ) -> DenseFeatures:
        """Computes the features of every patch beside the pooled ones.

        Args:
            images: see the class; floats are of `image_size`.
            layers: numbers of layers, from 1 on, whose results are wanted too.
            image_size: in pixels, a side or "HEIGHTxWIDTH", to which position embeddings are
                interpolated. None: the model's.

        Raises:
            UserError: an image is none or cannot be read, a layer does not exist, or the model is
                a ResNet or for no such size.
        """
        if not isinstance(layers, Iterable):
            raise UserError(f"layers is {layers!r}: give a list of numbers, from 1 on")
        extractor = self._extractor(tuple(layers), image_size)
        batches = self._batches(images, self.batch_size, extractor.preprocessing)
        started = ((extractor(batch), count) for batch, count in batches)
        parts = [(jax.device_get(part), count) for part, count in one_ahead(started)]
        return extractor.collect(*zip(*parts, strict=True))

    def attention(self, images: Images) -> np.ndarray:
        """Returns what the model looks at, [n, height, width], in [0, 1].

        That is attention rollout (Appendix D.8) of the class token, or of the mean of the patches
        where there is none, enlarged to the image that the model saw; each map's maximum is 1
        before it is enlarged. `vit_jax.analysis` has the maps of single heads and layers.

        Args:
            images: see the class.

        Raises:
            UserError: an image is none or cannot be read, or the model has no attention between
                all patches.
        """
        return self._map(self._attention, images, _ATTENTION_BATCH_SIZE)

    def save(self, path: str | os.PathLike[str], format: str = "official") -> None:
        """Writes the model so that `load` and others can read it.

        Args:
            path: a file ending in .npz (official, timm) or .safetensors (timm, torchvision), or a
                folder to be made (timm, huggingface). It must not exist.
            format: "official" (Google's), "timm", "torchvision" or "huggingface".

        Raises:
            UserError: as `vit_jax.checkpoints.save.save_pretrained`.
        """
        from vit_jax.checkpoints.save import FORMATS, save_pretrained

        if format not in FORMATS:
            raise UserError(f"format {format!r} is unknown: use {', '.join(FORMATS)}")
        save_pretrained(self.pretrained, path, format)

    def __repr__(self) -> str:
        config, size = self.config, self.preprocessing.image_size
        count = sum(x.size for x in jax.tree.leaves(self.params))
        shape = ", ".join(
            f"{key}={config[key]}"
            for key in ("patch_size", "num_layers", "hidden_size", "num_heads", "num_classes")
            if key in config
        )
        return (
            f"<VisionModel {printable(self.pretrained.source)}: {config['architecture']}, {shape}, "
            f"{count / 1e6:.1f}M parameters, images of {in_words(size)}>"
        )

    # What runs on the device: a method is compiled for few shapes, the parameters sent once.

    @functools.cached_property
    def _device_params(self) -> Any:
        return jax.device_put(self.pretrained.params)

    @functools.cached_property
    def _logits(self) -> Any:
        # Compiling one layer instead of all takes half the time, which one image waits for.
        scan = {"scan_layers"} & model_keys(self.config["architecture"])
        return self._compile(create_model(self.config, **dict.fromkeys(scan, True)))

    @functools.cached_property
    def _features(self) -> Any:
        return self._compile(create_model(self.config, num_classes=0))

    @functools.cached_property
    def _attention(self) -> Any:
        from vit_jax.analysis.attention import on_patches, rollout, to_mask
        from vit_jax.analysis.intermediates import attention_weights

        model = create_model(self.config)

        def apply(params: Any, images: jax.Array) -> jax.Array:
            weights = attention_weights(model, params, images)
            height, width = images.shape[1:3]
            grid = height // model.downsampling, width // model.downsampling
            return to_mask(on_patches(rollout(weights), grid), (height, width))

        return jax.jit(apply)

    def _extractor(self, layers: tuple[int, ...], image_size: ImageSize | None) -> Extractor:
        key = repr((layers, image_size))
        if key not in self._extractors:
            on_device = dataclasses.replace(self.pretrained, params=self._device_params)
            extractor = Extractor(on_device, layers, image_size)
            if not extractor.is_own_size:  # It has parameters of its own.
                kept = {k: x for k, x in self._extractors.items() if x.is_own_size}
                self._extractors = kept
            self._extractors[key] = extractor
        return self._extractors[key]

    @staticmethod
    def _compile(model: Any) -> Any:
        def apply(params: Any, images: jax.Array) -> Any:
            return model.apply({"params": params}, images)

        return jax.jit(apply, compiler_options=compiler_options(jax.default_backend()))

    def _map(self, function: Any, images: Images, limit: int | None = None) -> np.ndarray:
        batch_size = self.batch_size if limit is None else min(self.batch_size, limit)
        started = (
            (function(self._device_params, batch), count)
            for batch, count in self._batches(images, batch_size)
        )
        return np.concatenate([np.asarray(rows)[:count] for rows, count in one_ahead(started)])

    def _batches(
        self, images: Images, batch_size: int, preprocessing: Preprocessing | None = None
    ) -> Generator[tuple[np.ndarray, int]]:
        """Yields preprocessed batches of few shapes, and how many of their rows are images."""
        preprocessing = preprocessing or self.preprocessing
        given = self._list(images, preprocessing)
        count = len(given)
        if not count:
            raise UserError(f"there are no images: {self._give}")
        # Of few images, the next power of two: 5 and then 7 are compiled once.
        size = min(batch_size, 1 << (count - 1).bit_length())
        paths = [image for image in given if isinstance(image, str)]
        if len(paths) == count:
            for files, batch in read_batches(paths, preprocessing, size, _raise):
                yield _pad(batch, size), len(files)
            return
        for begin in range(0, count, size):
            part = given[begin : begin + size]
            if isinstance(part, list):
                part = np.stack([_view(image, preprocessing) for image in part])
            yield _pad(part, size), len(part)

    def _list(
        self, images: Images, preprocessing: Preprocessing
    ) -> "list[str | np.ndarray] | np.ndarray":
        """Files and pixels of single images; or all of them, preprocessed, as one array."""
        if isinstance(images, jax.Array):
            images = np.asarray(images)
        if isinstance(images, np.ndarray):
            if np.issubdtype(images.dtype, np.floating):
                return _check_preprocessed(images, preprocessing)
            return list(self._check_pixels(images, (3, 4)).reshape(-1, *images.shape[-3:]))
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        if not isinstance(images, Iterable):
            raise UserError(f"images are of type {type(images).__name__}: {self._give}")
        found: list[str | np.ndarray] = []
        for image in images:
            if isinstance(image, str | os.PathLike):
                found += find_images([os.fspath(image)], preprocessing.channels)
            elif isinstance(image, Image.Image):
                found.append(_pixels_of(image, self.preprocessing.channels))
            else:
                found.append(self._check_pixels(image, (3,)))
        return found

    def _check_pixels(self, image: Any, dimensions: tuple[int, ...]) -> np.ndarray:
        if not isinstance(image, np.ndarray | jax.Array):
            raise UserError(f"an image is of type {type(image).__name__}: {self._give}")
        channels = self.preprocessing.channels
        if image.dtype != np.uint8 or image.ndim not in dimensions or image.shape[-1] != channels:
            raise UserError(f"an image is {image.dtype} {list(image.shape)}: {self._give}")
        if 0 in image.shape[-3:]:
            raise UserError(f"an image of {list(image.shape)} has no pixels: {self._give}")
        return np.asarray(image)

    @property
    def _give(self) -> str:
        return _GIVE.format(*self.preprocessing.image_shape)


def predictions(
    logits: np.ndarray, class_names: Sequence[str] | None, pretrained: Pretrained, topk: int | None
) -> list[dict[str, Any]]:
    """The classes of one image, the most probable one first.

    Args:
        logits: [num_classes].
        class_names: as in `top`.
        pretrained: the model.
        topk: as in `VisionModel.predict`.

    Returns:
        As `top`.
    """
    if topk is None and pretrained.multi_label:
        every = top(logits, class_names, pretrained.loss, len(logits))
        return [each for each in every if each["probability"] > 0.5]
    return top(logits, class_names, pretrained.loss, topk or TOP_K)


def _view(image: "str | np.ndarray", preprocessing: Preprocessing) -> np.ndarray:
    if isinstance(image, str):
        return read_view(image, preprocessing)
    return preprocess(image, preprocessing)


def _check_preprocessed(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    give = _GIVE.format(*preprocessing.image_shape)
    if images.ndim != 4 or images.shape[1:] != preprocessing.image_shape:
        raise UserError(f"images are {images.dtype} {list(images.shape)}: {give}")
    mean, std = (np.array(x) for x in (preprocessing.mean, preprocessing.std))
    lowest, highest = (-mean / std).min(), ((1 - mean) / std).max()
    # Kernels of resizing overshoot by less than this, not scaled pixels by far more.
    slack = 0.25 * (highest - lowest)
    if images.size and not (lowest - slack <= images.min() and images.max() <= highest + slack):
        raise UserError(
            f"images have values from {images.min():g} to {images.max():g}, preprocessed ones "
            f"from {lowest:.3g} to {highest:.3g}: {give}"
        )
    return images.astype(np.float32, copy=False)


def _raise(error: UserError) -> None:
    raise error


def _pad(batch: np.ndarray, size: int) -> np.ndarray:
    if len(batch) == size:
        return batch
    return np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])


def _pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        raise UserError(
            f"a PIL image has mode {image.mode}, whose range is unknown: give its path, or convert "
            "it to RGB"
        )
    check_channels(image, "a PIL image", channels)
    try:
        return convert(ImageOps.exif_transpose(image), channels)
    except ValueError as error:  # PIL makes no gray of LAB, and nothing of La.
        raise UserError(f"a PIL image has mode {image.mode}: convert it to RGB") from error
