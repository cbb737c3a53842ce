"""Which part of an image a model is shown in evaluation: plain arithmetic, without TensorFlow.

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

from typing import Any

PROTOCOLS = ("inception", "bit", "pretrain", "pad")

# BiT resizes to 448 and crops 384.
BIT_RESIZE = 448 / 384


def eval_box(protocol: str, height: Any, width: Any) -> tuple[Any, Any, Any, Any]:
    """Returns the box (y, x, height, width) that evaluation looks at, in source pixels.

    Args:
        protocol: one of `PROTOCOLS`.
        height: of the image, in pixels; an int, or a scalar tensor or array of any framework.
        width: likewise.
    """
    if protocol == "pretrain":
        # The smaller of the two without min(), which a symbolic tensor does not have.
        side = (height + width - abs(height - width)) / 2 * (224 / 256)
        return (height - side) / 2, (width - side) / 2, side, side
    return 0, 0, height, width
