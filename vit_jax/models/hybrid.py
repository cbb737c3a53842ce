"""The hybrids of the paper: a Vision Transformer on the feature map of a ResNet."""

import jax

from vit_jax.models import resnet
from vit_jax.models.vit import VisionTransformer


class HybridVisionTransformer(VisionTransformer):
    """R+ViT (Section 3.1, "Hybrid Architecture"): patches of a feature map in place of the image.

    Attributes:
        resnet_layers: units of each stage of the ResNet; (3, 4, 6, 3) is ResNet50, (3, 4, 9) has
            its last stage's place taken by a longer third one, () is the root alone.
        group_norm_epsilon: 1e-6 in the official checkpoints, 1e-5 in timm's.

    patch_size is in positions of the feature map: 1 in the paper. The other attributes are those of
    `VisionTransformer`; remat recomputes each unit of the ResNet too.
    """

    resnet_layers: tuple[int, ...] = (3, 4, 6, 3)
    group_norm_epsilon: float = 1e-6

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square of the image that becomes one token."""
        return resnet.downsampling(self.resnet_layers) * self.patch_size

    def _stem(self, images: jax.Array) -> jax.Array:
        return resnet.resnet_features(
            images,
            self.resnet_layers,
            group_norm_epsilon=self.group_norm_epsilon,
            remat=self.remat,
            dtype=self.dtype,
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        super()._check(shape)
        resnet.check_layers(self.resnet_layers)
