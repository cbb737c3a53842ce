"""The arithmetic of a model, and the share of a device's peak that a run reaches."""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax.image_size import ImageSize
from vit_jax.models import describe

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets; the first name that stands
# in the device's kind counts. A TPU v2 or v3 device is one of a chip's two cores.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
    "TPU v2": 22.5e12,
}


def multiply_adds(model: Mapping[str, Any], image_size: ImageSize, num_classes: int) -> int:
    """Multiply-adds of one image's forward pass, matrix products and convolutions only.

    A convolution's products with the zeros around the image are not counted. XLA counts so, and the
    exaFLOPs of Table 6 are only reached so: for a ResNet the zeros are 4% of all products. An
    AxialResNet does 5% more that is no product: softmaxes and norms of heads that are 8 wide.

    Args:
        model: the `model` section of a config.
        image_size: of the image.
        num_classes: width of the head.
    """
    return describe(model, num_classes=num_classes).multiply_adds(image_size)


def train_flops(multiply_adds: int) -> int:
    """FLOPs to train on one image: two per multiply-add, and twice as many again backwards."""
    return 6 * multiply_adds


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by its JAX `device_kind`, or None if not known."""
    names = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_kind))
    return PEAK_FLOPS.get(next(names, ""))
