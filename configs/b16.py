"""ViT-B/16: Base of Table 1 on patches of 16 x 16 pixels.

    num_layers 12   hidden_size 768   mlp_dim 3072   num_heads 12   patch_size 16   86M parameters

Pre-training (Table 3): 224 px, batch 4096, Adam with betas 0.9 and 0.999, 10000 steps of warm-up,
the hidden layer before the head. On ImageNet, gradients are clipped at norm 1.

    spec                     epochs   base_lr   decay    weight_decay   dropout
    pretrain,jft             7        0.0008    linear   0.1            0
    pretrain,imagenet21k     90       0.001     linear   0.03           0.1
    pretrain,imagenet2012    300      0.003     cosine   0.3            0.1

Fine-tuning (Table 4): 384 px, batch 512, SGD with momentum 0.9, cosine decay, no weight decay,
gradients clipped at norm 1, dropout 0. The first rate is the one taken, the others are swept:

    spec                         steps   warm-up   base_lr
    finetune,imagenet2012        20000   500       0.03  0.003  0.01  0.06
    finetune,cifar100            10000   500       0.03  0.001  0.003  0.01
    finetune,cifar10             10000   500       0.03  0.001  0.003  0.01
    finetune,oxford_iiit_pet     500     100       0.03  0.001  0.003  0.01
    finetune,oxford_flowers102   500     100       0.03  0.001  0.003  0.01
    finetune,vtab                2500    200       0.01

Other data sets, "dev", "512" and "masked": see `vit_jax.recipes.get_config`.
"""

from ml_collections import ConfigDict

from vit_jax import recipes


def get_config(spec: str = "pretrain,imagenet2012") -> ConfigDict:
    """ViT-B/16 under a row of the tables above."""
    return recipes.get_config("ViT-B/16", spec)
