"""Rules for which part of an image a model sees, and how it is resized, without TensorFlow.

A view of an image is a box in source pixels, a float (y, x, height, width), that is resampled once
to `image_size`, a square or a height and a width. A protocol is a rule for that box:

    inception   the published fine-tuning code: inception crop; evaluation on the whole image
    bit         the paper's text (Sec. 4.1, as BiT): resize and random crop; evaluation on the
                whole image
    big_vision  later Google configs, `decode_jpeg_and_inception_crop(224)` and
                `resize_small(256)|central_crop(224)`: inception crop; evaluation as in `RESIZES`
    pretrain    inception crop; evaluation on the central 224/256 of the shorter side
    pad         small images from scratch, as usual on CIFAR (He et al., 2016, Sec. 4.2): a shift by
                up to an eighth of the side, black beyond the edge; evaluation on the whole image
    transfer    big_vision's fine-tuning, `resize_small(448)|random_crop(384)`: the aspect is kept,
                the mean taken over areas; evaluation likewise, on the central 384/448
    transfer_inception
                its other crop: inception crop; evaluation as transfer
    bit_hyperrule
                BiT's fine-tuning: as bit, but that the image is resized to 32 pixels more than the
                crop, 512 for 480 and 160 for 128
    letterbox   as is usual for detection: the whole image as large as it fits in, its aspect kept,
                at the top left of a black view; in training "standard scale jitter" (Ghiasi et al.,
                2021, arXiv 2012.07177): 0.8 to 1.25 times as large, and of what is larger a random
                crop
    letterbox_large
                the same with their "large scale jitter", 0.1 to 2 times, as ViTDet trains

New pre-training runs take big_vision: the accuracies published for pre-training, which a run is
compared with, were measured so. The bilinear kernel of `pretrain` skips pixels of an image that
shrinks and lets fine texture alias, where the mean over areas does not. Earlier runs have pretrain
in their config and keep it.

Evaluation has a rule of resizing of its own, which travels with the weights:

    box          a box of fractions of pixels, sampled once, not rounded; the protocols but one
    big_vision   big_vision's `resize_small` and `central_crop`: means over areas, of whole pixels,
                 cut down to 8 bits
    timm         torchvision's Resize and CenterCrop on PIL's images, which timm evaluates with
    huggingface  Transformers' processors on PIL's images (ViTImageProcessorPil, and the crop of
                 CLIPImageProcessorPil): timm's, but for half a pixel in the place of the crop
    letterbox    the protocol's: PIL's resize, of the whole image, and black beyond it

All but box resize the image to whole pixels in 8 bits and then cut out the center.

Where a view is no square, whole images and inception crops are resized to its height and width: a
crop's aspect ratio stays one of the image, as in timm. What keeps its aspect ratio is resized until
it just covers the view enlarged by 1 / center_crop, of which the center is the view: as timm does
it (`ResizeKeepRatio`), and everybody for squares.
"""

import dataclasses
import math

import numpy as np

from vit_jax.errors import UserError, brief
from vit_jax.image_size import ImageSize, sides, size_problem

PROTOCOLS = (
    ("inception", "bit", "big_vision", "pretrain", "pad")
    + ("transfer", "transfer_inception", "bit_hyperrule", "letterbox", "letterbox_large")
)  # fmt: skip

# How many times as large as it fits in an image is shown in training, at least and at most.
JITTERS = {"letterbox": (0.8, 1.25), "letterbox_large": (0.1, 2.0)}

# BiT, as the paper has it, resizes to 448 and crops 384; so does big_vision's fine-tuning.
_RESIZE = 448 / 384
# Pixels that BiT's hyper-rule resizes to beyond those of the crop.
_HYPERRULE_MARGIN = 32

# libjpeg's inverse transforms: that of PIL, and TensorFlow's default.
JPEG_DCTS = ("accurate", "fast")

# A side in pixels. Before their center is cut out images are resized to a little more than
# `MAX_IMAGE_SIZE`, of which 224/256 is usual.
MAX_RESIZED = 12_000

# Of hyperspectral cameras, twice as many as are usual.
MAX_CHANNELS = 512

RESIZES = ("box", "big_vision", "timm", "huggingface", "letterbox")
INTERPOLATIONS = ("bilinear", "bicubic", "area")

_CENTRAL = 224 / 256
# Of the protocols that evaluate by big_vision's rule, the share of the resized shorter side.
_AREA_CROPS = {"big_vision": _CENTRAL, "transfer": 1 / _RESIZE, "transfer_inception": 1 / _RESIZE}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The rule by which evaluation prepares an image; it travels with the weights.

    Attributes:
        image_size: of the model's input.
        center_crop: None for the whole image, its aspect ratio given up; a fraction f for the
            central square of f times the shorter side, or f times the largest box of the aspect
            ratio of an image_size that is no square.
        interpolation: "bilinear" or "bicubic" (Keys, a = -0.5), or with resize big_vision "area".
        antialias: whether the kernel widens where the image shrinks. PIL's does (timm and Hugging
            Face), that of TensorFlow, with which the official checkpoints were trained, does not.
        mean: of each channel, of pixels in [0, 1]; is subtracted.
        std: of each channel; what remains is divided by it.
        resize: the rule of resizing, one of `RESIZES`; see above.
        squash: with a center_crop f, make the whole image one of the aspect ratio of the input
            first, its own given up, and take the central f x f of that.
        jpeg_dct: "accurate" or "fast", about a gray level from each other.

    Raises:
        UserError: a value is out of its range, or goes with no such rule of resizing.
    """

    image_size: ImageSize
    center_crop: float | None = None
    interpolation: str = "bilinear"
    antialias: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    # Later additions: the defaults are what files written before them mean.
    resize: str = "box"
    squash: bool = False
    jpeg_dct: str = "accurate"

    def __post_init__(self):
        size, crop = self.image_size, self.center_crop
        if problem := size_problem(size):
            raise UserError(f"image_size {problem}")
        if crop is not None and not (_is_number(crop) and 0 < crop <= 1):
            raise UserError(f"center_crop {brief(crop)} is no number above 0 and at most 1")
        longest = max(sides(size))
        if crop is not None and longest / crop > MAX_RESIZED:
            raise UserError(
                f"center_crop {crop} of image_size {size} is cut from {longest / crop:.0f} pixels: "
                f"at most {MAX_RESIZED} are made"
            )
        for name, choices in (
            ("interpolation", INTERPOLATIONS),
            ("resize", RESIZES),
            ("jpeg_dct", JPEG_DCTS),
            ("squash", (False, True)),
            ("antialias", (False, True)),
        ):
            if getattr(self, name) not in choices:
                listed = ", ".join(map(str, choices))
                raise UserError(f"{name} {brief(getattr(self, name))} is none of {listed}")
        self._check_kernel()
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(_is_number(x) and abs(x) <= 1e6 for x in values):
                raise UserError(f"{name} {brief(values)} is not numbers of at most 1e6")
        if len(self.mean) != len(self.std) or not 1 <= len(self.mean) <= MAX_CHANNELS:
            raise UserError(
                f"mean {brief(self.mean)} and std {brief(self.std)} are not a number for each of "
                f"1 to {MAX_CHANNELS} channels"
            )
        if not min(self.std) >= 1e-6:  # An image has 256 levels, of which 1/255 is one.
            raise UserError(f"std {brief(self.std)} is not positive, of at least 1e-6")

    @property
    def channels(self) -> int:
        """The channels of an image."""
        return len(self.mean)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the model's input."""
        return (*sides(self.image_size), self.channels)

    def with_channels(self, channels: int) -> "Preprocessing":
        """Returns the same of images of another number of channels.

        Raises:
            UserError: mean and std are not the same for all channels, or it is no such number.
        """
        if type(channels) is not int or not 1 <= channels <= MAX_CHANNELS:
            raise UserError(
                f"channels is {brief(channels)}: it must be a whole number from 1 to {MAX_CHANNELS}"
            )
        if channels == self.channels:
            return self
        if len(set(self.mean)) > 1 or len(set(self.std)) > 1:
            raise UserError(
                f"mean {brief(self.mean)} and std {brief(self.std)} are of {self.channels} "
                f"channels, and the weights of {channels}: give {channels} numbers of each"
            )
        return dataclasses.replace(self, mean=self.mean[:1] * channels, std=self.std[:1] * channels)

    def to_pixels(self, inputs: np.ndarray) -> np.ndarray:
        """Turns inputs of a model [..., channels] to pixels again, float32 in [0, 1]."""
        mean, std = (np.array(x, np.float32) for x in (self.mean, self.std))
        return np.clip(inputs * std + mean, 0, 1)

    def to_picture(self, inputs: np.ndarray) -> np.ndarray:
        """Turns inputs of a model to what is shown, [..., 3] in [0, 1]: gray, or three channels."""
        pixels = self.to_pixels(inputs)
        return pixels[..., :3] if self.channels >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)

    def _check_kernel(self):
        if (self.interpolation == "area") != (self.resize == "big_vision"):
            raise UserError(
                f"interpolation {self.interpolation!r} does not go with resize {self.resize!r}: "
                "area belongs to big_vision, and no other to it"
            )
        if self.resize != "box" and self.antialias != (self.resize != "big_vision"):
            fixed = str(not self.antialias).lower()
            raise UserError(f"resize {self.resize!r} has antialias {fixed} only: set it so")
        if self.resize == "letterbox" and not (
            self.center_crop is None and self.interpolation == "bilinear"
        ):
            raise UserError(
                "resize 'letterbox' is of whole images and bilinear: set center_crop to null and "
                "interpolation to bilinear"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def evaluation(
    protocol: str, image_size: ImageSize, jpeg_dct: str = "accurate", channels: int = 3
) -> Preprocessing:
    """Returns the preprocessing of a run's evaluation under one of `PROTOCOLS`.

    Raises:
        UserError: the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {brief(protocol)} is none of {', '.join(PROTOCOLS)}")
    view = Preprocessing(image_size, jpeg_dct=jpeg_dct).with_channels(channels)
    if protocol in _AREA_CROPS:
        return dataclasses.replace(
            view, center_crop=_AREA_CROPS[protocol], interpolation="area", resize="big_vision"
        )
    if protocol in JITTERS:
        return dataclasses.replace(view, resize="letterbox", antialias=True)
    return dataclasses.replace(view, center_crop=_CENTRAL) if protocol == "pretrain" else view


def fewshot_view(preprocessing: Preprocessing) -> Preprocessing:
    """Returns the preprocessing of few-shot evaluation, whatever the model's own crop.

    The reference resizes to 256 x 256, whatever the aspect, and cuts out the central 224 x 224; of
    other sizes that is the central 7/8. It resamples as TensorFlow does without antialiasing; a
    model that was made for the images of PIL keeps those.
    """
    if preprocessing.resize == "big_vision":  # There few-shot alone is `resize`, which is bilinear.
        preprocessing = dataclasses.replace(preprocessing, resize="box", interpolation="bilinear")
    elif preprocessing.resize == "letterbox":
        preprocessing = dataclasses.replace(preprocessing, resize="box")
    return dataclasses.replace(preprocessing, center_crop=_CENTRAL, squash=True)


def squashed_sides(protocol: str, image_size: ImageSize) -> tuple[int, int]:
    """Height and width, in pixels, that training crops from under bit or bit_hyperrule."""
    height, width = sides(image_size)
    if protocol == "bit_hyperrule":
        return height + _HYPERRULE_MARGIN, width + _HYPERRULE_MARGIN
    return round(height * _RESIZE), round(width * _RESIZE)


def resized_sides(preprocessing: Preprocessing) -> tuple[int, int]:
    """The height and width that an image is resized to, or covers if its aspect ratio is kept.

    In whole pixels, before the center is cut out.
    """
    height, width = sides(preprocessing.image_size)
    crop = preprocessing.center_crop
    if crop is None:
        return height, width
    # timm is given the fraction; elsewhere it comes from two sides of whole pixels.
    whole = math.floor if preprocessing.resize == "timm" else round
    return whole(height / crop), whole(width / crop)


def whole_pixels(
    preprocessing: Preprocessing, height: int, width: int
) -> tuple[int, int, int, int]:
    """Returns the size an image is resized to, and the crop's corner: (height, width, top, left).

    With letterbox the size may be less than that of the crop, which is black beyond it.

    Args:
        preprocessing: whose resize is not box.
        height: of the image, in pixels.
        width: likewise.
    """
    view, covered = sides(preprocessing.image_size), resized_sides(preprocessing)
    if preprocessing.resize == "letterbox":
        return *fitting_sides((height, width), view), 0, 0
    if preprocessing.squash or preprocessing.center_crop is None:
        resized = covered
    else:
        resized = _covering(preprocessing.resize, (height, width), covered)
    margins = [x - y for x, y in zip(resized, view, strict=True)]
    if preprocessing.resize == "timm":  # Half to even, too.
        top, left = (round(x / 2) for x in margins)
    else:
        top, left = (x // 2 for x in margins)
    return *resized, top, left


def fitting_sides(
    image: tuple[int, int], view: tuple[int, int], times: float = 1.0
) -> tuple[int, int]:
    """The size, in whole pixels, at which an image fits into a view, its aspect ratio kept.

    Args:
        image: height and width.
        view: likewise.
        times: how many times as large it is made.
    """
    factor = min(view[0] / image[0], view[1] / image[1]) * times
    return max(round(image[0] * factor), 1), max(round(image[1] * factor), 1)


def _covering(resize: str, image: tuple[int, int], covered: tuple[int, int]) -> tuple[int, int]:
    """The size of an image that covers a height and width, its aspect ratio kept."""
    # Of a square the shorter side of the image is the one that touches.
    touches = 0 if covered[0] * image[1] >= covered[1] * image[0] else 1
    new, old = covered[touches], image[touches]
    if resize == "big_vision":  # In 32 bits there, rounding half to even.
        factor = np.float32(new) / np.float32(old)
        height, width = (int(np.round(np.float32(x) * factor)) for x in image)
    elif resize == "timm" and covered[0] != covered[1]:
        height, width = (round(x / (old / new)) for x in image)
    else:
        height, width = (int(new * x / old) for x in image)
    return height, width


def eval_box(
    preprocessing: Preprocessing, height: int, width: int
) -> tuple[float, float, float, float]:
    """Returns the box (y, x, height, width) that evaluation takes, in source pixels.

    Args:
        preprocessing: whose resize is box.
        height: of the image, in pixels.
        width: likewise.
    """
    center_crop = preprocessing.center_crop
    if center_crop is None:
        return 0, 0, height, width
    if preprocessing.squash:
        margin = (1 - center_crop) / 2
        return height * margin, width * margin, height * center_crop, width * center_crop
    view = sides(preprocessing.image_size)
    aspect = view[1] / view[0]
    tall = min(height, width / aspect) * center_crop
    wide = min(width, height * aspect) * center_crop
    return (height - tall) / 2, (width - wide) / 2, tall, wide
