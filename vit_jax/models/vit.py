"""The Vision Transformer of the paper, in Flax Linen.

Section and equation numbers are those of "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR
2021). Parameter names and shapes are those of the official checkpoints, so loading one is a plain
tree match; the forward pass fuses and reshapes where that is faster, which leaves the tree alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.positions import (
    PositionEmbedding,
    Positions,
    RelativePositionBias,
    check_positions,
)

Array = jax.Array


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form, which the official checkpoints were trained with."""
    return nn.gelu(x, approximate=True)


def gelu_erf(x: Array) -> Array:
    """GELU in its exact form, which timm and Hugging Face use.

    Written with erf because jax.nn.gelu uses erfc, which ONNX does not have.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * jnp.asarray(2.0**-0.5, x.dtype)))


GELU = {"tanh": gelu_tanh, "erf": gelu_erf}


class PatchEmbedding(nn.Module):
    """E of Eq. 1: cuts images into patches and maps each to `hidden_size` features."""

    patch_size: int
    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images [batch, height, width, channels] to [batch, patches, hidden_size]."""
        batch, height, width, channels = images.shape
        size = self.patch_size
        shape = (size, size, channels, self.hidden_size)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.hidden_size,)).astype(self.dtype)
        rows, columns = height // size, width // size
        # A strided convolution without overlap is one product of flattened patches.
        x = images.astype(self.dtype).reshape(batch, rows, size, columns, size, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, size * size * channels)
        return x @ kernel.reshape(-1, self.hidden_size) + bias


class HeadProjection(nn.Module):
    """The parameters of one of the q, k, v projections, flattened over the heads."""

    num_heads: int

    @nn.compact
    def __call__(self, hidden_size: int) -> tuple[Array, Array]:
        """Returns a kernel [hidden_size, hidden_size] and a bias [hidden_size]."""
        heads = (self.num_heads, hidden_size // self.num_heads)
        init = nn.initializers.xavier_uniform(in_axis=0, out_axis=(1, 2))
        kernel = self.param("kernel", init, (hidden_size, *heads))
        bias = self.param("bias", nn.initializers.zeros, heads)
        return kernel.reshape(hidden_size, hidden_size), bias.reshape(hidden_size)


class OutputProjection(nn.Module):
    """U_msa of Eq. 8: joins the heads."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, ..., tokens, hidden_size], heads side by side, to the same shape."""
        hidden_size = x.shape[-1]
        shape = (self.num_heads, hidden_size // self.num_heads, hidden_size)
        init = nn.initializers.xavier_uniform(in_axis=(0, 1), out_axis=2)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (hidden_size,)).astype(self.dtype)
        return x @ kernel.reshape(hidden_size, hidden_size) + bias


class MultiHeadSelfAttention(nn.Module):
    """MSA of Appendix A.

    The attention weights [batch, ..., heads, tokens, tokens] are sown as
    `intermediates/attention_weights`: they cost nothing unless somebody asks for them.
    """

    num_heads: int
    attention_dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    positions: Positions = Positions()

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps x [batch, ..., tokens, hidden_size] to the same shape."""
        *batch, tokens, hidden_size = x.shape
        kernels, biases = zip(
            *(
                HeadProjection(self.num_heads, name=name)(hidden_size)
                for name in ("query", "key", "value")
            ),
            strict=True,
        )
        # Eq. 5: the three projections as one product.
        qkv = x @ jnp.concatenate(kernels, axis=1).astype(self.dtype)
        qkv = qkv + jnp.concatenate(biases).astype(self.dtype)
        heads = (*batch, tokens, self.num_heads, hidden_size // self.num_heads)
        q, k, v = (x.reshape(heads).swapaxes(-3, -2) for x in jnp.split(qkv, 3, axis=-1))
        # Eq. 6. Scaling q, not the product, keeps 16-bit logits in range and lets TensorRT fuse.
        q = q * heads[-1] ** -0.5
        logits = jnp.matmul(q, k.swapaxes(-1, -2))
        if self.positions.kind == "relative":
            bias = RelativePositionBias(self.positions, self.dtype, name="relative")
            logits = logits + bias(q)
        weights = nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)
        self.sow("intermediates", "attention_weights", weights)
        weights = nn.Dropout(self.attention_dropout_rate)(weights, deterministic)
        # Eqs. 7 and 8.
        x = jnp.matmul(weights, v).swapaxes(-3, -2).reshape(*batch, tokens, hidden_size)
        return OutputProjection(self.num_heads, self.dtype, name="out")(x)


class MlpBlock(nn.Module):
    """The MLP of Eq. 3: two layers with a GELU in between."""

    mlp_dim: int
    dropout_rate: float = 0.0
    gelu: str = "tanh"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape."""
        init = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(stddev=1e-6),
            "dtype": self.dtype,
        }
        hidden_size = x.shape[-1]
        x = GELU[self.gelu](nn.Dense(self.mlp_dim, **init, name="Dense_0")(x))
        x = nn.Dropout(self.dropout_rate)(x, deterministic)
        x = nn.Dense(hidden_size, **init, name="Dense_1")(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic)


class EncoderBlock(nn.Module):
    """One Transformer layer, Eqs. 2 and 3."""

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    gelu: str = "tanh"
    layer_norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    positions: Positions = Positions()

    @nn.compact
    def __call__(
        self,
        z: Array,
        deterministic: bool,
        shared: Array | None = None,
        drop_rate: Array | None = None,
    ) -> Array:
        """Maps z [batch, tokens, hidden_size] to the same shape.

        Args:
            z: the tokens.
            deterministic: whether dropout and stochastic depth are off.
            shared: position embeddings to be added before the layer, [1, tokens, hidden_size].
            drop_rate: of stochastic depth, None where the model has none.
        """
        z = self._with_positions(z, shared)
        # Eq. 2
        x = layer_norm(self.layer_norm_epsilon, self.dtype, "LayerNorm_0")(z)
        x = self._attend(x, deterministic)
        x = nn.Dropout(self.dropout_rate)(x, deterministic)
        z = z + StochasticDepth()(x, drop_rate, deterministic)
        # Eq. 3
        x = layer_norm(self.layer_norm_epsilon, self.dtype, "LayerNorm_2")(z)
        mlp = MlpBlock(self.mlp_dim, self.dropout_rate, self.gelu, self.dtype, name="MlpBlock_3")
        return z + StochasticDepth()(mlp(x, deterministic), drop_rate, deterministic)

    def _with_positions(self, z: Array, shared: Array | None) -> Array:
        if self.positions.added and self.positions.placement == "layers":
            shared = PositionEmbedding(self.positions, self.dtype, name="posembed")(z)
        return z if shared is None else z + shared

    def _attend(self, x: Array, deterministic: bool) -> Array:
        return MultiHeadSelfAttention(
            self.num_heads,
            self.attention_dropout_rate,
            self.dtype,
            self.positions,
            name="MultiHeadDotProductAttention_1",
        )(x, deterministic)


class StochasticDepth(nn.Module):
    """Leaves a residual branch out for some of the images (Huang et al., 2016, arXiv 1603.09382).

    Where it stays it is divided by the probability to stay, so that the expectation is the branch.
    """

    @nn.compact
    def __call__(self, x: Array, rate: Array | None, deterministic: bool) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape; None for no rate."""
        if rate is None or deterministic:
            return x
        stays = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, (x.shape[0], 1, 1))
        return x * (stays / (1.0 - rate)).astype(x.dtype)


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """A LayerNorm whose variance is mean((x - mean)^2): E[x^2] - E[x]^2 cancels in 16 bits."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Encoder(nn.Module):
    """Position embeddings, `num_layers` Transformer layers and the last LayerNorm (Eqs. 1 to 4)."""

    num_layers: int
    block: dict[str, Any]
    dropout_rate: float = 0.0
    layer_norm_epsilon: float = 1e-6
    remat: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32
    positions: Positions = Positions()
    stochastic_depth: float = 0.0
    layer: type[EncoderBlock] = EncoderBlock

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps tokens [batch, tokens, hidden_size] to the same shape."""
        shared, drop_rates = None, None
        if self.positions.added and self.positions.placement != "layers":
            embed = PositionEmbedding(self.positions, self.dtype, name="posembed_input")
            if self.positions.placement == "stem":
                x = x + embed(x)
            else:
                shared = embed(x)
        if self.stochastic_depth:
            drop_rates = np.linspace(0, self.stochastic_depth, self.num_layers, dtype=np.float32)
        x = nn.Dropout(self.dropout_rate)(x, deterministic)
        block = nn.remat(self.layer, static_argnums=(2,)) if self.remat else self.layer
        if self.scan_layers:
            x, _ = nn.scan(
                lambda layer, carry, *rest: (layer(carry, deterministic, *rest), None),
                in_axes=(nn.broadcast, 0),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.num_layers,
            )(block(**self.block, name="encoderblock"), x, shared, drop_rates)
        else:
            for i in range(self.num_layers):
                rate = None if drop_rates is None else drop_rates[i]
                layer = block(**self.block, name=f"encoderblock_{i}")
                x = layer(x, deterministic, shared, rate)
        return layer_norm(self.layer_norm_epsilon, self.dtype, "encoder_norm")(x)  # Eq. 4


def stack_layers(variables: dict[str, Any]) -> dict[str, Any]:
    """Joins encoderblock_0, encoderblock_1 ... to one `encoderblock` with a leading layer axis."""
    params = dict(variables["params"])
    num_layers = sum(name.startswith("encoderblock_") for name in params)
    layers = [params.pop(f"encoderblock_{i}") for i in range(num_layers)]
    if layers:
        params["encoderblock"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {**variables, "params": params}


def unstack_layers(variables: dict[str, Any]) -> dict[str, Any]:
    """Undoes `stack_layers`."""
    params = dict(variables["params"])
    stacked = params.pop("encoderblock", None)
    for i in range(0 if stacked is None else len(jax.tree.leaves(stacked)[0])):
        params[f"encoderblock_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**variables, "params": params}


def linear_head(x: Array, num_classes: int, bias_init: float) -> Array:
    """The logits of features x [batch, features], to be called in a compact method of a module.

    The kernel starts at zero; where num_classes is 0 there is no head, and x is returned.
    """
    if not num_classes:
        return x
    return nn.Dense(
        num_classes,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias_init),
        name="head",
    )(x)


class VisionTransformer(nn.Module):
    """ViT (Section 3.1): an image to the logits of its classes.

    Attributes:
        num_classes: width of the head; 0 leaves the head out, and features are returned.
        patch_size: side of a square patch in pixels; the image's sides must be multiples of it.
        hidden_size: width D of every token.
        num_layers: number of Transformer layers L.
        mlp_dim: width of the hidden layer of each MLP.
        num_heads: attention heads; must divide hidden_size.
        classifier: "token" (class token) or "gap" (mean over the patches, Appendix D.3).
        representation_size: width of the tanh layer of the pre-training head (`pre_logits`); 0 for
            none, as in fine-tuning.
        dropout_rate: after every dense layer except the q, k, v projections, and after adding the
            position embeddings (Appendix B.1). As in the published code, the head has none and the
            MLP's first dropout comes after its GELU.
        attention_dropout_rate: dropout of the attention weights; the paper has none.
        stochastic_depth: rate at which the last layer's two residual branches are each left out for
            an image in training; from the first layer, 0, it grows linearly. The paper has none.
        position_embedding: "learned" (1D), "none", "2d", "relative" or "sincos2d" (Appendix D.4),
            see `positions.Positions`.
        position_placement: "stem", "layers" or "shared" (Table 8).
        gelu: "tanh" (official checkpoints) or "erf" (timm, Hugging Face).
        layer_norm_epsilon: 1e-6 in the official and timm checkpoints, 1e-12 in Hugging Face's.
        head_bias_init: start value of the head's bias; -10 goes with the sigmoid loss.
        remat: recompute each layer in the backward pass: less memory, about a third more time.
        scan_layers: compile one layer and loop over it; the parameter tree does not change.
        dtype: of the computation; parameters and logits are always float32.
    """

    num_classes: int
    patch_size: int
    hidden_size: int
    num_layers: int
    mlp_dim: int
    num_heads: int
    classifier: str = "token"
    representation_size: int = 0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth: float = 0.0
    position_embedding: str = "learned"
    position_placement: str = "stem"
    gelu: str = "tanh"
    layer_norm_epsilon: float = 1e-6
    head_bias_init: float = 0.0
    remat: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32

    _LAYER = EncoderBlock

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square of the image that becomes one token."""
        return self.patch_size

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Computes logits.

        Args:
            images: [batch, height, width, 3], values in [-1, 1].
            train: whether dropout is on; then the "dropout" RNG is needed.

        Returns:
            Logits [batch, num_classes], or where num_classes is 0 the representation [batch,
            representation_size or hidden_size], in float32.

        Raises:
            UserError: the image's sides are not multiples of the downsampling, hidden_size is not a
                multiple of num_heads, or classifier, gelu or position_embedding is unknown.
        """
        self._check(images.shape)
        x, grid = self._embed(images)
        x = self._encode(x, grid, train)
        x = x[:, 0] if self.classifier == "token" else x.mean(axis=1)  # y of Eq. 4
        if self.representation_size:
            x = nn.tanh(nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x))
        return linear_head(x.astype(jnp.float32), self.num_classes, self.head_bias_init)

    def _stem(self, images: Array) -> Array:
        """What the patches are cut from."""
        return images

    def _embed(self, images: Array) -> tuple[Array, tuple[int, int]]:
        """The patch embeddings [batch, patches, hidden_size], and their rows and columns."""
        x = self._stem(images)
        grid = x.shape[1] // self.patch_size, x.shape[2] // self.patch_size
        embedding = PatchEmbedding(self.patch_size, self.hidden_size, self.dtype, name="embedding")
        return embedding(x), grid

    def _encode(self, x: Array, grid: tuple[int, int], train: bool) -> Array:
        """The encoder's output for patch embeddings x: the class token, if any, comes first."""
        if self.classifier == "token":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
            patches = x.shape[1]
            # [x_class; x_p E] of Eq. 1, by padding: a concatenation would have to broadcast the
            # token to the batch size, which costs Shape and Expand nodes in an exported graph.
            x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
            x = x + jnp.pad(cls, ((0, 0), (0, patches), (0, 0))).astype(self.dtype)
        return self._encoder(grid)(x, not train)

    def _encoder(self, grid: tuple[int, int]) -> nn.Module:
        shared = {
            "positions": Positions(
                self.position_embedding,
                self.position_placement,
                grid,
                has_class=self.classifier == "token",
            ),
            "dropout_rate": self.dropout_rate,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "dtype": self.dtype,
        }
        block = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "attention_dropout_rate": self.attention_dropout_rate,
            "gelu": self.gelu,
            **shared,
        }
        encoder = Encoder
        if self.scan_layers:
            encoder = nn.map_variables(
                Encoder,
                "params",
                trans_in_fn=stack_layers,
                trans_out_fn=unstack_layers,
                init=self.is_initializing(),
                mutable=self.is_initializing(),
            )
        return encoder(
            self.num_layers,
            block,
            remat=self.remat,
            scan_layers=self.scan_layers,
            stochastic_depth=self.stochastic_depth,
            layer=self._LAYER,
            name="Transformer",
            **shared,
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        height, width = shape[1:3]
        step = self.downsampling
        if height % step or width % step:
            below = max(height // step, 1) * step
            size = height if height == width else f"{height}x{width}"
            rule = f"patch_size {step}" if step == self.patch_size else f"total downsampling {step}"
            raise UserError(
                f"image_size {size} is not a multiple of {rule}: use {below} or {below + step}"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.classifier not in ("token", "gap"):
            raise UserError(f"classifier {self.classifier!r} is unknown: use token or gap")
        check_positions(self.position_embedding, self.position_placement)
        parts = {"2d": 2, "sincos2d": 4}.get(self.position_embedding, 1)
        if self.hidden_size % parts:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of {parts}, the parts of "
                f"position_embedding {self.position_embedding}"
            )
        if self.gelu not in GELU:
            raise UserError(f"gelu {self.gelu!r} is unknown: use {' or '.join(GELU)}")
