"""Residual networks with GroupNorm and standardized convolutions, in Flax Linen.

Two of them, each with the names and shapes of its published checkpoints:

- `resnet_features`, the feature map that the hybrids cut into patches (Section 3.1, "Hybrid
  Architecture"): post-activation units, TensorFlow's SAME padding.
- `ResNet`, the paper's baseline "ResNet (BiT)" (Section 4.1), which is the one of Big Transfer
  (Kolesnikov et al., 2020, arXiv 1912.11370): pre-activation (v2) units, the same padding on both
  sides. Where the paper is silent it follows github.com/google-research/big_transfer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError

Array = jax.Array

NUM_GROUPS = 32
ROOT_WIDTH = 64
# A unit's output has this many times the channels of its 3 x 3 convolution.
EXPANSION = 4
# Of weight standardization. The hybrids' is added to the standard deviation, that of BiT (and of
# AxialResNet) to the variance.
STANDARDIZE_EPSILON = 1e-5
BIT_STANDARDIZE_EPSILON = 1e-10


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
    """As `standardize`, but (w - mean) / sqrt(variance + 1e-10)."""
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
        padding = "SAME" if self.padding is None else ((self.padding,) * 2,) * 2
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
    that is a dozen nodes more for each. `names` are those of the parameters.
    """

    epsilon: float
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32
    names: tuple[str, str] = ("scale", "bias")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to the same shape; float32 inside."""
        batch, height, width, channels = x.shape
        scale = self.param(self.names[0], self.scale_init, (channels,))
        bias = self.param(self.names[1], nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32)
        y = y.reshape(batch, height * width, NUM_GROUPS, channels // NUM_GROUPS)
        y = y - y.mean(axis=(1, 3), keepdims=True)
        variance = jnp.square(y).mean(axis=(1, 3), keepdims=True)
        y = (y * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(self.dtype)


class BottleneckUnit(nn.Module):
    """A post-activation bottleneck: 1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    # Of the kernels of the units, and of the root before them.
    standardize = staticmethod(standardize)

    features: int
    stride: int = 1
    group_norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

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
        """What looks at more than one position, with the unit's stride."""
        return self._norm("gn2")(self._conv(self.features, 3, self.stride, "conv2")(x))

    def _conv(self, features: int, kernel_size: int, stride: int, name: str) -> StdConv:
        return StdConv(
            features, kernel_size, stride, self.dtype, standardize=self.standardize, name=name
        )

    def _norm(self, name: str, **options: Any) -> GroupNorm:
        return GroupNorm(self.group_norm_epsilon, dtype=self.dtype, name=name, **options)


class ResNetStage(nn.Module):
    """Units of one resolution; the first has the stride."""

    num_units: int
    features: int
    stride: int = 1
    group_norm_epsilon: float = 1e-6
    remat: bool = False
    dtype: Any = jnp.float32
    unit: type[BottleneckUnit] = BottleneckUnit

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""
        unit = nn.remat(self.unit) if self.remat else self.unit
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
    unit: type[BottleneckUnit] = BottleneckUnit,
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
        unit: what the stages are made of.

    Returns:
        [batch, height', width', channels]: the sides are divided by `downsampling(layers)`; 256
        channels after the first stage and twice as many after each further one, 64 after the root.
    """
    root = StdConv(ROOT_WIDTH, 7, 2, dtype, standardize=unit.standardize, name="conv_root")
    x = root(images.astype(dtype))
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
            unit=unit,
            name=f"block{s + 1}",
        )
        x = stage(x)
    return x


def downsampling(layers: Sequence[int]) -> int:
    """How many times smaller than the image the feature map of these stages is."""
    return 4 * 2 ** max(len(layers) - 1, 0)


class ConvBlock(nn.Module):
    """A convolution of BiT's under the name of its block: `root_block`, `proj`."""

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', features]."""
        return StdConv(
            self.features,
            self.kernel_size,
            self.stride,
            self.dtype,
            padding=self.kernel_size // 2,
            standardize=standardize_bit,
            name="standardized_conv2d",
        )(x)


class ActivatedConvBlock(ConvBlock):
    """GroupNorm and ReLU before a convolution of BiT's: `a`, `b` and `c` of a unit.

    With shortcut_features a 1 x 1 convolution `proj` of what the ReLU gives is returned too.
    """

    group_norm_epsilon: float = 1e-5
    shortcut_features: int = 0
    shortcut_stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Any:
        """Maps x to [batch, height', width', features], or to that and the shortcut."""
        x = nn.relu(bit_group_norm(self.group_norm_epsilon, self.dtype)(x))
        y = super().__call__(x)
        if not self.shortcut_features:
            return y
        project = ConvBlock(
            self.shortcut_features, 1, self.shortcut_stride, self.dtype, name="proj"
        )
        return y, project(x)


def bit_group_norm(epsilon: float, dtype: Any) -> GroupNorm:
    """The GroupNorm of BiT, under its names."""
    return GroupNorm(epsilon, dtype=dtype, names=("gamma", "beta"), name="group_norm")


class PreActivationUnit(nn.Module):
    """A bottleneck of a ResNet v2 (He et al., 2016, arXiv 1603.05027) as BiT has it.

    Norm and activation come before each convolution, and before that of the shortcut, too. The
    stride is that of the 3 x 3 convolution.
    """

    features: int
    stride: int = 1
    group_norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""

        def block(features: int, size: int, stride: int, name: str, **options: Any) -> Any:
            return ActivatedConvBlock(
                features, size, stride, self.dtype, self.group_norm_epsilon, name=name, **options
            )

        width = EXPANSION * self.features
        if x.shape[-1] != width or self.stride != 1:
            options = {"shortcut_features": width, "shortcut_stride": self.stride}
            y, shortcut = block(self.features, 1, 1, "a", **options)(x)
        else:
            y, shortcut = block(self.features, 1, 1, "a")(x), x
        y = block(self.features, 3, self.stride, "b")(y)
        y = block(width, 1, 1, "c")(y)
        return shortcut + y


class PreActivationStage(nn.Module):
    """Units of one resolution; the first has the stride."""

    num_units: int
    features: int
    stride: int
    group_norm_epsilon: float
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""
        unit = nn.remat(PreActivationUnit) if self.remat else PreActivationUnit
        for u in range(self.num_units):
            stride = self.stride if u == 0 else 1
            x = unit(
                self.features,
                stride,
                self.group_norm_epsilon,
                self.dtype,
                name=f"unit{u + 1:02d}",
            )(x)
        return x


class LinearHead(nn.Module):
    """The classifier, in BiT's checkpoints a 1 x 1 convolution; starts at 0."""

    num_classes: int
    bias_init: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, channels] to logits [batch, num_classes]."""
        conv = nn.Conv(
            self.num_classes,
            (1, 1),
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.bias_init),
            name="conv2d",
        )
        return conv(x[:, None, None])[:, 0, 0]


class ResNetV2(nn.Module):
    """What BiT's checkpoints have under `resnet`: all of it."""

    num_classes: int
    layers: tuple[int, ...]
    width_factor: int
    group_norm_epsilon: float
    head_bias_init: float
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images [batch, height, width, 3] to logits, or to what the head would see."""
        width = ROOT_WIDTH * self.width_factor
        x = ConvBlock(width, 7, 2, self.dtype, name="root_block")(images.astype(self.dtype))
        # With zeros as the published code pads: max_pool itself would pad with minus infinity.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
        for s, num_units in enumerate(self.layers):
            x = PreActivationStage(
                num_units,
                features=width * 2**s,
                stride=1 if s == 0 else 2,
                group_norm_epsilon=self.group_norm_epsilon,
                remat=self.remat,
                dtype=self.dtype,
                name=f"block{s + 1}",
            )(x)
        x = nn.relu(bit_group_norm(self.group_norm_epsilon, self.dtype)(x))
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        if not self.num_classes:
            return x
        return LinearHead(self.num_classes, self.head_bias_init, name="head")(x)


class ResNet(nn.Module):
    """ResNet (BiT), the paper's baseline: an image to the logits of its classes.

    It has no dropout, no hidden layer before its head, and takes images of any size.

    Attributes:
        num_classes: width of the head; 0 leaves the head out, and features are returned.
        resnet_layers: units of each stage; (3, 4, 6, 3) is ResNet50.
        width_factor: times as many channels everywhere, the 2 of R50x2.
        group_norm_epsilon: 1e-5 in the published code.
        head_bias_init: start value of the head's bias; -10 goes with the sigmoid loss.
        remat: recompute each unit in the backward pass: less memory, about a third more time.
        dtype: of the computation; parameters and logits are always float32.
    """

    num_classes: int
    resnet_layers: tuple[int, ...]
    width_factor: int = 1
    group_norm_epsilon: float = 1e-5
    head_bias_init: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def downsampling(self) -> int:
        """How many times smaller than the image the last feature map is."""
        return downsampling(self.resnet_layers)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Computes logits.

        Args:
            images: [batch, height, width, 3], values in [-1, 1].
            train: as in the other models; here both are the same.

        Returns:
            Logits [batch, num_classes], or where num_classes is 0 the representation [batch,
            2048 * width_factor], in float32.

        Raises:
            UserError: resnet_layers are no numbers of units.
        """
        del train
        check_layers(self.resnet_layers)
        return ResNetV2(
            self.num_classes,
            self.resnet_layers,
            self.width_factor,
            self.group_norm_epsilon,
            self.head_bias_init,
            self.remat,
            self.dtype,
            name="resnet",
        )(images)


def check_layers(layers: Sequence[int]) -> None:
    """Checks that these are units per stage.

    Raises:
        UserError: one of them is no positive integer.
    """
    if not all(isinstance(units, int) and units > 0 for units in layers):
        raise UserError(
            f"resnet_layers {layers} is no list of units per stage: use for example (3, 4, 6, 3)"
        )
