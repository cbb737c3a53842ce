"""Residual networks with GroupNorm and standardized convolutions, in Flax Linen.

What `models.bit` and `models.axial` have in common with the hybrids, and `resnet_features`, the
feature map that the hybrids cut into patches (Section 3.1, "Hybrid Architecture"): post-activation
units, TensorFlow's SAME padding, the names and shapes of the published checkpoints.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, brief
from vit_jax.image_size import ImageSize, sides
from vit_jax.models.base import Arrays, Grid, ModelConfig, epsilon, option
from vit_jax.models.rematerialization import rematerialize

Array = jax.Array

NUM_GROUPS = 32
ROOT_WIDTH = 64
# A unit's output has this many times the channels of its 3 x 3 convolution.
EXPANSION = 4
# Of weight standardization. The hybrids' is added to the standard deviation, that of BiT (and of
# AxialResNet) to the variance.
STANDARDIZE_EPSILON = 1e-5
BIT_STANDARDIZE_EPSILON = 1e-10
# R200 has 36 units in a stage and four stages; each stage halves the side and doubles the width.
MOST_UNITS, MOST_STAGES = 125, 8


def units_per_stage(layers: Sequence[Any]) -> str | None:
    """Checks `resnet_layers` in a config."""
    if len(layers) > MOST_STAGES:
        return f"has {len(layers)} stages: it must be at most {MOST_STAGES}"
    wrong = [x for x in layers if type(x) is not int or not 1 <= x <= MOST_UNITS]
    return (
        f"has {brief(wrong[0])}: it must be units per stage, 1 to {MOST_UNITS}" if wrong else None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesConfig(ModelConfig):
    """Describes what has the stages of a ResNet.

    Attributes:
        resnet_layers: units of each stage; (3, 4, 6, 3) is ResNet50.
        group_norm_epsilon: of every GroupNorm.

    The others are those of `ModelConfig`.
    """

    resnet_layers: tuple[int, ...] = option(check=units_per_stage)
    group_norm_epsilon: float = option(check=epsilon)

    @property
    def downsampling(self) -> int:
        """The ratio of the image's side to that of the last feature map."""
        return downsampling(self.resnet_layers)

    def validate(self) -> None:
        """Checks that there are units in every stage."""
        super().validate()
        if units_per_stage(self.resnet_layers):
            raise UserError(
                f"resnet_layers {brief(self.resnet_layers)} is no list of units per stage: use for "
                "example (3, 4, 6, 3)"
            )


def standardize(kernel: Array) -> Array:
    """Gives every output channel of a kernel mean 0 and standard deviation 1.

    Weight standardization (Qiao et al., 2019, arXiv 1903.10520): (w - mean) / (std + 1e-5).

    Args:
        kernel: [height, width, input channels, output channels].
    """
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    std = jnp.sqrt(jnp.square(kernel).mean(axis=(0, 1, 2)))
    return kernel / (std + STANDARDIZE_EPSILON)


def standardize_bit(kernel: Array) -> Array:
    """Standardizes a kernel like `standardize`, but as (w - mean) / sqrt(variance + 1e-10)."""
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    variance = jnp.square(kernel).mean(axis=(0, 1, 2))
    return kernel * jax.lax.rsqrt(variance + BIT_STANDARDIZE_EPSILON)


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardized.

    Attributes:
        features: output channels.
        kernel_size: side of the square kernel.
        stride: in both directions.
        dtype: of the computation.
        padding: zeros before and after each side, or None for SAME.
        standardize: maps the kernel to the one that is used.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Any = jnp.float32
    padding: int | None = None
    standardize: Callable[[Array], Array] = standardize

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', features].

        With SAME padding, or half the kernel's size, sides are divided by the stride, rounded up.
        """
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        padding: str | list[tuple[int, int]] = "SAME"
        if self.padding is not None:
            padding = [(self.padding, self.padding)] * 2
        return jax.lax.conv_general_dilated(
            x,
            # In float32 also where the computation is not: it is of the parameters alone.
            self.standardize(kernel).astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class GroupNorm(nn.Module):
    """Normalizes groups of channels over all positions (Wu & He, 2018, arXiv 1803.08494).

    As flax.linen.GroupNorm, which repeats the statistics for every channel: in an exported graph
    that is a dozen nodes more for each.

    Attributes:
        epsilon: added to the variance.
        scale_init: of the scale; the bias starts at 0.
        dtype: of the result.
        names: of the two parameters.
        batch_axes: how many axes come before those of the positions: 1 for feature maps; 2 where
            every row of one is normalized alone.
    """

    epsilon: float
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32
    names: tuple[str, str] = ("scale", "bias")
    batch_axes: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to the same shape; float32 inside."""
        channels = x.shape[-1]
        scale = self.param(self.names[0], self.scale_init, (channels,))
        bias = self.param(self.names[1], nn.initializers.zeros, (channels,))
        alone, positions = x.shape[: self.batch_axes], math.prod(x.shape[self.batch_axes : -1])
        y = x.astype(jnp.float32)
        y = y.reshape(*alone, positions, NUM_GROUPS, channels // NUM_GROUPS)
        y = y - y.mean(axis=(-3, -1), keepdims=True)
        variance = jnp.square(y).mean(axis=(-3, -1), keepdims=True)
        y = (y * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(self.dtype)


class BottleneckUnit(nn.Module):
    """A post-activation bottleneck: 1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut.

    Attributes:
        config: the description of the model.
        features: of the 3 x 3 convolution.
        stride: of the 3 x 3 convolution.
    """

    # Of the kernels of the units, and of the root before them.
    standardize = staticmethod(standardize)

    config: StagesConfig
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""
        width = EXPANSION * self.features
        shortcut = x
        if x.shape[-1] != width or self.stride != 1:
            shortcut = self._norm("gn_proj")(self._conv(width, 1, self.stride, "conv_proj")(x))
        x = nn.relu(self._norm("gn1")(self._conv(self.features, 1, 1, "conv1")(x)))
        x = nn.relu(self._mix(x))
        # The last scale starts at 0: a fresh unit passes its shortcut on.
        norm = self._norm("gn3", scale_init=nn.initializers.zeros)
        return nn.relu(shortcut + norm(self._conv(width, 1, 1, "conv3")(x)))

    def _mix(self, x: Array) -> Array:
        """Applies the operation that looks at more than one position, with the unit's stride."""
        return self._norm("gn2")(self._conv(self.features, 3, self.stride, "conv2")(x))

    def _conv(self, features: int, kernel_size: int, stride: int, name: str) -> StdConv:
        dtype = self.config.compute_dtype
        return StdConv(
            features, kernel_size, stride, dtype, standardize=self.standardize, name=name
        )

    def _norm(self, name: str, scale_init: Any = nn.initializers.ones) -> GroupNorm:
        config = self.config
        return GroupNorm(config.group_norm_epsilon, scale_init, config.compute_dtype, name=name)


class ResNetStage(nn.Module):
    """Units of one resolution; the first has the stride.

    Attributes:
        config: the description of the model.
        unit: what the stage is made of: a module of config, features and stride.
        num_units: how many.
        features: of the 3 x 3 convolution of each.
        stride: of the first.
        digits: that the numbers in the units' names have at least.
    """

    config: StagesConfig
    unit: type[nn.Module]
    num_units: int
    features: int
    stride: int
    digits: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""
        unit = rematerialize(self.unit, self.config.remat, loops=False)
        for u in range(self.num_units):
            stride = self.stride if u == 0 else 1
            name = f"unit{u + 1:0{self.digits}}"
            x = unit(self.config, self.features, stride, name=name)(x)
        return x


def apply_stages(
    x: Array, config: StagesConfig, unit: type[nn.Module], *, width: int, digits: int = 1
) -> Array:
    """Applies the stages `block1`, `block2`, ..., to be called in a compact method of a module.

    Args:
        x: what the root gives, [batch, height, width, channels].
        config: the description of the model, which has their `resnet_layers`.
        unit: what the stages are made of.
        width: features of the first stage; each further one has twice as many.
        digits: see `ResNetStage`.
    """
    for s, num_units in enumerate(config.resnet_layers):
        stride = 1 if s == 0 else 2
        name = f"block{s + 1}"
        x = ResNetStage(config, unit, num_units, width * 2**s, stride, digits, name=name)(x)
    return x


def resnet_features(
    images: Array, config: StagesConfig, unit: type[BottleneckUnit] = BottleneckUnit
) -> Array:
    """The feature map of a ResNet, to be called in a compact method of a module.

    Its modules `conv_root`, `gn_root`, `block1`, ... become the caller's own, as in the official
    tree.

    Args:
        images: [batch, height, width, 3].
        config: the description of the model; its `resnet_layers` are () for the root alone.
        unit: what the stages are made of.

    Returns:
        [batch, height', width', channels]: the sides are divided by `downsampling(layers)`; 256
        channels after the first stage and twice as many after each further one, 64 after the root.
    """
    dtype = config.compute_dtype
    root = StdConv(ROOT_WIDTH, 7, 2, dtype, standardize=unit.standardize, name="conv_root")
    norm = GroupNorm(config.group_norm_epsilon, dtype=dtype, name="gn_root")
    x = nn.relu(norm(root(images.astype(dtype))))
    x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    return apply_stages(x, config, unit, width=ROOT_WIDTH)


def downsampling(layers: Sequence[int]) -> int:
    """The ratio of the image's side to that of the feature map of these stages."""
    return 4 * 2 ** max(len(layers) - 1, 0)


def convolve(grid: Grid, size: int, stride: int, same: bool = True) -> tuple[int, Grid]:
    """Returns how often a convolution's kernel elements meet the image, and its output's sides.

    Args:
        grid: height and width of the image.
        size: of the kernel.
        stride: in both directions.
        same: whether padding is TensorFlow's SAME, or half the kernel on both sides.
    """
    (rows, height), (columns, width) = (_along_axis(side, size, stride, same) for side in grid)
    return rows * columns, (height, width)


def _along_axis(side: int, size: int, stride: int, same: bool) -> tuple[int, int]:
    outputs = -(-side // stride)
    padding = max((outputs - 1) * stride + size - side, 0) // 2 if same else size // 2
    positions = (o * stride - padding + k for o in range(outputs) for k in range(size))
    return sum(0 <= x < side for x in positions), outputs


# Of height and width, features and stride: the multiply-adds of what looks at more than one
# position in a unit, and the height and width of what it gives.
Mix = Callable[[Grid, int, int], tuple[int, Grid]]


def convolution(grid: Grid, features: int, stride: int, same: bool = True) -> tuple[int, Grid]:
    """The `Mix` of a 3 x 3 convolution."""
    taps, grid = convolve(grid, 3, stride, same)
    return taps * features**2, grid


def multiply_adds(
    layers: Sequence[int],
    image_size: ImageSize,
    *,
    root_width: int = ROOT_WIDTH,
    same: bool = True,
    mix: Mix = convolution,
) -> tuple[int, Grid, int]:
    """The multiply-adds of root and stages, and the sides and channels of their feature map.

    Args:
        layers: units of each stage.
        image_size: of the image.
        root_width: channels of the root.
        same: the root's padding, see `convolve`.
        mix: of the units.
    """
    taps, grid = convolve(sides(image_size), 7, 2, same)
    total = taps * 3 * root_width
    grid, channels = (-(-grid[0] // 2), -(-grid[1] // 2)), root_width
    for s, num_units in enumerate(layers):
        features = root_width * 2**s
        width = EXPANSION * features
        for u in range(num_units):
            total += math.prod(grid) * channels * features  # The first convolution.
            mixed, grid = mix(grid, features, 2 if s and u == 0 else 1)
            total += mixed + math.prod(grid) * features * width  # And the third.
            total += math.prod(grid) * channels * width * (u == 0)  # The shortcut's.
            channels = width
    return total, grid, channels


def count_units(arrays: Arrays, pattern: str) -> list[int]:
    """Counts the names of each stage, the pattern's group."""
    units = Counter(int(match[1]) for name in arrays if (match := re.match(pattern, name)))
    return [units[stage] for stage in sorted(units)]
