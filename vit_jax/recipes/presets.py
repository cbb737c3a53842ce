"""Recipes that authors of the paper published later, each with its source and its number.

    augreg          "How to train your ViT?" (Steiner et al., 2021, arXiv 2106.10270), as published
                    in google-research/big_vision, configs/vit_i1k.py and vit_i21k.py
    baseline        "Better plain ViT baselines for ImageNet-1k" (Beyer et al., 2022, arXiv
                    2205.01580), configs/vit_s16_i1k.py there: ViT-S/16 reaches 76.5% in 90 epochs,
                    78.5% in 150 and 80.0% in 300
    transfer        configs/transfer.py there, with which weights of augreg are fine-tuned: ViT-B/32
                    of ImageNet-21k to 98.55% on CIFAR-10
    segmentation    "Segmenter" (Strudel et al., 2021, arXiv 2105.05633), with its linear decoder:
                    Section 4.1, on ADE20K
    detection       "ViTDet" (Li et al., 2022, arXiv 2203.16527), Appendix A.2, on COCO, with a
                    dense head on one grid
    bit_hyperrule   "Big Transfer" (Kolesnikov et al., 2020, arXiv 1912.11370), Section 3.3, as
                    published in google-research/big_transfer, bit_hyperrule.py: R50x1 of
                    ImageNet-21k to 80.68% on ImageNet

big_vision adds weight decay to what Adam gives after that is multiplied by the base learning rate,
and the schedule then multiplies both: its wd of 1e-4 at its lr of 1e-3 is weight_decay 0.1 here,
where each step subtracts lr * weight_decay * p. It decays kernels alone.

Not as there, in all of them: models compute in bfloat16 (`model.dtype`), as the paper's recipes; a
crop that is resized bilinearly is rounded to 8 bits, not cut down to them; position embeddings that
are learned start with a standard deviation of 0.02, not of 1 / sqrt(width).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_jax import models
from vit_jax.data import vtab
from vit_jax.errors import UserError
from vit_jax.recipes.paper import adam, base, finetune, table_name

# vit_i1k.py and vit_i21k.py, of the models that these have: a middle between the best of 30 and of
# 300 epochs in Figure 4 of AugReg. The names are those of `data.augmentation.AUGREG`.
AUGREG_AUGMENT = {
    "imagenet2012": {
        "ViT-Ti/16": "light1",
        "ViT-S/32": "medium1",
        "ViT-S/16": "medium2",
        "ViT-B/32": "medium2",
        "ViT-B/16": "medium2",
        "ViT-L/16": "medium2",
    },
    "imagenet21k": {
        "ViT-Ti/16": "none",
        "ViT-S/32": "none",
        "ViT-S/16": "light1",
        "ViT-B/32": "light2",
        "ViT-B/16": "light2",
        "ViT-L/16": "medium2",
    },
}
AUGREG_BATCH_SIZE = 4096
AUGREG_EPOCHS = 300
IMAGENET_HEAD_BIAS = -6.9  # -log(1000)
IMAGENET_21K_HEAD_BIAS = -10.0

BASELINE_BATCH_SIZE = 1024
BASELINE_EPOCHS = (90, 150, 300)

# The same for augreg and baseline.
SCRATCH_LR = 1e-3
SCRATCH_WEIGHT_DECAY = 1e-4 / SCRATCH_LR
SCRATCH_CLIP_NORM = 1.0
SCRATCH_WARMUP_STEPS = 10_000
SCRATCH_IMAGE_SIZE = 224
IMAGENET_IMAGES = 1_281_167

TRANSFER_LR = 0.01
# What is not held out to choose the learning rate.
TRANSFER_SPLITS = {
    "cifar10": "train[:98%]",
    "cifar100": "train[:98%]",
    "imagenet2012": "train[:99%]",
    "oxford_iiit_pet": "train[:90%]",
    "oxford_flowers102": "train[:90%]",
}


class HyperRule(NamedTuple):
    """Settings that BiT's rule derives from the number of training images.

    Attributes:
        steps: of the run.
        warmup_steps: of its warm-up.
        drops: shares of the steps after which the learning rate is a tenth.
        augment: mixup, or none.
    """

    steps: int
    warmup_steps: int
    drops: tuple[float, ...]
    augment: str


# Below 20,000 training images, below 500,000, and above.
BIT_HYPERRULE = {
    "small": HyperRule(500, 100, (0.4, 0.6, 0.8), "none"),
    "medium": HyperRule(10_000, 500, (0.3, 0.6, 0.9), "mixup(0.1)"),
    "large": HyperRule(20_000, 500, (0.3, 0.6, 0.9), "mixup(0.1)"),
}
# The number of training images up to which a data set is of a size.
_BELOW = {"small": 20_000, "medium": 500_000, "large": math.inf}
# VTAB's tasks, which have 1,000 images, are small too.
_SIZES = {
    "cifar10": "medium",
    "cifar100": "medium",
    "imagenet2012": "large",
    "oxford_flowers102": "small",
    "oxford_iiit_pet": "small",
}
HYPERRULE_LR = 0.003
SEGMENTATION_BATCH_SIZE = 8
SEGMENTATION_STEPS = 160_000
SEGMENTATION_CROP = 512
SEGMENTATION_LR = 1e-3
SEGMENTATION_DEPTH = 0.1
DETECTION_BATCH_SIZE = 64
DETECTION_EPOCHS = 100
DETECTION_SIZE = 512
DETECTION_LR = 1e-4
DETECTION_WEIGHT_DECAY = 0.1
# The shares of the steps after which the rate is a tenth, 88.9% and 96.3% of 100 epochs.
DETECTION_DROPS = (0.889, 0.963)
DETECTION_WARMUP_STEPS = 250
DETECTION_LAYER_DECAY = {"ViT-B": 0.7, "ViT-L": 0.8, "ViT-H": 0.9}
DETECTION_DEPTH = {"ViT-B": 0.1, "ViT-L": 0.4, "ViT-H": 0.5}
# Crops, of images that are resized to 32 pixels more; the first of those below 96 x 96 pixels.
SMALL_CROP, CROP = 128, 480
# Of these the images are: of 8, 28, 32 and 64 pixels; those of TFDS by their names there.
SMALL_IMAGES = (
    *("cifar10", "cifar100", "digits", "dsprites", "emnist", "eurosat", "fashion_mnist", "kmnist"),
    *("mnist", "svhn_cropped"),
)


def augreg(model: str, dataset: str) -> ConfigDict:
    """AugReg: pre-training on ImageNet or ImageNet-21k with augmentation, a table of it.

    On ImageNet it takes the sigmoid loss, with the head's bias at -log(1000), and a hidden layer
    before the head; on ImageNet-21k global average pooling. Another data set is trained on as
    ImageNet is, its warm-up in epochs. The configs have neither dropout nor stochastic depth. Not
    as there: on ImageNet-21k nothing is held out of train.

    Raises:
        UserError: the configs have no augmentation for the model.
    """
    name = table_name(dataset)
    is_larger = name == "imagenet21k"
    augment = AUGREG_AUGMENT[name if is_larger else "imagenet2012"]
    if model not in augment:
        raise UserError(
            f"augreg has no augmentation for {model}, only for {', '.join(augment)}: take the "
            f"recipe of one of these and change config.model, or pretrain,{dataset} with "
            "--config.augment"
        )
    config = _from_scratch(model, dataset, AUGREG_BATCH_SIZE, AUGREG_EPOCHS)
    config.augment = augment[model]
    config.loss = "sigmoid"
    if is_larger:
        config.model.classifier = "gap"
        config.model.head_bias_init = IMAGENET_21K_HEAD_BIAS
    else:
        config.model.representation_size = config.model.hidden_size
        config.model.head_bias_init = IMAGENET_HEAD_BIAS
        config.evals.val.every = "2500 steps"
    return config


def baseline(model: str, dataset: str) -> ConfigDict:
    """The plain baseline of 90 epochs; published for ViT-S/16 on ImageNet.

    Other ViTs and data sets are trained likewise, with the warm-up in epochs.

    Raises:
        UserError: the model has no position embeddings.
    """
    config = _from_scratch(model, dataset, BASELINE_BATCH_SIZE, BASELINE_EPOCHS[0])
    if "position_embedding" not in config.model:
        raise UserError(
            f"baseline is a recipe for ViTs, and {model} has no position embeddings: use "
            f"pretrain,{dataset}"
        )
    config.augment = "light2"  # RandAugment(2, 10) and mixup 0.2
    config.model.classifier = "gap"
    config.model.position_embedding = "sincos2d"
    config.model.representation_size = config.model.hidden_size
    config.evals.val.every = "2500 steps"
    return config


def _lasting(epochs: int) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.duration = f"{epochs} epochs"

    return change


BASELINE_DURATIONS = {str(epochs): _lasting(epochs) for epochs in BASELINE_EPOCHS}


def _from_scratch(model: str, dataset: str, batch_size: int, epochs: int) -> ConfigDict:
    config = base(model, dataset)
    name = table_name(dataset)
    config.batch_size = batch_size
    config.duration = f"{epochs} epochs"
    config.dataset.image_size = SCRATCH_IMAGE_SIZE
    config.dataset.protocol = "big_vision"
    config.optimizer = adam(SCRATCH_WEIGHT_DECAY, SCRATCH_CLIP_NORM)
    config.optimizer.decay = "kernels"
    config.optimizer.mu_dtype = "bfloat16"
    config.schedule.base_lr = SCRATCH_LR
    config.schedule.warmup = f"{SCRATCH_WARMUP_STEPS} steps"
    if name == "imagenet2012":
        config.dataset.train_split = "train[:99%]"  # The published accuracies are of these images.
    elif name != "imagenet21k":
        epochs_of_warmup = round(SCRATCH_WARMUP_STEPS * batch_size / IMAGENET_IMAGES)
        config.schedule.warmup = f"{epochs_of_warmup} epochs"
    return config


def transfer(model: str, dataset: str) -> ConfigDict:
    """big_vision's fine-tuning: Table 4 with crops that keep the aspect, and evaluation likewise.

    The shorter side is resized to 448 pixels, 384 x 384 cropped. The learning rate is the config's
    default; the accuracies that it lists are of the best of several. It trains on what is not held
    out to choose that. Another data set takes the row of Pets and Flowers, see `finetuning_row`.
    Not as there: all of the head is replaced, its hidden layer too, of weights that have one.
    """
    config = _from_weights(model, dataset)
    config.dataset.protocol = "transfer"
    config.dataset.train_split = TRANSFER_SPLITS.get(table_name(dataset), "")
    config.optimizer.mu_dtype = "bfloat16"
    config.schedule.base_lr = TRANSFER_LR
    config.log_every = "10 steps"
    config.evals.val.every = "100 steps"
    return config


def crop_as_inception(config: ConfigDict) -> None:
    """The other crop of `transfer`, with which ImageNet, Pets and Flowers were best."""
    config.dataset.protocol = "transfer_inception"


def bit_hyperrule(model: str, dataset: str) -> ConfigDict:
    """BiT-HyperRule: fine-tuning whose settings follow from the size of data set and images.

    It is that of the published code, in JAX and PyTorch; where these differ that of PyTorch: half
    of the images are flipped, not all, and nothing is held out of train. The paper's text drops the
    rate at 30%, 60% and 90% of 500 steps too. Not as there: an image is mixed with the one before
    it in the batch, not with the one that is as far from its end. The spec must say the size of a
    data set that is not known here, see `knows_size`; of small images that are not it needs
    config.dataset.image_size 128.
    """
    config = _from_weights(model, dataset)
    name = table_name(dataset)
    builder = vtab.get_task(dataset).builder if vtab.is_vtab(dataset) else name
    crop = SMALL_CROP if table_name(builder) in SMALL_IMAGES else CROP
    downsampling = models.describe(config.model).downsampling
    config.dataset.image_size = crop // downsampling * downsampling
    config.dataset.protocol = "bit_hyperrule"
    config.optimizer.clip_norm = 0.0
    config.schedule.base_lr = HYPERRULE_LR
    config.schedule.decay = "staircase"
    HYPERRULE_SIZES[_SIZES.get(name, "small")](config)
    return config


def segmentation(model: str, dataset: str) -> ConfigDict:
    """Segmenter with its linear decoder: all of a model is trained on images and their masks.

    That is SGD with momentum 0.9 and no weight decay, a rate of 0.001, 160,000 steps of 8 crops of
    512 pixels, no dropout and a stochastic depth of 0.1. Not as there: the rate falls linearly, not
    with an exponent of 0.9; a crop is that of Inception, not of an image resized by 0.5 to 2, and
    colors are not jittered; images are in [-1, 1], as the weights want them; evaluation sees the
    whole image at the size of the crops, where Segmenter slides a window over it.
    """
    config = _from_weights(model, dataset)
    downsampling = models.describe(config.model).downsampling
    config.objective = "segmentation"
    config.batch_size = SEGMENTATION_BATCH_SIZE
    config.duration = f"{SEGMENTATION_STEPS} steps"
    config.dataset.image_size = -(-SEGMENTATION_CROP // downsampling) * downsampling
    config.dataset.protocol = "inception"
    if "stochastic_depth" in config.model:
        config.model.stochastic_depth = SEGMENTATION_DEPTH
    config.optimizer.clip_norm = 0.0
    config.schedule.base_lr = SEGMENTATION_LR
    config.schedule.decay = "linear"
    config.schedule.warmup = "0 steps"
    config.evals.val.every = "8000 steps"
    config.checkpoint_every = "8000 steps"
    return config


def detection(model: str, dataset: str) -> ConfigDict:
    """ViTDet's training with a dense head on one grid: all of a model, on images and boxes.

    That is AdamW with a rate of 1e-4, a weight decay of 0.1, a rate that decays from layer to layer
    and a stochastic depth, both by the size of the model (those of B for smaller ones), 100 epochs
    of 64 images under large scale jitter, and two drops of the rate. Not as there: images have 512
    pixels, not 1,024, and a cell is half a patch; all layers attend to all patches, without
    windows; the head is that of `models.detection`, not Mask R-CNN's.
    """
    config = _from_weights(model, dataset)
    size = model.split("/")[0].rpartition("+")[2]
    downsampling = models.describe(config.model).downsampling
    config.objective = "detection"
    config.detection.upsample = 2
    config.batch_size = DETECTION_BATCH_SIZE
    config.duration = f"{DETECTION_EPOCHS} epochs"
    config.dataset.image_size = -(-DETECTION_SIZE // downsampling) * downsampling
    config.dataset.protocol = "letterbox_large"
    if "stochastic_depth" in config.model:
        config.model.stochastic_depth = DETECTION_DEPTH.get(size, DETECTION_DEPTH["ViT-B"])
    config.optimizer = adam(DETECTION_WEIGHT_DECAY, 0.0)
    config.optimizer.layer_decay = DETECTION_LAYER_DECAY.get(size, DETECTION_LAYER_DECAY["ViT-B"])
    config.optimizer.decay = "kernels"
    config.schedule.base_lr = DETECTION_LR
    config.schedule.decay = "staircase"
    config.schedule.drops = DETECTION_DROPS
    config.schedule.warmup = f"{DETECTION_WARMUP_STEPS} steps"
    config.evals.val.every = "5 epochs"
    config.checkpoint_every = "1 epoch"
    return config


def knows_size(dataset: str) -> bool:
    """Tells whether `bit_hyperrule` knows the number of training images of a data set."""
    return vtab.is_vtab(dataset) or table_name(dataset) in _SIZES


def size_of(num_images: int) -> str:
    """The size of a data set by BiT's rule, a key of `BIT_HYPERRULE`."""
    return next(size for size, most in _BELOW.items() if num_images < most)


def _of_size(size: str) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        rule = BIT_HYPERRULE[size]
        config.duration = f"{rule.steps} steps"
        config.schedule.warmup = f"{rule.warmup_steps} steps"
        config.schedule.drops = rule.drops
        config.augment = rule.augment

    return change


HYPERRULE_SIZES = {size: _of_size(size) for size in BIT_HYPERRULE}


def _from_weights(model: str, dataset: str) -> ConfigDict:
    """Table 4, whose batch, steps, momentum and clipping these share, without dropout."""
    config = finetune(model, dataset)
    if "dropout_rate" in config.model:
        config.model.dropout_rate = 0.0
    return config
