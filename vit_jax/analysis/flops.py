"""The arithmetic of a model, and the share of a device's peak that a run reaches."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.models import resnet, with_defaults

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

    A convolution's products with the zeros around the image are not counted. XLA counts so, and the
    exaFLOPs of Table 6 are only reached so: for a ResNet the zeros are 4% of all products. An
    AxialResNet does 5% more that is no product: softmaxes and norms of heads that are 8 wide.

    Args:
        model: the `model` section of a config.
        image_size: side of the image in pixels.
        num_classes: width of the head.
    """
    if model["architecture"] == "resnet":
        features, _, channels = _resnet(model["resnet_layers"], image_size, model["width_factor"])
        return features + channels * num_classes
    if model["architecture"] == "axial_resnet":
        features, _, channels = _resnet(model["resnet_layers"], image_size, is_axial=True)
        return features + channels * num_classes
    model = with_defaults(model)
    width, mlp_dim, patch_size = model["hidden_size"], model["mlp_dim"], model["patch_size"]
    stem, side, channels = 0, image_size, 3
    if model["architecture"] == "hybrid":
        stem, side, channels = _resnet(model["resnet_layers"], image_size)
    patches = (side // patch_size) ** 2
    has_class = model["classifier"] == "token"
    tokens = patches + has_class
    embedding = patches * channels * patch_size**2 * width
    # An axial layer is two, in which a token looks at as many as the grid has columns, or rows.
    length, count = tokens, 1
    if model["architecture"] == "axial_vit":
        length, count = side // patch_size, 2
    layer = tokens * width * (4 * width + 2 * mlp_dim) + 2 * tokens * length * width
    if model.get("position_embedding") == "relative":
        layer += patches * (2 * (length - has_class) - 1) * width
    layer *= count
    representation = model["representation_size"]
    head = width * representation + (representation or width) * num_classes
    return stem + embedding + model["num_layers"] * layer + head


def _resnet(
    layers: Sequence[int], image_size: int, width_factor: int | None = None, is_axial: bool = False
) -> tuple[int, int, int]:
    """The multiply-adds of the stages, and the side and channels of their feature map.

    With a width_factor a ResNet (BiT), without the stem of a hybrid: they differ in their padding.
    An axial one has that stem's 3 x 3 convolutions replaced.
    """
    same = width_factor is None
    channels = resnet.ROOT_WIDTH * (width_factor or 1)
    root_features = channels
    side, taps = _convolve(image_size, 7, 2, same)
    total = taps * 3 * channels
    side = -(-side // 2)
    for s, num_units in enumerate(layers):
        features = root_features * 2**s
        width = resnet.EXPANSION * features
        for u in range(num_units):
            total += side**2 * channels * features  # The first convolution.
            stride = 2 if s and u == 0 else 1
            if is_axial:
                total += 2 * side**2 * _position_sensitive(side, features)
                side //= stride
            else:
                side, taps = _convolve(side, 3, stride, same)
                total += taps * features**2  # The second.
            total += side**2 * features * width  # The third.
            total += side**2 * channels * width * (u == 0)  # The shortcut's.
            channels = width
    return total, side, channels


def _position_sensitive(length: int, features: int) -> int:
    """Of one query of `models.axial.PositionSensitiveAttention`."""
    # q and k have half the features: q k, q r and k r are 3/2 of them; v and its r are 2.
    return 2 * features**2 + length * features * 3 // 2 + length * features * 2


def _convolve(side: int, size: int, stride: int, same: bool) -> tuple[int, int]:
    """The side of a convolution's output, and how often its kernel's elements meet the image.

    Padding is TensorFlow's SAME, or half the kernel on both sides.
    """
    outputs = -(-side // stride)
    padding = max((outputs - 1) * stride + size - side, 0) // 2 if same else size // 2
    positions = (o * stride - padding + k for o in range(outputs) for k in range(size))
    return outputs, sum(0 <= x < side for x in positions) ** 2


def train_flops(multiply_adds: int) -> int:
    """FLOPs to train on one image: two per multiply-add, and twice as many again backwards."""
    return 6 * multiply_adds


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by its JAX `device_kind`, or None if not known."""
    names = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_kind))
    return PEAK_FLOPS.get(next(names, ""))
