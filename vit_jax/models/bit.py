"""ResNet (BiT), the paper's baseline (Section 4.1), in Flax Linen.

It is the one of Big Transfer (Kolesnikov et al., 2020, arXiv 1912.11370): pre-activation (v2)
units, the same padding on both sides, the names and shapes of its published checkpoints. What the
paper leaves open is as in github.com/google-research/big_transfer.
"""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize
from vit_jax.models import resnet
from vit_jax.models.base import Arrays, Model, ModelConfig, at_least, epsilon, option, width_of
from vit_jax.models.resnet import EXPANSION, ROOT_WIDTH, GroupNorm, StdConv

Array = jax.Array

# Units of the stages, by the depth of "R50x1".
RESNETS = {
    "R50": (3, 4, 6, 3),
    "R101": (3, 4, 23, 3),
    "R152": (3, 8, 36, 3),
    "R200": (3, 24, 36, 3),
}
_ROOT = "resnet/root_block/standardized_conv2d/kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiTConfig(resnet.StagesConfig):
    """Describes a ResNet (BiT).

    It has no dropout, no hidden layer before its head, and takes images of any size.

    Attributes:
        resnet_layers: units of each stage; (3, 4, 6, 3) is ResNet50.
        width_factor: times as many channels everywhere, the 2 of R50x2.
        group_norm_epsilon: 1e-5 in the published code.

    The others are those of `ModelConfig`.
    """

    noun = "ResNet"
    names = f"DEPTHxWIDTH with DEPTH one of {', '.join(RESNETS)}, for example R50x1"
    landmark = _ROOT
    root = "resnet/"
    head = "resnet/head/conv2d"

    width_factor: int = option(1, check=at_least(1))
    group_norm_epsilon: float = option(1e-5, check=epsilon)

    def build(self) -> "ResNet":
        """The module."""
        return ResNet(self)

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        """The fields of "R152x4": any depth of `RESNETS`, any number of times as wide."""
        match = re.fullmatch(rf"({'|'.join(RESNETS)})x([1-9]\d*)", name)
        if not match:
            return None
        layers = {"resnet_layers": RESNETS[match[1]], "width_factor": int(match[2])}
        return {**layers, "group_norm_epsilon": 1e-5}

    def multiply_adds(self, image_size: ImageSize) -> int:
        """The multiply-adds of the feature map and the head."""
        features, _, channels = resnet.multiply_adds(
            self.resnet_layers,
            image_size,
            root_width=ROOT_WIDTH * self.width_factor,
            same=False,
            mix=functools.partial(resnet.convolution, same=False),
        )
        return features + channels * self.num_classes

    @classmethod
    def infer(cls, arrays: Arrays) -> dict[str, Any]:
        """The units of each stage, the width and the head."""
        shape = arrays[_ROOT].shape
        if len(shape) != 4 or shape[3] < 1 or shape[3] % ROOT_WIDTH:
            raise UserError(f"{_ROOT} has shape {shape}, which no ResNet has")
        return {
            "resnet_layers": resnet.count_units(arrays, r"resnet/block(\d+)/.*/c/group_norm/gamma"),
            "width_factor": shape[3] // ROOT_WIDTH,
            "num_classes": width_of(arrays, f"{cls.head}/bias"),
        }


class ConvBlock(nn.Module):
    """A convolution under the name of its block: `root_block`, `proj`."""

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
            standardize=resnet.standardize_bit,
            name="standardized_conv2d",
        )(x)


class ActivatedConvBlock(ConvBlock):
    """GroupNorm and ReLU before a convolution: `a`, `b` and `c` of a unit.

    With shortcut_features a 1 x 1 convolution `proj` of what the ReLU gives is returned too.
    """

    group_norm_epsilon: float = 1e-5
    shortcut_features: int = 0
    shortcut_stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Any:
        """Maps x to [batch, height', width', features], or to that and the shortcut."""
        x = nn.relu(group_norm(self.group_norm_epsilon, self.dtype)(x))
        y = super().__call__(x)
        if not self.shortcut_features:
            return y
        project = ConvBlock(
            self.shortcut_features, 1, self.shortcut_stride, self.dtype, name="proj"
        )
        return y, project(x)


def group_norm(epsilon: float, dtype: Any) -> GroupNorm:
    """A GroupNorm under BiT's names."""
    return GroupNorm(epsilon, dtype=dtype, names=("gamma", "beta"), name="group_norm")


class PreActivationUnit(nn.Module):
    """A bottleneck of a ResNet v2 (He et al., 2016, arXiv 1603.05027) as BiT has it.

    Norm and activation come before each convolution, and before that of the shortcut, too. The
    stride is that of the 3 x 3 convolution.
    """

    config: BiTConfig
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, height, width, channels] to [batch, height', width', 4 * features]."""
        width = EXPANSION * self.features
        if x.shape[-1] != width or self.stride != 1:
            shortcut = {"shortcut_features": width, "shortcut_stride": self.stride}
            y, shortcut = self._block(self.features, 1, 1, "a", **shortcut)(x)
        else:
            y, shortcut = self._block(self.features, 1, 1, "a")(x), x
        y = self._block(self.features, 3, self.stride, "b")(y)
        y = self._block(width, 1, 1, "c")(y)
        return shortcut + y

    def _block(
        self, features: int, size: int, stride: int, name: str, **shortcut: Any
    ) -> ActivatedConvBlock:
        dtype, epsilon = self.config.compute_dtype, self.config.group_norm_epsilon
        return ActivatedConvBlock(features, size, stride, dtype, epsilon, name=name, **shortcut)


class ConvHead(nn.Module):
    """The classifier, in BiT's checkpoints a 1 x 1 convolution; starts at 0."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, channels] to logits [batch, num_classes]."""
        conv = nn.Conv(
            self.config.num_classes,
            (1, 1),
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.config.head_bias_init),
            name="conv2d",
        )
        return conv(x[:, None, None])[:, 0, 0]


class ResNetV2(nn.Module):
    """A BiT model, whose checkpoints have all parameters under `resnet`."""

    config: BiTConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images [batch, height, width, 3] to logits, or to what the head would see."""
        config, dtype = self.config, self.config.compute_dtype
        width = ROOT_WIDTH * config.width_factor
        x = ConvBlock(width, 7, 2, dtype, name="root_block")(images.astype(dtype))
        # With zeros as the published code pads: max_pool itself would pad with minus infinity.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
        x = resnet.apply_stages(x, config, PreActivationUnit, width=width, digits=2)
        x = nn.relu(group_norm(config.group_norm_epsilon, dtype)(x))
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        return ConvHead(config, name="head")(x) if config.num_classes else x


class ResNet(Model):
    """ResNet (BiT), the paper's baseline: an image to the logits of its classes."""

    config: BiTConfig  # ty: ignore[incompatible-mutable-override]

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Computes logits.

        Args:
            images: [batch, height, width, 3], values in [-1, 1].
            train: as in the other models; here both are the same.

        Returns:
            Logits [batch, num_classes], or where num_classes is 0 the representation [batch,
            2048 * width_factor], in float32.
        """
        del train
        return ResNetV2(self.config, name="resnet")(images)
