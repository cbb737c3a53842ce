"""Residual networks with GroupNorm and standardised convolutions, in Flax Linen.

The feature map that the hybrids cut into patches (Section 3.1, "Hybrid Architecture"): BiT's
ResNet with post-activation units, as published with the hybrids' checkpoints, whose names and
shapes the parameters have.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

NUM_GROUPS = 32
ROOT_WIDTH = 64
# A unit's output has this many times the channels of its 3 x 3 convolution.
EXPANSION = 4
# Of weight standardisation; added to the standard deviation, not to the variance.
STANDARDIZE_EPSILON = 1e-5


def standardize(kernel: Array) -> Array:
    """Gives every output channel of a kernel mean 0 and standard deviation 1.

    Weight standardisation (Qiao et al., 2019, arXiv 1903.10520): (w - mean) / (std + 1e-5).

    Args:
        kernel: [height, width, input channels, output channels].
    """
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    std = jnp.sqrt(jnp.square(kernel).mean(axis=(0, 1, 2)))
    return kernel / (std + STANDARDIZE_EPSILON)


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardised; SAME padding."""

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', features].

        The sides are divided by the stride and rounded up.
        """
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return jax.lax.conv_general_dilated(
            x,
            # In float32 also where the computation is not: it is of the parameters alone.
            standardize(kernel).astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class GroupNorm(nn.Module):
    """Normalises groups of channels over all positions (Wu & He, 2018, arXiv 1803.08494).

    As flax.linen.GroupNorm, which repeats the statistics for every channel: in an exported graph
    that is a dozen nodes more for each.
    """

    epsilon: float
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to the same shape; float32 inside."""
        batch, height, width, channels = x.shape
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32)
        y = y.reshape(batch, height * width, NUM_GROUPS, channels // NUM_GROUPS)
        y = y - y.mean(axis=(1, 3), keepdims=True)
        variance = jnp.square(y).mean(axis=(1, 3), keepdims=True)
        y = (y * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(self.dtype)


class BottleneckUnit(nn.Module):
    """A post-activation bottleneck: 1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    features: int
    stride: int = 1
    group_norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""

        def conv(features: int, kernel_size: int, stride: int, name: str) -> StdConv:
            return StdConv(features, kernel_size, stride, self.dtype, name=name)

        def norm(name: str, **options: Any) -> GroupNorm:
            return GroupNorm(self.group_norm_epsilon, dtype=self.dtype, name=name, **options)

        width = EXPANSION * self.features
        shortcut = x
        if x.shape[-1] != width or self.stride != 1:
            shortcut = norm("gn_proj")(conv(width, 1, self.stride, "conv_proj")(x))
        x = nn.relu(norm("gn1")(conv(self.features, 1, 1, "conv1")(x)))
        x = nn.relu(norm("gn2")(conv(self.features, 3, self.stride, "conv2")(x)))
        # The last scale starts at 0: a fresh unit passes its shortcut on.
        x = norm("gn3", scale_init=nn.initializers.zeros)(conv(width, 1, 1, "conv3")(x))
        return nn.relu(shortcut + x)


class ResNetStage(nn.Module):
    """Units of one resolution; the first has the stride."""

    num_units: int
    features: int
    stride: int = 1
    group_norm_epsilon: float = 1e-6
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""
        unit = nn.remat(BottleneckUnit) if self.remat else BottleneckUnit
        for u in range(self.num_units):
            stride = self.stride if u == 0 else 1
            x = unit(
                self.features, stride, self.group_norm_epsilon, self.dtype, name=f"unit{u + 1}"
            )(x)
        return x


def resnet_features(
    images: Array,
    layers: Sequence[int],
    *,
    group_norm_epsilon: float = 1e-6,
    remat: bool = False,
    dtype: Any = jnp.float32,
) -> Array:
    """The feature map of a ResNet, to be called in a compact method of a module.

    Its modules `conv_root`, `gn_root`, `block1`, ... become the caller's own, as in the official
    tree.

    Args:
        images: [batch, height, width, 3].
        layers: the number of units of each stage, () for the root alone.
        group_norm_epsilon: of every GroupNorm.
        remat: recompute each unit in the backward pass.
        dtype: of the computation.

    Returns:
        [batch, height', width', channels]: the sides are divided by `downsampling(layers)`; 256
        channels after the first stage and twice as many after each further one, 64 after the root.
    """
    x = StdConv(ROOT_WIDTH, 7, 2, dtype, name="conv_root")(images.astype(dtype))
    x = nn.relu(GroupNorm(group_norm_epsilon, dtype=dtype, name="gn_root")(x))
    x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    for s, num_units in enumerate(layers):
        stage = ResNetStage(
            num_units,
            features=ROOT_WIDTH * 2**s,
            stride=1 if s == 0 else 2,
            group_norm_epsilon=group_norm_epsilon,
            remat=remat,
            dtype=dtype,
            name=f"block{s + 1}",
        )
        x = stage(x)
    return x


def downsampling(layers: Sequence[int]) -> int:
    """How many times smaller than the image the feature map of these stages is."""
    return 4 * 2 ** max(len(layers) - 1, 0)
