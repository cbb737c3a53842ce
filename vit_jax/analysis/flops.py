"""The arithmetic of a model, and the share of a device's peak that a run reaches."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.models import resnet

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


def multiply_adds(model: Mapping[str, Any], image_size: int, num_classes: int) -> int:
    """Multiply-adds of one image's forward pass, matrix products and convolutions only.

    Args:
        model: the `model` section of a config.
        image_size: side of the image in pixels.
        num_classes: width of the head.
    """
    width, mlp_dim, patch_size = model["hidden_size"], model["mlp_dim"], model["patch_size"]
    stem, side, channels = 0, image_size, 3
    if model["architecture"] == "hybrid":
        stem, side, channels = _resnet(model["resnet_layers"], image_size)
    patches = (side // patch_size) ** 2
    tokens = patches + (model["classifier"] == "token")
    embedding = patches * channels * patch_size**2 * width
    layer = tokens * width * (4 * width + 2 * mlp_dim) + 2 * tokens**2 * width
    representation = model["representation_size"]
    head = width * representation + (representation or width) * num_classes
    return stem + embedding + model["num_layers"] * layer + head


def _resnet(layers: Sequence[int], image_size: int) -> tuple[int, int, int]:
    """The multiply-adds of the stages, and the side and channels of their feature map."""
    side, channels = image_size // 2, resnet.ROOT_WIDTH
    total = side**2 * 7**2 * 3 * channels
    side //= 2
    for s, num_units in enumerate(layers):
        features = resnet.ROOT_WIDTH * 2**s
        width = resnet.EXPANSION * features
        for u in range(num_units):
            total += side**2 * channels * features  # conv1
            side //= 2 if s and u == 0 else 1  # The stride is that of conv2.
            total += side**2 * (3**2 * features**2 + features * width)  # conv2, conv3
            total += side**2 * channels * width * (u == 0)  # conv_proj
            channels = width
    return total, side, channels


def train_flops(multiply_adds: int) -> int:
    """FLOPs to train on one image: two per multiply-add, and twice as many again backwards."""
    return 6 * multiply_adds


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by its JAX `device_kind`, or None if not known."""
    names = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_kind))
    return PEAK_FLOPS.get(next(names, ""))
