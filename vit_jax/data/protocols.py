"""Which part of an image a model is shown, and how: plain arithmetic, without TensorFlow.

A view of an image is a box in source pixels, a float (y, x, height, width), that is resized to
`image_size` x `image_size`. A protocol is a rule for that box:

    inception  the published fine-tuning code: inception crop; evaluation on the whole image
    bit        the paper's text (Sec. 4.1, as BiT): resize and random crop; evaluation on the
               whole image
    pretrain   later Google configs: inception crop; evaluation on the central 224/256 of the
               shorter side
    pad        small images from scratch, as usual on CIFAR (He et al., 2016, Sec. 4.2): a shift by
               up to an eighth of the side, black beyond the edge; evaluation on the whole image
"""

import dataclasses
import math
from typing import Any

from vit_jax.errors import UserError

PROTOCOLS = ("inception", "bit", "pretrain", "pad")

# BiT resizes to 448 and crops 384.
BIT_RESIZE = 448 / 384

# libjpeg's inverse transforms: the one of PIL, and the one that TensorFlow takes unless told.
JPEG_DCTS = ("accurate", "fast")

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What evaluation makes of an image; it travels with the weights.

    Attributes:
        image_size: side of the model's square input, in pixels.
        center_crop: None to look at the whole image, its aspect ratio given up; a fraction f to
            look at the central square of f times the shorter side.
        interpolation: "bilinear" or "bicubic" (Keys, a = -0.5).
        antialias: whether the kernel widens where the image shrinks. PIL's does (timm and Hugging
            Face), that of TensorFlow, with which the official checkpoints were trained, does not.
        mean: of each channel, of pixels in [0, 1]; is subtracted.
        std: of each channel; what remains is divided by it.

    Raises:
        UserError: a value is out of its range.
    """

    image_size: int
    center_crop: float | None = None
    interpolation: str = "bilinear"
    antialias: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if not 1 <= self.image_size <= 10_000:
            raise UserError(f"image_size {self.image_size} is not from 1 to 10000")
        if self.center_crop is not None and not 0 < self.center_crop <= 1:
            raise UserError(f"center_crop {self.center_crop} is not above 0 and at most 1")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise UserError(f"{name} {values} is not three numbers")
        if min(self.std) <= 0:
            raise UserError(f"std {self.std} is not positive")


def evaluation(protocol: str, image_size: int) -> Preprocessing:
    """How a run of this project evaluates under one of `PROTOCOLS`.

    Raises:
        UserError: the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    return Preprocessing(image_size, center_crop=224 / 256 if protocol == "pretrain" else None)


def eval_box(center_crop: float | None, height: Any, width: Any) -> tuple[Any, Any, Any, Any]:
    """Returns the box (y, x, height, width) that evaluation looks at, in source pixels.

    Args:
        center_crop: as in `Preprocessing`.
        height: of the image, in pixels; an int, or a scalar tensor or array of any framework.
        width: likewise.
    """
    if center_crop is None:
        return 0, 0, height, width
    # The smaller of the two without min(), which a symbolic tensor does not have.
    side = (height + width - abs(height - width)) / 2 * center_crop
    return (height - side) / 2, (width - side) / 2, side, side
