"""The Vision Transformer of the paper, in Flax Linen.

Section and equation numbers are those of "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR
2021). Parameter names and shapes are those of the official checkpoints, so loading one is a plain
tree match; the forward pass fuses and reshapes where that is faster, which leaves the tree alone.
"""

import dataclasses
import math
import re
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.base import (
    USUAL_IMAGE_SIZE,
    Arrays,
    Grid,
    Model,
    ModelConfig,
    at_least,
    fraction,
    linear_head,
    option,
    width_of,
)
from vit_jax.models.positions import (
    ADDED,
    PLACEMENTS,
    POSITION_EMBEDDINGS,
    RESIZERS,
    PositionEmbedding,
    RelativePositionBias,
    check_placement,
)

Array = jax.Array

# Table 1; Ti and S are from later work (DeiT, AugReg). b, of Figure 4, is B with every hidden size
# halved, which is S: with half the heads, as all these have heads of 64 (H of 80).
SIZES = {
    "Ti": {"hidden_size": 192, "num_layers": 12, "mlp_dim": 768, "num_heads": 3},
    "S": {"hidden_size": 384, "num_layers": 12, "mlp_dim": 1536, "num_heads": 6},
    "b": {"hidden_size": 384, "num_layers": 12, "mlp_dim": 1536, "num_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "mlp_dim": 3072, "num_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "mlp_dim": 4096, "num_heads": 16},
    "H": {"hidden_size": 1280, "num_layers": 32, "mlp_dim": 5120, "num_heads": 16},
}
HEAD_SIZE = 64
POSITIONS = "Transformer/posembed_input/pos_embedding"


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form, which the official checkpoints were trained with."""
    return nn.gelu(x, approximate=True)


def gelu_erf(x: Array) -> Array:
    """GELU in its exact form, which timm and Hugging Face use.

    Written with erf because jax.nn.gelu uses erfc, which ONNX does not have.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * jnp.asarray(2.0**-0.5, x.dtype)))


GELU = {"tanh": gelu_tanh, "erf": gelu_erf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """Describes a Vision Transformer (Section 3.1); its defaults are the paper's.

    Attributes:
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
            see `models.positions`.
        position_placement: "stem", "layers" or "shared" (Table 8).
        gelu: "tanh" (official checkpoints) or "erf" (timm, Hugging Face).
        layer_norm_epsilon: 1e-6 in the official and timm checkpoints, 1e-12 in Hugging Face's.
        scan_layers: compile one layer and loop over it; the parameter tree does not change.

    The others are those of `ModelConfig`.
    """

    noun = "ViT"
    names = (
        f"ViT-SIZE/PATCH with SIZE one of {', '.join(SIZES)}, for example ViT-B/16, or "
        "ViT-LAYERS-WIDTH-MLP/PATCH"
    )
    landmark = "embedding/kernel"
    formats = ("official", "timm", "huggingface")
    embeds_pixels = True
    has_patch_embeddings = True
    resizers = RESIZERS
    # Where the arrays of a layer's attention and MLP are from which `infer` tells sizes.
    first_layer: ClassVar[str] = "Transformer/encoderblock_0"

    patch_size: int = option(check=at_least(1))
    hidden_size: int = option(check=at_least(1))
    num_layers: int = option(check=at_least(1))
    mlp_dim: int = option(check=at_least(1))
    num_heads: int = option(check=at_least(1))
    classifier: str = option("token", choices=("token", "gap"))
    representation_size: int = option(0, check=at_least(0))
    dropout_rate: float = option(0.0, check=fraction, training_only=True)
    attention_dropout_rate: float = option(0.0, check=fraction, training_only=True)
    stochastic_depth: float = option(0.0, check=fraction, training_only=True)
    position_embedding: str = option("learned", choices=POSITION_EMBEDDINGS)
    position_placement: str = option("stem", choices=PLACEMENTS)
    gelu: str = option("tanh", choices=tuple(GELU))
    layer_norm_epsilon: float = option(1e-6)
    scan_layers: bool = option(False, training_only=True)

    def validate(self) -> None:
        """Checks that the sizes, and the position embeddings and their place, go together."""
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        check_placement(self.position_embedding, self.position_placement)
        parts = {"2d": 2, "sincos2d": 4}.get(self.position_embedding, 1)
        if self.hidden_size % parts:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of {parts}, the parts of "
                f"position_embedding {self.position_embedding}"
            )

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square of the image that becomes one token."""
        return self.patch_size

    @property
    def has_class(self) -> bool:
        """Whether a class token precedes the patches."""
        return self.classifier == "token"

    def grid(self, height: int, width: int) -> Grid:
        """The rows and columns of patches of an image.

        Raises:
            UserError: its sides are not multiples of the downsampling.
        """
        step = self.downsampling
        if height % step or width % step:
            below = max(height // step, 1) * step
            size = height if height == width else f"{height}x{width}"
            rule = f"patch_size {step}" if step == self.patch_size else f"total downsampling {step}"
            raise UserError(
                f"image_size {size} is not a multiple of {rule}: use {below} or {below + step}"
            )
        return height // step, width // step

    def build(self) -> "VisionTransformer":
        """The module."""
        return VisionTransformer(self)

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        """The fields of "ViT-B/16", any size with any patch size.

        Or of any shape, as layers, width and MLP width: "ViT-8-1024-2048/32" is where Appendix D.2
        starts; heads are of 64, the width a multiple of that.
        """
        if match := re.fullmatch(rf"ViT-({'|'.join(SIZES)})/([1-9]\d*)", name):
            return {"patch_size": int(match[2]), **SIZES[match[1]]}
        match = re.fullmatch(r"ViT-([1-9]\d*)-([1-9]\d*)-([1-9]\d*)/([1-9]\d*)", name)
        if not match:
            return None
        num_layers, hidden_size, mlp_dim, patch_size = map(int, match.groups())
        if hidden_size % HEAD_SIZE:
            raise UserError(f"model {name!r} has a width that is not a multiple of {HEAD_SIZE}")
        return {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "mlp_dim": mlp_dim,
            "num_heads": hidden_size // HEAD_SIZE,
        }

    def multiply_adds(self, image_size: int) -> int:
        """Those of the patch embedding, the layers and the head."""
        stem, side, channels = self.stem_multiply_adds(image_size)
        patches = (side // self.patch_size) ** 2
        embedding = patches * channels * self.patch_size**2 * self.hidden_size
        layers = self.num_layers * self.layer_multiply_adds(side // self.patch_size)
        width, hidden = self.hidden_size, self.representation_size
        return stem + embedding + layers + width * hidden + (hidden or width) * self.num_classes

    def stem_multiply_adds(self, image_size: int) -> tuple[int, int, int]:
        """Those of what the patches are cut from, and its side and channels."""
        return 0, image_size, 3

    def layer_multiply_adds(self, side: int) -> int:
        """Those of a layer for a square of side * side patches."""
        tokens = side**2 + self.has_class
        return self._attention_and_mlp(tokens, seen=tokens, offsets=2 * side**2 - 1)

    def _attention_and_mlp(self, tokens: int, seen: int, offsets: int) -> int:
        """Those of tokens that each attend to some, which are so many offsets apart."""
        width = self.hidden_size
        total = tokens * width * (4 * width + 2 * self.mlp_dim) + 2 * tokens * seen * width
        if self.position_embedding == "relative":
            total += (tokens - self.has_class) * offsets * width
        return total

    @classmethod
    def recognizes(cls, arrays: Arrays) -> bool:
        """Whether there are layers that attend to all patches, on the image itself."""
        return _query(cls.first_layer) in arrays and "conv_root/kernel" not in arrays

    @classmethod
    def infer(cls, arrays: Arrays) -> dict[str, Any]:
        """The sizes, classifier and head."""
        telling = {
            "embedding/kernel": 4,
            _query(cls.first_layer): 3,
            f"{cls.first_layer}/MlpBlock_3/Dense_0/kernel": 2,
        }
        for name, rank in telling.items():
            if name not in arrays:
                raise UserError(f"{name} is missing: this is no whole ViT, fetch it again")
            if arrays[name].ndim != rank or 0 in arrays[name].shape:
                raise UserError(f"{name} has shape {arrays[name].shape}, which no ViT has")
        kernel, query, dense = (arrays[name].shape for name in telling)
        layers = {
            name.split("/")[1] for name in arrays if name.startswith("Transformer/encoderblock_")
        }
        return {
            "patch_size": kernel[0],
            "hidden_size": kernel[-1],
            "num_layers": len(layers),
            "mlp_dim": dense[1],
            "num_heads": query[1],
            "num_classes": width_of(arrays, "head/bias"),
            "classifier": "token" if "cls" in arrays else "gap",
            "representation_size": width_of(arrays, "pre_logits/bias"),
        }

    def image_size(self, arrays: Arrays) -> int:
        """The side in pixels of the images that the position embeddings are for.

        Raises:
            UserError: they are missing, or not those of a square.
        """
        if self.position_embedding in ("none", "sincos2d"):
            return USUAL_IMAGE_SIZE
        positions = arrays.get(POSITIONS)
        if positions is None or positions.ndim != 3:
            raise UserError(f"{POSITIONS} is missing or misshapen: fetch the file again")
        patches = positions.shape[1] - ("cls" in arrays)
        side = math.isqrt(max(patches, 0))
        if side < 1 or side**2 != patches:
            raise UserError(
                f"{POSITIONS} has {positions.shape[1]} tokens, which are no square of patches: "
                "only models for square images are read"
            )
        return side * self.downsampling


def _query(layer: str) -> str:
    return f"{layer}/MultiHeadDotProductAttention_1/query/kernel"


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

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps x [batch, ..., tokens, hidden_size] to the same shape."""
        config, dtype = self.config, self.config.compute_dtype
        *batch, tokens, hidden_size = x.shape
        kernels, biases = zip(
            *(
                HeadProjection(config.num_heads, name=name)(hidden_size)
                for name in ("query", "key", "value")
            ),
            strict=True,
        )
        # Eq. 5: the three projections as one product.
        qkv = x @ jnp.concatenate(kernels, axis=1).astype(dtype)
        qkv = qkv + jnp.concatenate(biases).astype(dtype)
        heads = (*batch, tokens, config.num_heads, hidden_size // config.num_heads)
        q, k, v = (x.reshape(heads).swapaxes(-3, -2) for x in jnp.split(qkv, 3, axis=-1))
        # Eq. 6. Scaling q, not the product, keeps 16-bit logits in range and lets TensorRT fuse.
        q = q * heads[-1] ** -0.5
        logits = jnp.matmul(q, k.swapaxes(-1, -2))
        if config.position_embedding == "relative":
            bias = RelativePositionBias(config.has_class, dtype, name="relative")
            logits = logits + bias(q)
        weights = nn.softmax(logits.astype(jnp.float32)).astype(dtype)
        self.sow("intermediates", "attention_weights", weights)
        weights = nn.Dropout(config.attention_dropout_rate)(weights, deterministic)
        # Eqs. 7 and 8.
        x = jnp.matmul(weights, v).swapaxes(-3, -2).reshape(*batch, tokens, hidden_size)
        return OutputProjection(config.num_heads, dtype, name="out")(x)


class MlpBlock(nn.Module):
    """The MLP of Eq. 3: two layers with a GELU in between."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape."""
        config = self.config
        x = GELU[config.gelu](self._dense(config.mlp_dim, "Dense_0")(x))
        x = nn.Dropout(config.dropout_rate)(x, deterministic)
        x = self._dense(config.hidden_size, "Dense_1")(x)
        return nn.Dropout(config.dropout_rate)(x, deterministic)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(stddev=1e-6),
            dtype=self.config.compute_dtype,
            name=name,
        )


class EncoderBlock(nn.Module):
    """One Transformer layer, Eqs. 2 and 3.

    Attributes:
        config: the description of the model.
        grid: rows and columns of its patches.
    """

    config: ViTConfig
    grid: Grid

    @nn.compact
    def __call__(
        self,
        z: Array,
        deterministic: bool,
        positions: Array | None = None,
        drop_rate: Array | None = None,
    ) -> Array:
        """Maps z [batch, tokens, hidden_size] to the same shape.

        Args:
            z: the tokens.
            deterministic: whether dropout and stochastic depth are off.
            positions: the embeddings, [1, tokens, hidden_size], that every layer begins with adding
                where it has none of its own.
            drop_rate: of stochastic depth, None where the model has none.
        """
        z = self._with_positions(z, positions)
        # Eq. 2
        x = layer_norm(self.config, "LayerNorm_0")(z)
        x = self._attend(x, deterministic)
        x = nn.Dropout(self.config.dropout_rate)(x, deterministic)
        z = z + StochasticDepth()(x, drop_rate, deterministic)
        # Eq. 3
        x = layer_norm(self.config, "LayerNorm_2")(z)
        x = MlpBlock(self.config, name="MlpBlock_3")(x, deterministic)
        return z + StochasticDepth()(x, drop_rate, deterministic)

    def _with_positions(self, z: Array, positions: Array | None) -> Array:
        if self.config.position_placement == "layers":
            positions = position_embedding(self.config, self.grid, name="posembed")(z)
        return z if positions is None else z + positions

    def _attend(self, x: Array, deterministic: bool) -> Array:
        attention = MultiHeadSelfAttention(self.config, name="MultiHeadDotProductAttention_1")
        return attention(x, deterministic)


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


def layer_norm(config: ViTConfig, name: str | None = None) -> nn.LayerNorm:
    """A LayerNorm whose variance is mean((x - mean)^2): E[x^2] - E[x]^2 cancels in 16 bits."""
    return nn.LayerNorm(
        epsilon=config.layer_norm_epsilon,
        dtype=config.compute_dtype,
        use_fast_variance=False,
        name=name,
    )


def position_embedding(config: ViTConfig, grid: Grid, name: str) -> PositionEmbedding:
    """The module of the embeddings that a model adds to its tokens."""
    return PositionEmbedding(
        config.position_embedding, grid, config.has_class, config.compute_dtype, name=name
    )


class Encoder(nn.Module):
    """The tokens, `num_layers` Transformer layers and the last LayerNorm (Eqs. 1 to 4).

    Attributes:
        config: the description of the model.
        grid: rows and columns of its patches.
        layer: what the layers are.
    """

    config: ViTConfig
    grid: Grid
    layer: type[EncoderBlock] = EncoderBlock

    @nn.compact
    def __call__(self, patches: Array, cls: Array | None, deterministic: bool) -> Array:
        """Maps patch embeddings to the tokens after the last layer.

        Args:
            patches: x_p E, [batch, patches, hidden_size].
            cls: the class token x_class, [1, 1, hidden_size], None for no class token.
            deterministic: whether dropout and stochastic depth are off.

        Returns:
            [batch, tokens, hidden_size], the class token first.
        """
        config = self.config
        z, positions = self._tokens(patches, cls)
        z = nn.Dropout(config.dropout_rate)(z, deterministic)
        drop_rates = None
        if config.stochastic_depth:
            drop_rates = np.linspace(
                0, config.stochastic_depth, config.num_layers, dtype=np.float32
            )
        block = nn.remat(self.layer, static_argnums=(2,)) if config.remat else self.layer
        if config.scan_layers:
            z, _ = nn.scan(
                lambda layer, carry, *rest: (layer(carry, deterministic, *rest), None),
                in_axes=(nn.broadcast, 0),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=config.num_layers,
            )(block(config, self.grid, name="encoderblock"), z, positions, drop_rates)
        else:
            for i in range(config.num_layers):
                rate = None if drop_rates is None else drop_rates[i]
                layer = block(config, self.grid, name=f"encoderblock_{i}")
                z = layer(z, deterministic, positions, rate)
        return layer_norm(config, "encoder_norm")(z)  # Eq. 4

    def _tokens(self, x: Array, cls: Array | None) -> tuple[Array, Array | None]:
        """z_0 = [x_class; x_p E] + E_pos of Eq. 1, and what is added before every layer instead."""
        if cls is not None:
            # By padding: a concatenation would have to broadcast the token to the batch size, which
            # costs Shape and Expand nodes in an exported graph.
            patches = x.shape[1]
            x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
            x = x + jnp.pad(cls, ((0, 0), (0, patches), (0, 0))).astype(x.dtype)
        placement = self.config.position_placement
        if self.config.position_embedding not in ADDED or placement == "layers":
            return x, None
        positions = position_embedding(self.config, self.grid, name="posembed_input")(x)
        return (x + positions, None) if placement == "stem" else (x, positions)


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


class VisionTransformer(Model):
    """ViT (Section 3.1): an image to the logits of its classes."""

    config: ViTConfig  # ty: ignore[incompatible-mutable-override]

    _LAYER: ClassVar[type[EncoderBlock]] = EncoderBlock

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
            UserError: the image's sides are not multiples of the downsampling.
        """
        config = self.config
        grid = config.grid(*images.shape[1:3])
        z = self._encode(self._embed(images), grid, train)
        y = z[:, 0] if config.has_class else z.mean(axis=1)  # Eq. 4
        if config.representation_size:
            hidden = nn.Dense(
                config.representation_size, dtype=config.compute_dtype, name="pre_logits"
            )
            y = nn.tanh(hidden(y))
        return linear_head(y.astype(jnp.float32), config)

    def _stem(self, images: Array) -> Array:
        """What the patches are cut from."""
        return images

    def _embed(self, images: Array) -> Array:
        """x_p E of Eq. 1, [batch, patches, hidden_size]."""
        config = self.config
        embedding = PatchEmbedding(
            config.patch_size, config.hidden_size, config.compute_dtype, name="embedding"
        )
        return embedding(self._stem(images))

    def _encode(self, patches: Array, grid: Grid, train: bool) -> Array:
        """The encoder's output for patch embeddings: the class token, if any, comes first."""
        cls = None
        if self.config.has_class:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.config.hidden_size))
        encoder = Encoder
        if self.config.scan_layers:
            encoder = nn.map_variables(
                Encoder,
                "params",
                trans_in_fn=stack_layers,
                trans_out_fn=unstack_layers,
                init=self.is_initializing(),
                mutable=self.is_initializing(),
            )
        return encoder(self.config, grid, self._LAYER, name="Transformer")(patches, cls, not train)
