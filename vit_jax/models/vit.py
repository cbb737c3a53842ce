"""The Vision Transformer of the paper, in Flax Linen.

Section and equation numbers are those of "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR
2021). Parameter names and shapes are those of the official checkpoints, so loading one is a plain
tree match; the forward pass fuses and reshapes where that is faster, which leaves the tree alone.
"""

import dataclasses
import math
import re
from collections.abc import Container
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize, of_sides, sides
from vit_jax.models import attention
from vit_jax.models.base import (
    USUAL_IMAGE_SIZE,
    Arrays,
    Grid,
    Model,
    at_least,
    linear_head,
    option,
    width_of,
)
from vit_jax.models.encoder import (
    MOST_REGISTERS,
    Encoder,
    EncoderBlock,
    EncoderConfig,
    HeadProjection,
    MlpBlock,
    OutputProjection,
    layer_norm,
    stack_layers,
    unstack_layers,
)
from vit_jax.models.positions import RESIZERS

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
POOLING = "MAPHead_0"
DISTILLATION_HEAD = "head_dist"
# Of layers whose weights alone are known: DINOv2's.
_INITIAL_SCALE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """Describes a Vision Transformer (Section 3.1); its defaults are the paper's.

    Attributes:
        patch_size: side of a square patch in pixels; the image's sides must be multiples of it.
        representation_size: width of the tanh layer of the pre-training head (`pre_logits`); 0 for
            none, as in fine-tuning.

    The others are those of `EncoderConfig`.
    """

    noun = "ViT"
    names = (
        f"ViT-SIZE/PATCH with SIZE one of {', '.join(SIZES)}, for example ViT-B/16, or "
        "ViT-LAYERS-WIDTH-MLP/PATCH"
    )
    landmark = "embedding/kernel"
    formats = ("official", "timm", "torchvision", "huggingface")
    stem = "embedding/kernel"
    embeds_pixels = True
    has_patch_embeddings = True
    resizers = RESIZERS
    # Where the arrays of a layer's attention and MLP are from which `infer` tells sizes.
    first_layer: ClassVar[str] = "Transformer/encoderblock_0"

    patch_size: int = option(check=at_least(1))
    representation_size: int = option(0, check=at_least(0))

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square of the image that becomes one token."""
        return self.patch_size

    def grid(self, height: int, width: int) -> Grid:
        """The rows and columns of patches of an image.

        Raises:
            UserError: its sides are not multiples of the downsampling.
        """
        step = self.downsampling
        if height % step or width % step:
            rule = f"patch_size {step}" if step == self.patch_size else f"total downsampling {step}"
            below, above = (
                of_sides(*(_multiple(side, step, more) for side in (height, width)))
                for more in (0, step)
            )
            raise UserError(
                f"image_size {of_sides(height, width)} is not a multiple of {rule}: use {below} or "
                f"{above}"
            )
        return height // step, width // step

    def validate(self) -> None:
        """Checks that the heads go together, too."""
        super().validate()
        if self.distillation_token and self.representation_size:
            raise UserError(
                f"model.representation_size is {self.representation_size}, but the two heads of a "
                "model with a distillation_token are linear: set it to 0"
            )

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

    def multiply_adds(self, image_size: ImageSize, channels: int = 3) -> int:
        """The multiply-adds of the patch embedding, the layers and the head."""
        stem, (height, width), channels = self.stem_multiply_adds(image_size, channels)
        grid = height // self.patch_size, width // self.patch_size
        patches = math.prod(grid)
        embedding = patches * channels * self.patch_size**2 * self.hidden_size
        layers = self.num_layers * self.layer_multiply_adds(grid)
        width, hidden = self.hidden_size, self.representation_size
        heads = 1 + self.distillation_token
        head = width * hidden + heads * (hidden or width) * self.num_classes
        return stem + embedding + layers + self._pooling_multiply_adds(patches) + head

    def _pooling_multiply_adds(self, patches: int) -> int:
        if self.classifier != "map":
            return 0
        width = self.hidden_size
        keys_and_values = 2 * patches * width * width
        mlp = self._mlp_products * width * self.mlp_dim
        return keys_and_values + 2 * width * width + mlp + 2 * patches * width

    def stem_multiply_adds(self, image_size: ImageSize, channels: int) -> tuple[int, Grid, int]:
        """The stem's multiply-adds, and the sides and channels that patches are cut from."""
        return 0, sides(image_size), channels

    def layer_multiply_adds(self, grid: Grid) -> int:
        """The multiply-adds of a layer for a grid of patches."""
        patches = math.prod(grid)
        tokens = patches + self.num_prefix_tokens
        return self._attention_and_mlp(tokens, seen=tokens, offsets=2 * patches - 1)

    def _attention_and_mlp(self, tokens: int, seen: int, offsets: int) -> int:
        """The multiply-adds of tokens that attend to `seen` tokens each, at `offsets` offsets."""
        width = self.hidden_size
        mlp = self._mlp_products * self.mlp_dim
        total = tokens * width * (4 * width + mlp) + 2 * tokens * seen * width
        if self.position_embedding == "relative":
            total += (tokens - self.num_prefix_tokens) * offsets * width
        return total

    @property
    def _mlp_products(self) -> int:
        return 3 if self.mlp == "swiglu" else 2

    @classmethod
    def recognizes(cls, arrays: Arrays) -> bool:
        """Tells whether there are layers that attend to all patches, on the image itself."""
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
        has_scales = f"{cls.first_layer}/LayerScale_0/scale" in arrays
        has_gate = f"{cls.first_layer}/MlpBlock_3/Gate/kernel" in arrays
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
            "classifier": _classifier(arrays),
            "representation_size": width_of(arrays, "pre_logits/bias"),
            "layer_scale": _INITIAL_SCALE if has_scales else 0.0,
            "num_registers": _num_registers(arrays),
            "mlp": "swiglu" if has_gate else "gelu",
            "distillation_token": "dist" in arrays,
        }

    def image_size(self, arrays: Arrays) -> ImageSize:
        """The size of the images that the position embeddings are for: 0 if they are no square's.

        Raises:
            UserError: they are missing.
        """
        if self.position_embedding in ("none", "sincos2d"):
            return USUAL_IMAGE_SIZE
        positions = arrays.get(POSITIONS)
        if positions is None or positions.ndim != 3:
            raise UserError(f"{POSITIONS} is missing or misshapen: fetch the file again")
        patches = positions.shape[1] - num_class_tokens(arrays)
        side = math.isqrt(max(patches, 0))
        return side * self.downsampling if side**2 == patches else 0


def _multiple(side: int, step: int, more: int) -> int:
    """The side itself if it is a multiple, else the one below it, or so much more."""
    return side if side % step == 0 else max(side // step, 1) * step + more


def _classifier(arrays: Arrays) -> str:
    if "cls" in arrays:
        return "token"
    return "map" if f"{POOLING}/probe" in arrays else "gap"


def num_class_tokens(present: Container[str]) -> int:
    """The tokens of a model that come before its patches and have positions, by its parameters."""
    return ("cls" in present) + ("dist" in present)


def _num_registers(arrays: Arrays) -> int:
    registers = arrays.get("register")
    if registers is None:
        return 0
    if registers.ndim != 3 or registers.shape[1] > MOST_REGISTERS:
        raise UserError(
            f"register has shape {registers.shape}, not (1, registers, width) of at most "
            f"{MOST_REGISTERS} registers: fetch the file again"
        )
    return registers.shape[1]


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
        # A strided convolution without overlap is one product of flattened patches. What lies side
        # by side in a row of a patch is one axis: on CPUs it is moved in half the time.
        x = images.astype(self.dtype).reshape(batch, rows, size, columns, size * channels)
        x = x.swapaxes(2, 3).reshape(batch, rows * columns, size * size * channels)
        return x @ kernel.reshape(-1, self.hidden_size) + bias


class AttentionPooling(nn.Module):
    """Multi-head attention pooling ("MAP" of Zhai et al., 2022, arXiv 2106.04560, Section 3.2).

    A learned query, the same for every image, attends to the patches, and an MLP with a LayerNorm
    and a residual follows. Parameter names are those of big_vision; as there it has no dropout.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Maps tokens [batch, tokens, hidden_size] to representations [batch, hidden_size]."""
        config = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, config.hidden_size))
        x = PoolingAttention(config, name="MultiHeadDotProductAttention_0")(probe, z)
        y = layer_norm(config, "LayerNorm_0")(x)
        return (x + MlpBlock(config, name="MlpBlock_0")(y, deterministic=True))[:, 0]


class PoolingAttention(nn.Module):
    """Multi-head attention of one query to all tokens (Eqs. 5 to 8)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, probe: Array, z: Array) -> Array:
        """Maps a probe [1, 1, hidden_size] and z [batch, tokens, hidden_size] to [batch, 1, ...].

        The product with the probe's query broadcasts: it is not repeated for each image.
        """
        config, dtype = self.config, self.config.compute_dtype

        def project(x: Array, name: str) -> Array:
            kernel, bias = HeadProjection(config.num_heads, name=name)(config.hidden_size)
            x = x.astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)
            x = x.reshape(*x.shape[:2], config.num_heads, -1)
            return x.swapaxes(1, 2)  # [batch, heads, tokens, head_dim]

        q, k, v = project(probe, "query"), project(z, "key"), project(z, "value")
        weights = attention.softmax(attention.scores(attention.scale(q), k))
        x = attention.mix(weights, v).swapaxes(1, 2).reshape(-1, 1, config.hidden_size)
        return OutputProjection(config.num_heads, dtype, name="out")(x)


class VisionTransformer(Model):
    """ViT (Section 3.1): an image to the logits of its classes."""

    config: ViTConfig  # ty: ignore[incompatible-mutable-override]

    _LAYER: ClassVar[type[EncoderBlock]] = EncoderBlock

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, each_head: bool = False) -> Array:
        """Computes logits.

        Args:
            images: [batch, height, width, 3], values in [-1, 1].
            train: whether dropout is on; then the "dropout" RNG is needed.
            each_head: whether the two heads of a model with a distillation token are not averaged,
                see `heads`; of any other model nothing changes.

        Returns:
            Logits [batch, num_classes], or where num_classes is 0 the representation [batch,
            representation_size or hidden_size], in float32. With a distillation token, the mean of
            those of the two heads; or [2, batch, ...], those of each.

        Raises:
            UserError: the image's sides are not multiples of the downsampling.
        """
        config = self.config
        grid = config.grid(*images.shape[1:3])
        z = self._encode(self._embed(images), grid, train)
        if config.distillation_token:
            heads = self._class_and_distillation_heads(z[:, :2].astype(jnp.float32))
            return jnp.stack(heads) if each_head else (heads[0] + heads[1]) / 2
        if config.classifier == "map":
            y = AttentionPooling(config, name=POOLING)(z)
        else:
            y = z[:, 0] if config.has_class else z.mean(axis=1)  # Eq. 4
        if config.representation_size:
            hidden = nn.Dense(
                config.representation_size, dtype=config.compute_dtype, name="pre_logits"
            )
            y = nn.tanh(hidden(y))
        return linear_head(y.astype(jnp.float32), config)

    def heads(self, images: Array, train: bool = False) -> tuple[Array, Array]:
        """Computes what the class token's head and the distillation token's head say.

        To be called as `model.apply(variables, images, train, method="heads")`.

        Args:
            images: as the model's.
            train: likewise.

        Returns:
            Two arrays, as `__call__` returns one.

        Raises:
            UserError: the model has no distillation token, or as `__call__`.
        """
        if not self.config.distillation_token:
            raise UserError("the model has one head: set model.distillation_token for a second")
        of_class, of_distillation = self(images, train=train, each_head=True)
        return of_class, of_distillation

    def _class_and_distillation_heads(self, y: Array) -> tuple[Array, Array]:
        of_class = linear_head(y[:, 0], self.config)
        return of_class, linear_head(y[:, 1], self.config, DISTILLATION_HEAD)

    def _stem(self, images: Array) -> Array:
        """Returns the image or feature map that the patches are cut from."""
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
        layers = encoder(self.config, grid, self._LAYER, name="Transformer")
        return layers(patches, self._prefix(), not train)

    def _prefix(self) -> Array | None:
        """The tokens before the patches, [1, tokens, hidden_size], None if there are none."""
        config, zeros = self.config, nn.initializers.zeros
        if not config.has_class:
            return None
        tokens = [self.param("cls", zeros, (1, 1, config.hidden_size))]
        if config.distillation_token:
            tokens.append(self.param("dist", zeros, (1, 1, config.hidden_size)))
        if config.num_registers:
            # Without positions, they would stay alike forever if they began so; as DINOv2's.
            shape = (1, config.num_registers, config.hidden_size)
            tokens.append(self.param("register", nn.initializers.normal(stddev=1e-6), shape))
        return tokens[0] if len(tokens) == 1 else jnp.concatenate(tokens, axis=1)
