"""The axial models of Appendix D.6: Axial-ViT and AxialResNet.

Axial attention looks along one axis of the image at a time (Ho et al., 2019, arXiv 1912.12180), so
that its cost grows with the sides of the grid and not with its area: Axial-ViT first along the row
of a token, then along its column; AxialResNet first along the height, then along the width.
"""

import dataclasses
import itertools
import math
import re
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize, of_sides
from vit_jax.models import resnet
from vit_jax.models.base import Arrays, Grid, Model, epsilon, linear_head, option, width_of
from vit_jax.models.bit import RESNETS
from vit_jax.models.encoder import EncoderBlock
from vit_jax.models.positions import resize_axis
from vit_jax.models.resnet import GroupNorm
from vit_jax.models.vit import SIZES, VisionTransformer, ViTConfig

Array = jax.Array

# Of AxialResNet, in scenic's config and in axial-deeplab.
NUM_HEADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxialViTConfig(ViTConfig):
    """Describes an Axial-ViT.

    Attributes:
        classifier: "gap". Not in the paper: a class token is in no row and no column, so the
            representation is the mean over the patches, which Appendix D.3 found as good.

    The others are those of `ViTConfig`; num_layers counts the pairs, and the two of a pair have the
    same rate of stochastic depth. The offsets of relative position embeddings are along the row or
    column. Grids need not be square.
    """

    noun = "axial ViT"
    names = "Axial-ViT-SIZE/PATCH"
    formats = ("official",)
    has_patch_embeddings = False
    # The two parts of an axial layer are of one size.
    first_layer = "Transformer/encoderblock_0/row"

    classifier: str = option("gap", choices=("token", "gap"))

    def validate(self) -> None:
        """Checks the classifier too."""
        super().validate()
        if self.classifier != "gap":
            raise UserError(
                f"classifier {self.classifier!r} needs a token that is in no row or column of an "
                "axial model: use gap"
            )

    def build(self) -> "AxialVisionTransformer":
        """The module."""
        return AxialVisionTransformer(self)

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        """The fields of "Axial-ViT-B/16" and so on: any size with any patch size."""
        match = re.fullmatch(rf"Axial-ViT-({'|'.join(SIZES)})/([1-9]\d*)", name)
        if not match:
            return None
        return {"classifier": "gap", "patch_size": int(match[2]), **SIZES[match[1]]}

    def layer_multiply_adds(self, grid: Grid) -> int:
        """The multiply-adds of a pair of layers: a token attends to its row, then to its column."""
        tokens = math.prod(grid)
        return sum(self._attention_and_mlp(tokens, seen=x, offsets=2 * x - 1) for x in grid)

    @classmethod
    def recognizes(cls, arrays: Arrays) -> bool:
        """Tells whether there is a layer along the rows."""
        return any(name.startswith(f"{cls.first_layer}/") for name in arrays)


class AxisBlock(EncoderBlock):
    """A Transformer layer whose tokens attend to those of their own row, or column."""

    along: str = "row"

    def _with_positions(self, z: Array, positions: Array | None) -> Array:
        return z if positions is None else z + positions  # Those of a pair are added before it.

    def _attend(self, x: Array, deterministic: bool) -> Array:
        batch, tokens, hidden_size = x.shape
        x = x.reshape(batch, *self.grid, hidden_size)
        if self.along == "row":
            x = super()._attend(x, deterministic)
        else:
            x = super()._attend(x.swapaxes(1, 2), deterministic).swapaxes(1, 2)
        return x.reshape(batch, tokens, hidden_size)


class AxialBlock(EncoderBlock):
    """The substitute for a Transformer layer: row attention + MLP, column attention + MLP."""

    @nn.compact
    def __call__(
        self,
        z: Array,
        deterministic: bool,
        positions: Array | None = None,
        drop_rate: Array | None = None,
    ) -> Array:
        """Maps z [batch, rows * columns, hidden_size] to the same shape; see `EncoderBlock`."""
        z = self._with_positions(z, positions)
        for along in ("row", "column"):
            layer = AxisBlock(self.config, self.grid, along=along, name=along)
            z = layer(z, deterministic, None, drop_rate)
        return z


class AxialVisionTransformer(VisionTransformer):
    """Axial-ViT: an `AxialBlock` for every layer, so twice as many attend and have an MLP."""

    config: AxialViTConfig  # ty: ignore[incompatible-mutable-override]

    _LAYER: ClassVar[type[EncoderBlock]] = AxialBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxialResNetConfig(resnet.StagesConfig):
    """Describes an AxialResNet (Wang et al., 2020).

    Attributes:
        resnet_layers: units of each stage; (3, 4, 6, 3) is AxialResNet50.
        group_norm_epsilon: 1e-4 in the published code.

    The others are those of `ModelConfig`.
    """

    noun = "axial ResNet"
    names = "AxialResNet50"
    landmark = "block1/unit1/height/kernel"
    resizers: ClassVar = {"axial_embedding": resize_axis}

    group_norm_epsilon: float = option(1e-4, check=epsilon)

    def build(self) -> "AxialResNet":
        """The module."""
        return AxialResNet(self)

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        """The fields of "AxialResNet50", or any other depth of `bit.RESNETS`."""
        match = re.fullmatch(r"AxialResNet(\d+)", name)
        layers = RESNETS.get(f"R{match[1]}") if match else None
        return layers and {"resnet_layers": layers, "group_norm_epsilon": 1e-4}

    def multiply_adds(self, image_size: ImageSize, channels: int = 3) -> int:
        """The multiply-adds of the feature map and the head."""
        features, _, width = resnet.multiply_adds(
            self.resnet_layers, image_size, channels, mix=_attention
        )
        return features + width * self.num_classes

    @classmethod
    def infer(cls, arrays: Arrays) -> dict[str, Any]:
        """The units of each stage and the head."""
        return {
            "resnet_layers": resnet.count_units(arrays, r"block(\d+)/.*/conv1/"),
            "num_classes": width_of(arrays, f"{cls.head}/bias"),
        }

    def image_size(self, arrays: Arrays) -> ImageSize:
        """The size of the images that the embeddings of offsets are for.

        Raises:
            UserError: they are missing.
        """
        sides = []
        for along in ("height", "width"):
            name = f"block1/unit1/{along}/axial_embedding"
            offsets = arrays.get(name)
            if offsets is None or offsets.ndim != 3:
                raise UserError(f"{name} is missing or misshapen: fetch the file again")
            sides.append((offsets.shape[1] + 1) // 2 * resnet.downsampling(()))
        return of_sides(*sides)


def _attention(grid: Grid, features: int, stride: int) -> tuple[int, Grid]:
    """The `resnet.Mix` of attention along height and width."""
    # q and k have half the features: q k, q r and k r are 3/2 of them; v and its r are 2.
    each = (2 * features**2 + x * features * 3 // 2 + x * features * 2 for x in grid)
    height, width = grid
    return height * width * sum(each), (height // stride, width // stride)


class PositionSensitiveAttention(nn.Module):
    """Self-attention along one axis (Wang et al., 2020, arXiv 2003.07853, Eq. 4).

    Queries, keys and values each meet a learned embedding of the offset to the other token:
    y_o = sum_p softmax_p(q_o k_p + q_o r^q_(p-o) + k_p r^k_(p-o)) (v_p + r^v_(p-o)).
    As in their code queries and keys have half the width of the values, the heads share the
    embeddings, and norms around the attention stand in for scaled logits and an output projection.

    As in scenic's `axial_resnet` the norm of the logits is left out, the kernel starts with a
    standard deviation of 1 / channels and the embeddings with 1 / head_dim. (axial-deeplab takes
    the square roots of both.) Unlike there the third term has the key of the other token, k_p, as
    the equation and axial-deeplab have it: scenic's lacks a transpose and takes the token's own.
    """

    config: AxialResNetConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, sequences, tokens, channels] to the same shape."""
        dtype = self.config.compute_dtype
        batch, sequences, tokens, channels = x.shape
        head_dim = channels // NUM_HEADS
        init = nn.initializers.normal(stddev=1 / channels)
        kernel = self.param("kernel", init, (channels, 2 * channels))
        qkv = self._norm("gn_qkv")(x @ kernel.astype(dtype))
        qkv = qkv.reshape(batch, sequences, tokens, NUM_HEADS, 2 * head_dim).swapaxes(2, 3)
        halves = (head_dim // 2, head_dim)
        q, k, v = jnp.split(qkv, halves, axis=-1)  # [batch, sequences, heads, tokens, ...]
        # By slices: converters fold a slice of constants, but not a Split.
        offsets = self._offsets(tokens, head_dim)
        r_q, r_k, r_v = (offsets[..., i:j] for i, j in itertools.pairwise((0, *halves, None)))
        logits = jnp.matmul(q, k.swapaxes(-1, -2))
        logits = logits + jnp.einsum("bshod,opd->bshop", q, r_q)
        logits = logits + jnp.einsum("bshpd,opd->bshop", k, r_k)
        weights = nn.softmax(logits.astype(jnp.float32)).astype(dtype)
        y = jnp.matmul(weights, v) + jnp.einsum("bshop,opd->bshod", weights, r_v)
        y = y.swapaxes(2, 3).reshape(x.shape)
        return self._norm("gn_out")(y)

    def _norm(self, name: str) -> GroupNorm:
        """Makes a normalization of each sequence on its own."""
        config = self.config
        return GroupNorm(
            config.group_norm_epsilon, dtype=config.compute_dtype, batch_axes=2, name=name
        )

    def _offsets(self, tokens: int, head_dim: int) -> Array:
        """The embeddings of p - o of q, k and v side by side, [tokens o, tokens p, 2 head_dim]."""
        init = nn.initializers.normal(stddev=1 / head_dim)
        shape = (1, 2 * tokens - 1, 2 * head_dim)
        embedding = self.param("axial_embedding", init, shape)[0]
        embedding = embedding.astype(self.config.compute_dtype)
        o, p = np.indices((tokens, tokens))
        return embedding[p - o + tokens - 1]


class AxialUnit(resnet.BottleneckUnit):
    """A bottleneck that attends along height and width in place of its 3 x 3 convolution.

    Where the convolution has a stride of 2, the mean of 2 x 2 positions follows.
    """

    standardize = staticmethod(resnet.standardize_bit)

    config: AxialResNetConfig  # ty: ignore[incompatible-mutable-override]

    def _mix(self, x: Array) -> Array:
        along_height = PositionSensitiveAttention(self.config, name="height")
        x = along_height(x.swapaxes(1, 2)).swapaxes(1, 2)
        x = PositionSensitiveAttention(self.config, name="width")(x)
        if self.stride == 1:
            return x
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // self.stride, self.stride, width // self.stride, -1)
        x = x.reshape(*x.shape[:4], self.stride, channels)
        return x.mean(axis=(2, 4), dtype=jnp.float32).astype(self.config.compute_dtype)


class AxialResNet(Model):
    """AxialResNet: a ResNet whose 3 x 3 convolutions are axial attention.

    As the authors of the paper published it later (google-research/scenic,
    projects/baselines/axial_resnet.py, after github.com/csrhddlam/axial-deeplab): the hybrids'
    post-activation units with BiT's standardization, the width of ResNet50 and a convolution as its
    root; one term of the attention is the equation's, see `PositionSensitiveAttention`. Its offset
    embeddings are of one resolution.
    """

    config: AxialResNetConfig  # ty: ignore[incompatible-mutable-override]

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Computes logits.

        Args:
            images: [batch, height, width, 3], values in [-1, 1].
            train: as in the other models; here both are the same.

        Returns:
            Logits [batch, num_classes], or where num_classes is 0 the representation [batch, 2048]
            of AxialResNet50, in float32.

        Raises:
            UserError: the image's sides are not multiples of the downsampling.
        """
        del train
        height, width = images.shape[1:3]
        step = self.downsampling
        if height % step or width % step:
            raise UserError(
                f"image_size {of_sides(height, width)} is not a multiple of total downsampling "
                f"{step}: use for example "
                f"{of_sides(max(height // step, 1) * step, max(width // step, 1) * step)}"
            )
        x = resnet.resnet_features(images, self.config, unit=AxialUnit)
        return linear_head(x.astype(jnp.float32).mean(axis=(1, 2)), self.config)
