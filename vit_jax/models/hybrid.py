"""The hybrids of the paper: a Vision Transformer on the feature map of a ResNet."""

import dataclasses
import re
from typing import Any

import jax

from vit_jax.image_size import ImageSize
from vit_jax.models import resnet
from vit_jax.models.base import Arrays, Grid, epsilon, option
from vit_jax.models.vit import SIZES, VisionTransformer, ViTConfig

# The stem of a hybrid and the suffix of its name. The suffix is the total downsampling, but for
# R+ViT-Ti/16 of AugReg: its published weights have patches of 8 x 8 on the root's stride of 4.
STEMS = {
    ("R50", "32"): {"resnet_layers": (3, 4, 6, 3), "patch_size": 1},
    ("R50", "16"): {"resnet_layers": (3, 4, 9), "patch_size": 1},
    ("R26", "32"): {"resnet_layers": (2, 2, 2, 2), "patch_size": 1},
    ("R", "16"): {"resnet_layers": (), "patch_size": 8},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(ViTConfig, resnet.StagesConfig):
    """Describes R+ViT (Section 3.1, "Hybrid Architecture").

    Attributes:
        resnet_layers: units of each stage of the ResNet; (3, 4, 6, 3) is ResNet50, (3, 4, 9) has
            its last stage's place taken by a longer third one, () is the root alone.
        group_norm_epsilon: 1e-6 in the official checkpoints, 1e-5 in timm's.

    patch_size is in positions of the feature map: 1 in the paper. The others are those of
    `ViTConfig`; remat recomputes each unit of the ResNet too.
    """

    names = ", ".join(f"{stem}+ViT-SIZE/{suffix}" for stem, suffix in STEMS)
    embeds_pixels = False

    resnet_layers: tuple[int, ...] = option((3, 4, 6, 3), check=resnet.units_per_stage)
    group_norm_epsilon: float = option(1e-6, check=epsilon)

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square of the image that becomes one token."""
        return resnet.downsampling(self.resnet_layers) * self.patch_size

    def build(self) -> "HybridVisionTransformer":
        """The module."""
        return HybridVisionTransformer(self)

    def stem_multiply_adds(self, image_size: ImageSize) -> tuple[int, Grid, int]:
        """The multiply-adds of the ResNet, and its output's sides and channels."""
        return resnet.multiply_adds(self.resnet_layers, image_size)

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        """The fields of "R50+ViT-B/16" and so on: any size on one of `STEMS`."""
        match = re.fullmatch(rf"(R\d*)\+ViT-({'|'.join(SIZES)})/(\d+)", name)
        if not match or (match[1], match[3]) not in STEMS:
            return None
        return {**STEMS[match[1], match[3]], **SIZES[match[2]], "group_norm_epsilon": 1e-6}

    @classmethod
    def recognizes(cls, arrays: Arrays) -> bool:
        """Tells whether a ResNet lies before layers of a ViT."""
        return "conv_root/kernel" in arrays and "embedding/kernel" in arrays

    @classmethod
    def infer(cls, arrays: Arrays) -> dict[str, Any]:
        """The fields of the ViT and the units of each stage."""
        layers = resnet.count_units(arrays, r"block(\d+)/.*/conv1/")
        return {**super().infer(arrays), "resnet_layers": layers}


class HybridVisionTransformer(VisionTransformer):
    """R+ViT: patches of a feature map in place of the image."""

    config: HybridConfig  # ty: ignore[incompatible-mutable-override]

    def _stem(self, images: jax.Array) -> jax.Array:
        return resnet.resnet_features(images, self.config)
