"""The axial models of Appendix D.6: Axial-ViT and AxialResNet.

Axial attention looks along one axis of the image at a time (Ho et al., 2019, arXiv 1912.12180), so
that its cost grows with the sides of the grid and not with its area: Axial-ViT first along the row
of a token, then along its column; AxialResNet first along the height, then along the width.
"""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import resnet
from vit_jax.models.vit import EncoderBlock, VisionTransformer, linear_head

Array = jax.Array

# Of AxialResNet, in scenic's config and in axial-deeplab.
NUM_HEADS = 8


class AxisBlock(EncoderBlock):
    """A Transformer layer whose tokens attend to those of their own row, or column."""

    along: str = "row"

    def _attend(self, x: Array, deterministic: bool) -> Array:
        batch, tokens, hidden_size = x.shape
        x = x.reshape(batch, *self.positions.grid, hidden_size)
        if self.along == "row":
            x = super()._attend(x, deterministic)
        else:
            x = super()._attend(x.swapaxes(1, 2), deterministic).swapaxes(1, 2)
        return x.reshape(batch, tokens, hidden_size)


class AxialBlock(EncoderBlock):
    """What takes the place of a Transformer layer: row attention + MLP, column attention + MLP."""

    @nn.compact
    def __call__(
        self,
        z: Array,
        deterministic: bool,
        shared: Array | None = None,
        drop_rate: Array | None = None,
    ) -> Array:
        """Maps z [batch, rows * columns, hidden_size] to the same shape; see `EncoderBlock`."""
        z = self._with_positions(z, shared)
        kind = "relative" if self.positions.kind == "relative" else "none"
        for along in ("row", "column"):
            z = AxisBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                gelu=self.gelu,
                layer_norm_epsilon=self.layer_norm_epsilon,
                dtype=self.dtype,
                positions=dataclasses.replace(self.positions, kind=kind),
                along=along,
                name=along,
            )(z, deterministic, None, drop_rate)
        return z


class AxialVisionTransformer(VisionTransformer):
    """Axial-ViT: every layer of a ViT is an `AxialBlock`, so twice as many attend and have an MLP.

    Attributes:
        classifier: "gap". Not in the paper: a class token is in no row and no column, so the
        representation
            is the mean over the patches, which Appendix D.3 found as good.

    The other attributes are those of `VisionTransformer`; num_layers counts the pairs, and the two
    of a pair have the same rate of stochastic depth. The offsets of relative position embeddings
    are along the row or column. Grids need not be square.
    """

    classifier: str = "gap"

    _LAYER = AxialBlock

    def _check(self, shape: tuple[int, ...]) -> None:
        super()._check(shape)
        if self.classifier != "gap":
            raise UserError(
                f"classifier {self.classifier!r} needs a token that is in no row or column of an "
                "axial model: use gap"
            )


class SequenceNorm(resnet.GroupNorm):
    """GroupNorm of each sequence [tokens, channels] on its own: rows stay independent."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, sequences, tokens, channels] to the same shape; float32 inside."""
        *_, channels = x.shape
        scale = self.param(self.names[0], self.scale_init, (channels,))
        bias = self.param(self.names[1], nn.initializers.zeros, (channels,))
        groups = resnet.NUM_GROUPS
        y = x.astype(jnp.float32).reshape(*x.shape[:3], groups, channels // groups)
        y = y - y.mean(axis=(2, 4), keepdims=True)
        variance = jnp.square(y).mean(axis=(2, 4), keepdims=True)
        y = (y * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(self.dtype)


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

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, sequences, tokens, channels] to the same shape."""
        batch, sequences, tokens, channels = x.shape
        head_dim = channels // NUM_HEADS
        init = nn.initializers.normal(stddev=1 / channels)
        kernel = self.param("kernel", init, (channels, 2 * channels))
        qkv = x @ kernel.astype(self.dtype)
        qkv = SequenceNorm(self.epsilon, dtype=self.dtype, name="gn_qkv")(qkv)
        qkv = qkv.reshape(batch, sequences, tokens, NUM_HEADS, 2 * head_dim).swapaxes(2, 3)
        halves = (head_dim // 2, head_dim)
        q, k, v = jnp.split(qkv, halves, axis=-1)  # [batch, sequences, heads, tokens, ...]
        # By slices: converters fold a slice of constants, but not a Split.
        offsets = self._offsets(tokens, head_dim)
        r_q, r_k, r_v = (offsets[..., i:j] for i, j in itertools.pairwise((0, *halves, None)))
        logits = jnp.matmul(q, k.swapaxes(-1, -2))
        logits = logits + jnp.einsum("bshod,opd->bshop", q, r_q)
        logits = logits + jnp.einsum("bshpd,opd->bshop", k, r_k)
        weights = nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)
        y = jnp.matmul(weights, v) + jnp.einsum("bshop,opd->bshod", weights, r_v)
        y = y.swapaxes(2, 3).reshape(x.shape)
        return SequenceNorm(self.epsilon, dtype=self.dtype, name="gn_out")(y)

    def _offsets(self, tokens: int, head_dim: int) -> Array:
        """The embeddings of p - o of q, k and v side by side, [tokens o, tokens p, 2 head_dim]."""
        init = nn.initializers.normal(stddev=1 / head_dim)
        shape = (1, 2 * tokens - 1, 2 * head_dim)
        embedding = self.param("axial_embedding", init, shape)[0].astype(self.dtype)
        o, p = np.indices((tokens, tokens))
        return embedding[p - o + tokens - 1]


class AxialUnit(resnet.BottleneckUnit):
    """A bottleneck that attends along height and width in place of its 3 x 3 convolution.

    Where the convolution has a stride of 2, the mean of 2 x 2 positions follows.
    """

    standardize = staticmethod(resnet.standardize_bit)

    def _mix(self, x: Array) -> Array:
        def attend(name: str) -> PositionSensitiveAttention:
            return PositionSensitiveAttention(self.group_norm_epsilon, self.dtype, name=name)

        x = attend("height")(x.swapaxes(1, 2)).swapaxes(1, 2)
        x = attend("width")(x)
        if self.stride == 1:
            return x
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // self.stride, self.stride, width // self.stride, -1)
        x = x.reshape(*x.shape[:4], self.stride, channels)
        return x.mean(axis=(2, 4), dtype=jnp.float32).astype(self.dtype)


class AxialResNet(nn.Module):
    """AxialResNet (Wang et al., 2020): a ResNet whose 3 x 3 convolutions are axial attention.

    As the authors of the paper published it later (google-research/scenic,
    projects/baselines/axial_resnet.py, after github.com/csrhddlam/axial-deeplab): the hybrids'
    post-activation units with BiT's standardization, the width of ResNet50 and a convolution as its
    root; one term of the attention is the equation's, see `PositionSensitiveAttention`. Its offset
    embeddings are of one resolution.

    Attributes:
        num_classes: width of the head; 0 leaves the head out, and features are returned.
        resnet_layers: units of each stage; (3, 4, 6, 3) is AxialResNet50.
        group_norm_epsilon: 1e-4 in the published code.
        head_bias_init: start value of the head's bias; -10 goes with the sigmoid loss.
        remat: recompute each unit in the backward pass: less memory, about a third more time.
        dtype: of the computation; parameters and logits are always float32.
    """

    num_classes: int
    resnet_layers: tuple[int, ...]
    group_norm_epsilon: float = 1e-4
    head_bias_init: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def downsampling(self) -> int:
        """How many times smaller than the image the last feature map is."""
        return resnet.downsampling(self.resnet_layers)

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
            UserError: resnet_layers are no numbers of units, or the image's sides are not
                multiples of the downsampling.
        """
        del train
        resnet.check_layers(self.resnet_layers)
        height, width = images.shape[1:3]
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"image_size {height if height == width else f'{height}x{width}'} is not a "
                f"multiple of total downsampling {self.downsampling}: use for example "
                f"{max(height // self.downsampling, 1) * self.downsampling}"
            )
        x = resnet.resnet_features(
            images,
            self.resnet_layers,
            group_norm_epsilon=self.group_norm_epsilon,
            remat=self.remat,
            dtype=self.dtype,
            unit=AxialUnit,
        )
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        return linear_head(x, self.num_classes, self.head_bias_init)
