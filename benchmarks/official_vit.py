"""A Vision Transformer of stock Flax modules, in the way of the official code.

It is written after google-research/vision_transformer (vit_jax/models_vit.py): a strided
convolution, nn.LayerNorm, nn.MultiHeadDotProductAttention and nn.gelu as Flax has them. Its
parameter tree is that of the official checkpoints, which is ours.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.vit import ViTConfig

Array = jax.Array


class AddPositionEmbs(nn.Module):
    """Adds learned position embeddings."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape."""
        init = nn.initializers.normal(stddev=0.02)
        return x + self.param("pos_embedding", init, (1, *x.shape[1:]))


class MlpBlock(nn.Module):
    """The MLP of Eq. 3."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape."""
        config = self.config
        x = nn.Dense(config.mlp_dim, dtype=config.compute_dtype)(x)
        x = nn.gelu(x, approximate=config.gelu == "tanh")
        x = nn.Dropout(config.dropout_rate)(x, deterministic)
        x = nn.Dense(config.hidden_size, dtype=config.compute_dtype)(x)
        return nn.Dropout(config.dropout_rate)(x, deterministic)


class Encoder1DBlock(nn.Module):
    """A Transformer layer, Eqs. 2 and 3."""

    config: ViTConfig

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool) -> Array:
        """Maps inputs [batch, tokens, hidden_size] to the same shape."""
        config, dtype = self.config, self.config.compute_dtype
        epsilon = config.layer_norm_epsilon
        x = nn.LayerNorm(epsilon=epsilon, dtype=dtype, name="LayerNorm_0")(inputs)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=config.num_heads,
            dtype=dtype,
            dropout_rate=config.attention_dropout_rate,
            broadcast_dropout=False,
            deterministic=deterministic,
            name="MultiHeadDotProductAttention_1",
        )
        x = attention(x, x)
        x = nn.Dropout(config.dropout_rate)(x, deterministic)
        x = x + inputs
        y = nn.LayerNorm(epsilon=epsilon, dtype=dtype, name="LayerNorm_2")(x)
        return x + MlpBlock(config, name="MlpBlock_3")(y, deterministic)


class Encoder(nn.Module):
    """All layers, with what is before and after them."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps x [batch, tokens, hidden_size] to the same shape."""
        config = self.config
        x = AddPositionEmbs(name="posembed_input")(x)
        x = nn.Dropout(config.dropout_rate)(x, deterministic)
        for i in range(config.num_layers):
            x = Encoder1DBlock(config, name=f"encoderblock_{i}")(x, deterministic)
        norm = nn.LayerNorm(
            epsilon=config.layer_norm_epsilon, dtype=config.compute_dtype, name="encoder_norm"
        )
        return norm(x)


class OfficialViT(nn.Module):
    """An image to the logits of its classes."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Maps images [batch, height, width, 3] to logits [batch, num_classes], float32."""
        config = self.config
        patch = (config.patch_size, config.patch_size)
        embedding = nn.Conv(
            config.hidden_size, patch, patch, "VALID", dtype=config.compute_dtype, name="embedding"
        )
        x = embedding(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if config.has_class:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, config.hidden_size))
            cls = jnp.tile(cls, (x.shape[0], 1, 1)).astype(x.dtype)
            x = jnp.concatenate([cls, x], axis=1)
        x = Encoder(config, name="Transformer")(x, not train)
        x = x[:, 0] if config.has_class else x.mean(axis=1)
        return nn.Dense(config.num_classes, name="head")(x.astype(jnp.float32))
