"""The Transformer encoder of the paper (Eqs. 1 to 8), in Flax Linen.

Section and equation numbers are those of "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR
2021). Parameter names and shapes are those of the official checkpoints; the forward pass fuses and
reshapes where that is faster, which leaves the tree alone.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, brief
from vit_jax.models import attention
from vit_jax.models.activations import GELU
from vit_jax.models.base import Grid, ModelConfig, at_least, epsilon, fraction, option
from vit_jax.models.dropout import Dropout
from vit_jax.models.normalization import LayerNorm
from vit_jax.models.positions import (
    ADDED,
    PLACEMENTS,
    POSITION_EMBEDDINGS,
    PositionEmbedding,
    RelativePositionBias,
    check_placement,
)
from vit_jax.models.rematerialization import (
    POLICIES,
    end_of_block,
    product,
    rematerialize,
)

Array = jax.Array

# The deepest published Transformers have 1,000 layers (DeepNet, 2022); each is traced.
DEEPEST = 1000


# Published models have 4 or 8. A file of weights cannot make a model of more.
MOST_REGISTERS = 1024


def _start_of_scales(x: float) -> str | None:
    return None if 0 <= x <= 1 else f"is {brief(x)}: it must be from 0 to 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Describes what has a Transformer encoder; its defaults are the paper's.

    Attributes:
        hidden_size: width D of every token.
        num_layers: number of Transformer layers L.
        mlp_dim: width of the hidden layer of each MLP.
        num_heads: attention heads; must divide hidden_size.
        classifier: "token" (class token), "gap" (mean over the patches, Appendix D.3) or "map" (a
            learned query attends to the patches, see `vit.AttentionPooling`).
        dropout_rate: after every dense layer except the q, k, v projections, and after adding the
            position embeddings (Appendix B.1). As in the published code, the head has none.
        dropout_after: what the MLP's first dropout comes after: its "activation", as in the
            published code, or its "dense" layer, as the words of Appendix B.1 are.
        attention_dropout_rate: dropout of the attention weights; the paper has none.
        stochastic_depth: rate at which the last layer's two residual branches are each left out for
            an image in training; from the first layer, 0, it grows linearly. The paper has none.
        position_embedding: "learned" (1D), "none", "2d", "relative" or "sincos2d" (Appendix D.4),
            see `models.positions`.
        position_placement: "stem", "layers" or "shared" (Table 8).
        gelu: "tanh" (official checkpoints) or "erf" (timm, Hugging Face).
        layer_norm_epsilon: 1e-6 in the official and timm checkpoints, 1e-12 in Hugging Face's.
        scan_layers: compile one layer and loop over it; the parameter tree does not change.
        remat: "dots", which takes about half the memory of "nothing"; on a CPU, a step of ViT-Ti/16
            takes 620 ms in place of 604 with it, the fastest 568 in place of 578.
        layer_scale: 0 for none, else what the learned scales of every feature of a residual branch
            start with (Touvron et al., 2021, arXiv 2103.17239). Of weights that are read it only
            says that they have them. The paper has none.
        num_registers: learned tokens beside the class token that nothing reads at the end (Darcet
            et al., 2023, arXiv 2309.16588). They have no positions.
        mlp: "gelu", Eq. 3, or "swiglu" (Shazeer, 2020, arXiv 2002.05202), as in DINOv2's ViT-g.
        distillation_token: a second class token, with a head of its own that is to learn from
            another model (DeiT: Touvron et al., 2021, arXiv 2012.12877).

    The others are those of `ModelConfig`.
    """

    hidden_size: int = option(check=at_least(1))
    num_layers: int = option(check=at_least(1, DEEPEST))
    mlp_dim: int = option(check=at_least(1))
    num_heads: int = option(check=at_least(1))
    classifier: str = option("token", choices=("token", "gap", "map"))
    dropout_rate: float = option(0.0, check=fraction, training_only=True)
    dropout_after: str = option("activation", choices=("activation", "dense"), training_only=True)
    attention_dropout_rate: float = option(0.0, check=fraction, training_only=True)
    stochastic_depth: float = option(0.0, check=fraction, training_only=True)
    position_embedding: str = option("learned", choices=POSITION_EMBEDDINGS)
    position_placement: str = option("stem", choices=PLACEMENTS)
    gelu: str = option("tanh", choices=tuple(GELU))
    layer_norm_epsilon: float = option(1e-6, check=epsilon)
    scan_layers: bool = option(False, training_only=True)
    remat: str = option("dots", choices=POLICIES, training_only=True)
    layer_scale: float = option(0.0, check=_start_of_scales)
    num_registers: int = option(0, check=at_least(0, MOST_REGISTERS))
    mlp: str = option("gelu", choices=("gelu", "swiglu"))
    distillation_token: bool = option(False)

    def validate(self) -> None:
        """Checks that the sizes, and the position embeddings and their place, go together."""
        super().validate()
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        check_placement(self.position_embedding, self.position_placement)
        for key in ("num_registers", "distillation_token"):
            if getattr(self, key) and not self.has_class:
                raise UserError(
                    f"model.{key} is {getattr(self, key)}, which goes with a class token, not with "
                    f"classifier {self.classifier!r}: use token"
                )
        parts = {"2d": 2, "sincos2d": 4}.get(self.position_embedding, 1)
        if self.hidden_size % parts:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of {parts}, the parts of "
                f"position_embedding {self.position_embedding}"
            )

    @property
    def has_class(self) -> bool:
        """Tells whether a class token precedes the patches."""
        return self.classifier == "token"

    @property
    def num_class_tokens(self) -> int:
        """The tokens before the patches that have positions: the class and distillation token."""
        return self.has_class + self.distillation_token

    @property
    def num_prefix_tokens(self) -> int:
        """The tokens before the patches: class, distillation, registers."""
        return self.num_class_tokens + self.num_registers


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

    Attributes:
        config: the description of the model.
        count: of the tokens, if `attention.for_kernel` may have added some.
    """

    config: EncoderConfig
    count: int | None = None

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
        heads = (*batch, tokens, config.num_heads, hidden_size // config.num_heads)
        is_plain = len(heads) == 4 and not needs_weights(self, config, deterministic)
        # Eq. 5: the three projections as one product, but for the kernel, which takes no parts.
        if is_plain and attention.has_kernel(heads, dtype):
            pairs = zip(kernels, biases, strict=True)
            projections = [x @ kernel.astype(dtype) + bias.astype(dtype) for kernel, bias in pairs]
        else:
            qkv = x @ jnp.concatenate(kernels, axis=1).astype(dtype)
            projections = jnp.split(qkv + jnp.concatenate(biases).astype(dtype), 3, axis=-1)
        q, k, v = (projection.reshape(heads) for projection in projections)
        # Eqs. 6 and 7.
        if is_plain:
            x = attention.attend(q, k, v, self.count)
        else:
            x = self._attend(q, k, v, deterministic)
        # Eq. 8.
        x = x.reshape(*batch, tokens, hidden_size)
        return OutputProjection(config.num_heads, dtype, name="out")(x)

    def _attend(self, q: Array, k: Array, v: Array, deterministic: bool) -> Array:
        """Attends as `attention.attend`, with weights that are there to be changed and sown."""
        config = self.config
        q, k, v = (product(x.swapaxes(-3, -2)) for x in (q, k, v))
        q = attention.scale(q)
        logits = attention.scores(q, k)
        if config.position_embedding == "relative":
            bias = RelativePositionBias(
                config.num_prefix_tokens, config.compute_dtype, name="relative"
            )
            logits = logits + bias(q)
        weights = attention.softmax(logits)
        self.sow("intermediates", "attention_weights", weights)
        weights = Dropout(config.attention_dropout_rate)(weights, deterministic)
        return attention.mix(weights, v).swapaxes(-3, -2)


def needs_weights(module: nn.Module, config: EncoderConfig, deterministic: bool) -> bool:
    """Tells whether attention has to make its weights: to change them, or for somebody who asks."""
    return (
        config.position_embedding == "relative"
        or (config.attention_dropout_rate > 0 and not deterministic)
        or module.is_mutable_collection("intermediates")
    )


class MlpBlock(nn.Module):
    """The MLP of Eq. 3: two layers with a GELU in between; or SwiGLU.

    SwiGLU's hidden layer is SiLU(x W_g) * (x W_0): a second product with the input, `Gate`, takes
    the place of the GELU.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape."""
        config = self.config
        hidden = product(self._dense(config.mlp_dim, "Dense_0")(x))
        if config.dropout_after == "dense":
            hidden = Dropout(config.dropout_rate)(hidden, deterministic)
        if config.mlp == "swiglu":
            x = nn.silu(self._dense(config.mlp_dim, "Gate")(x)) * hidden
        else:
            # Without rematerialization the compiler can have the product before it do it.
            x = GELU[config.gelu](hidden, deterministic is True or config.remat == "nothing")
        if config.dropout_after == "activation":
            x = Dropout(config.dropout_rate)(x, deterministic)
        x = self._dense(config.hidden_size, "Dense_1")(x)
        return Dropout(config.dropout_rate)(x, deterministic)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(stddev=1e-6),
            dtype=self.config.compute_dtype,
            name=name,
        )


class EncoderBlock(nn.Module):
    """A Transformer layer, Eqs. 2 and 3.

    Attributes:
        config: the description of the model.
        grid: rows and columns of its patches.
        count: of the tokens, if `attention.for_kernel` may have added some.
    """

    config: EncoderConfig
    grid: Grid
    count: int | None = None

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
        x = Dropout(self.config.dropout_rate)(x, deterministic)
        x = self._scaled(x, "LayerScale_0")
        z = end_of_block(z + StochasticDepth()(x, drop_rate, deterministic))
        # Eq. 3
        x = layer_norm(self.config, "LayerNorm_2")(z)
        x = MlpBlock(self.config, name="MlpBlock_3")(x, deterministic)
        x = self._scaled(x, "LayerScale_1")
        return end_of_block(z + StochasticDepth()(x, drop_rate, deterministic))

    def _with_positions(self, z: Array, positions: Array | None) -> Array:
        if self.config.position_placement == "layers":
            positions = position_embedding(self.config, self.grid, name="posembed")(z)
        return z if positions is None else z + positions

    def _scaled(self, x: Array, name: str) -> Array:
        initial = self.config.layer_scale
        return LayerScale(initial, name=name)(x) if initial else x

    def _attend(self, x: Array, deterministic: bool) -> Array:
        name = "MultiHeadDotProductAttention_1"
        return MultiHeadSelfAttention(self.config, self.count, name=name)(x, deterministic)


class LayerScale(nn.Module):
    """The learned scales of a residual branch, one a feature (arXiv 2103.17239).

    Attributes:
        initial: what they start with.
    """

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape and dtype."""
        initialize = nn.initializers.constant(self.initial)
        return x * self.param("scale", initialize, x.shape[-1:]).astype(x.dtype)


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


def layer_norm(config: EncoderConfig, name: str | None = None) -> LayerNorm:
    """The module of a LayerNorm of the model."""
    return LayerNorm(config.layer_norm_epsilon, config.compute_dtype, name=name)


def position_embedding(config: EncoderConfig, grid: Grid, name: str) -> PositionEmbedding:
    """The module of the embeddings that a model adds to its tokens."""
    return PositionEmbedding(
        config.position_embedding,
        grid,
        config.num_class_tokens,
        config.compute_dtype,
        config.num_registers,
        name=name,
    )


class Encoder(nn.Module):
    """The tokens, `num_layers` Transformer layers and the last LayerNorm (Eqs. 1 to 4).

    Attributes:
        config: the description of the model.
        grid: rows and columns of its patches.
        layer: what the layers are.
    """

    config: EncoderConfig
    grid: Grid
    layer: type[EncoderBlock] = EncoderBlock

    @nn.compact
    def __call__(self, patches: Array, prefix: Array | None, deterministic: bool) -> Array:
        """Maps patch embeddings to the tokens after the last layer.

        Args:
            patches: x_p E, [batch, patches, hidden_size].
            prefix: the tokens before them, [1, tokens, hidden_size]: the class token x_class, the
                distillation token, registers. None for none.
            deterministic: whether dropout and stochastic depth are off.

        Returns:
            [batch, tokens, hidden_size], the patches last.
        """
        config = self.config
        z, positions = self._tokens(patches, prefix)
        z = Dropout(config.dropout_rate)(z, deterministic)
        count = z.shape[1]
        if self._has_kernel(z, positions, deterministic):
            z = attention.for_kernel(z)
        drop_rates = None
        if config.stochastic_depth:
            drop_rates = np.linspace(
                0, config.stochastic_depth, config.num_layers, dtype=np.float32
            )
        block = rematerialize(
            self.layer, config.remat, static_argnums=(2,), loops=config.scan_layers
        )
        if config.scan_layers:
            z, _ = nn.scan(
                lambda layer, carry, *rest: (layer(carry, deterministic, *rest), None),
                in_axes=(nn.broadcast, 0),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=config.num_layers,
            )(block(config, self.grid, count, name="encoderblock"), z, positions, drop_rates)
        else:
            for i in range(config.num_layers):
                rate = None if drop_rates is None else drop_rates[i]
                layer = block(config, self.grid, count, name=f"encoderblock_{i}")
                z = layer(z, deterministic, positions, rate)
        return layer_norm(config, "encoder_norm")(z[:, :count])  # Eq. 4

    def _has_kernel(self, z: Array, positions: Array | None, deterministic: bool) -> bool:
        """Tells whether the kernel does every layer's attention, and nothing counts its tokens."""
        config = self.config
        heads = (*z.shape[:2], config.num_heads, config.hidden_size // config.num_heads)
        return (
            self.layer is EncoderBlock
            and positions is None
            and config.position_placement != "layers"
            and not needs_weights(self, config, deterministic)
            and attention.has_kernel(heads, config.compute_dtype)
        )

    def _tokens(self, x: Array, prefix: Array | None) -> tuple[Array, Array | None]:
        """z_0 = [x_class; x_p E] + E_pos of Eq. 1, and what is added before every layer instead."""
        if prefix is not None:
            # By padding: a concatenation would have to broadcast the token to the batch size, which
            # costs Shape and Expand nodes in an exported graph.
            patches = x.shape[1]
            x = jnp.pad(x, ((0, 0), (prefix.shape[1], 0), (0, 0)))
            x = x + jnp.pad(prefix, ((0, 0), (0, patches), (0, 0))).astype(x.dtype)
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
