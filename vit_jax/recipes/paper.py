"""The paper's training recipes: every hyperparameter once, with its source.

Tables and sections are those of "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR 2021).
What the paper leaves open is marked "not in the paper", with the choice and its reason.
"""

import dataclasses
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from vit_jax import models
from vit_jax.data import vtab
from vit_jax.errors import UserError
from vit_jax.evaluation import registry
from vit_jax.image_size import ImageSize
from vit_jax.state import DROPS


class Pretraining(NamedTuple):
    """A row of Table 3: `epochs` lists the lengths that the paper trained for."""

    epochs: tuple[int, ...]
    base_lr: float
    decay: str
    weight_decay: float
    dropout: float


class FineTuning(NamedTuple):
    """A row of Table 4, with the warm-up (not in the paper; published code and later configs)."""

    steps: int
    base_lrs: tuple[float, ...]
    warmup_steps: int


# Table 3. The same for all: Adam (0.9, 0.999), batch 4096, 10k warm-up steps, resolution 224.
TABLE_3 = {
    ("ViT-B/16", "jft"): Pretraining((7,), 8e-4, "linear", 0.1, 0.0),
    ("ViT-B/32", "jft"): Pretraining((7,), 8e-4, "linear", 0.1, 0.0),
    ("ViT-L/32", "jft"): Pretraining((7,), 6e-4, "linear", 0.1, 0.0),
    ("ViT-L/16", "jft"): Pretraining((7, 14), 4e-4, "linear", 0.1, 0.0),
    ("ViT-H/14", "jft"): Pretraining((14,), 3e-4, "linear", 0.1, 0.0),
    ("R50x1", "jft"): Pretraining((7,), 1e-3, "linear", 0.1, 0.0),
    ("R50x2", "jft"): Pretraining((7,), 1e-3, "linear", 0.1, 0.0),
    ("R101x1", "jft"): Pretraining((7,), 8e-4, "linear", 0.1, 0.0),
    ("R152x1", "jft"): Pretraining((7,), 6e-4, "linear", 0.1, 0.0),
    ("R152x2", "jft"): Pretraining((7,), 6e-4, "linear", 0.1, 0.0),
    ("R50+ViT-B/32", "jft"): Pretraining((7,), 8e-4, "linear", 0.1, 0.0),
    ("R50+ViT-B/16", "jft"): Pretraining((7,), 8e-4, "linear", 0.1, 0.0),
    ("R50+ViT-L/32", "jft"): Pretraining((7,), 2e-4, "linear", 0.1, 0.0),
    ("R50+ViT-L/16", "jft"): Pretraining((7, 14), 4e-4, "linear", 0.1, 0.0),
    ("ViT-B/16", "imagenet21k"): Pretraining((90,), 1e-3, "linear", 0.03, 0.1),
    ("ViT-B/32", "imagenet21k"): Pretraining((90,), 1e-3, "linear", 0.03, 0.1),
    ("ViT-L/16", "imagenet21k"): Pretraining((30, 90), 1e-3, "linear", 0.03, 0.1),
    ("ViT-L/32", "imagenet21k"): Pretraining((30, 90), 1e-3, "linear", 0.03, 0.1),
    ("ViT-*", "imagenet2012"): Pretraining((300,), 3e-3, "cosine", 0.3, 0.1),
}
# Not in the paper: how these were pre-trained on JFT, but for the epochs of R200x3 in Table 6.
WIDEST_RESNETS = {"R152x4": (7,), "R200x3": (14,)}
# Not in the paper: whose row a model without one takes, by patterns of names, one after the other.
_OF_AXIAL = ((r"^AxialResNet(\d+)$", r"R\1x1"), (r"^Axial-", ""))
_OF_OTHER_SIZES = (
    (r"\bViT-(Ti|S|b|\d+-\d+-\d+)/", "ViT-B/"),
    (r"\bViT-(?![BLH]/)\w+/", "ViT-H/"),
)
STAND_INS = {
    "jft": (
        *_OF_AXIAL,
        (rf"^({'|'.join(WIDEST_RESNETS)})$", "R152x2"),
        (r"^R\d*\+", "R50+"),
        *_OF_OTHER_SIZES,
        (r"^R50\+ViT-H/", "R50+ViT-L/"),
    ),
    "imagenet21k": (
        *_OF_AXIAL,
        (r"^R\d+x\d+$", "ViT-B/16"),
        (r"^R\d*\+", ""),
        *_OF_OTHER_SIZES,
        (r"^ViT-H/", "ViT-L/"),
    ),
}
ADAM_BETAS = (0.9, 0.999)
PRETRAIN_BATCH_SIZE = 4096
PRETRAIN_WARMUP_STEPS = 10_000
PRETRAIN_DATASETS = ("jft", "imagenet21k", "imagenet2012")
OTHER_WARMUP_EPOCHS = 32  # 10,000 steps of 4,096 images are 32 epochs of ImageNet.
PRETRAIN_IMAGE_SIZE = 224
IMAGENET_CLIP_NORM = 1.0  # Table 3's caption: gradient clipping only on ImageNet.
# Not in the paper: linear decay ends at 1e-5, and the multi-label data sets (JFT and, by its
# hierarchy, ImageNet-21k) take the sigmoid loss with the head's bias starting at -10, as in later
# code.
LINEAR_END_LR = 1e-5
SIGMOID_DATASETS = ("jft", "imagenet21k")
SIGMOID_HEAD_BIAS = -10.0

# Masked patch prediction (Appendix B.1.2), of ViT-B/16 on JFT: 1M steps of 4,096 images, Adam, base
# learning rate 2e-4, 10k warm-up steps, cosine decay, half of the patch embeddings corrupted.
# Not in the paper: Adam's betas, resolution and crops; they are those of Table 3.
MASKED_STEPS = 1_000_000
MASKED_BATCH_SIZE = 4096
MASKED_LR = 2e-4
MASKED_WARMUP_STEPS = 10_000
MASKED_RATE = 0.5
MASKED_TARGET = "mean_color"  # of the three that were tried, the one that was kept
# Not in the paper: weight decay as in Table 3 on JFT, which Section 4.1 has for all models; dropout
# and clipping off, as there.
MASKED_WEIGHT_DECAY = 0.1

# Table 4. The same for all: SGD with momentum 0.9, cosine decay, batch 512, no weight decay,
# clipping at global norm 1, resolution 384.
TABLE_4 = {
    "imagenet2012": FineTuning(20_000, (0.003, 0.01, 0.03, 0.06), 500),
    "cifar100": FineTuning(10_000, (0.001, 0.003, 0.01, 0.03), 500),
    "cifar10": FineTuning(10_000, (0.001, 0.003, 0.01, 0.03), 500),
    "oxford_iiit_pet": FineTuning(500, (0.001, 0.003, 0.01, 0.03), 100),
    "oxford_flowers102": FineTuning(500, (0.001, 0.003, 0.01, 0.03), 100),
    "vtab": FineTuning(2500, (0.01,), 200),
}
MOMENTUM = 0.9
FINETUNE_BATCH_SIZE = 512
FINETUNE_CLIP_NORM = 1.0
FINETUNE_IMAGE_SIZE = 384
# Not in the paper: the paper chooses the rate on held-out data. The published code's is the default
# where Table 4 tried it.
FINETUNE_LR = 0.03
# Not in the paper: dropout in fine-tuning. It is the published code's, on every data set: in
# google-research/vision_transformer vit_jax/configs/models.py sets 0.1 for these, 0 for its others.
FINETUNE_DROPOUT = {"ViT-L/16": 0.1, "ViT-H/14": 0.1, "R50+ViT-B/16": 0.1, "R50+ViT-L/32": 0.1}
# Table 2's ImageNet rows are fine-tuned at 512 pixels (L/16) and 518 (H/14), with Polyak averaging
# of factor 0.9999.
LARGE_IMAGE_SIZE = 512
POLYAK_DECAY = 0.9999


def table_name(dataset: str) -> str:
    """The name without the version and configuration of TFDS, `cifar10` of `cifar10:3.0.2`."""
    is_path = dataset.startswith(("folder:", "list:"))
    return dataset if is_path else re.split("[:/]", dataset)[0]


def pretrain(model: str, dataset: str) -> ConfigDict:
    """Table 3: pre-training from scratch.

    The longest of a row's durations is taken. Not in the paper: Ti, S, b and the shapes of Appendix
    D.2 take the row of B, any other size that the paper lacks that of H, and H on ImageNet-21k, and
    behind a ResNet, that of L; R26 and R take the row of R50 and, on ImageNet-21k, every hybrid
    that of its ViT; a data set that the paper did not pre-train on takes ImageNet's row, with the
    warm-up in epochs. Table 3 has the ResNets on JFT only: there R152x4 and R200x3 take the row of
    R152x2 (R200x3 for the 14 epochs of Table 6); elsewhere all take the row of ViT-B, so that what
    is compared with a ViT was trained like it, but for the dropout and the hidden layer before the
    head, which BiT's ResNet has not. The axial models of Appendix D.6 take the rows of what they
    were made from: ViT-B, and for AxialResNet50 R50x1.
    """
    config = base(model, dataset)
    dataset = table_name(dataset)
    row = pretraining_row(model, dataset)
    config.batch_size = PRETRAIN_BATCH_SIZE
    config.duration = f"{max(row.epochs)} epochs"
    config.dataset.image_size = PRETRAIN_IMAGE_SIZE
    config.dataset.protocol = "big_vision"
    # Section 3.1: the pre-training head has one hidden layer; its width D is the published code's.
    if "representation_size" in config.model:
        config.model.representation_size = config.model.hidden_size
        config.model.dropout_rate = row.dropout
    clip_norm = 0.0 if dataset in SIGMOID_DATASETS else IMAGENET_CLIP_NORM
    config.optimizer = adam(row.weight_decay, clip_norm)
    config.schedule.base_lr = row.base_lr
    config.schedule.decay = row.decay
    config.schedule.warmup = f"{PRETRAIN_WARMUP_STEPS} steps"
    if dataset not in PRETRAIN_DATASETS:
        config.schedule.warmup = f"{OTHER_WARMUP_EPOCHS} epochs"
    config.schedule.end_lr = LINEAR_END_LR if row.decay == "linear" else 0.0
    if dataset in SIGMOID_DATASETS:
        config.loss = "sigmoid"
        config.model.head_bias_init = SIGMOID_HEAD_BIAS
    return config


def adam(weight_decay: float, clip_norm: float) -> ConfigDict:
    """The optimizer of Table 3, its weight decay and the norm at which gradients are clipped."""
    return ConfigDict(
        {
            "name": "adam",
            "b1": ADAM_BETAS[0],
            "b2": ADAM_BETAS[1],
            # Not in the paper: decoupled (AdamW: each step subtracts lr * weight_decay * p), on
            # every parameter, as published later. "kernels" spares biases, norms and positions.
            "weight_decay": weight_decay,
            "decay": "all",
            "mu_dtype": "float32",
            "clip_norm": clip_norm,
            "lr_multipliers": "",
            "layer_decay": 1.0,
        }
    )


# ViT-G was pre-trained with it, at base_lr 8e-4 (Zhai et al., 2022, arXiv 2106.04560; big_vision's
# configs/proj/scaling_laws/train_vit_g.py, where the head's kernel decays 100 times as much).
ADAFACTOR = {
    "name": "adafactor",
    "momentum": 0.9,
    "decay_rate": 0.8,
    "b2": 0.999,
    "weight_decay": 0.03,
    "decay": "kernels",
    "mu_dtype": "bfloat16",
    "clip_norm": 1.0,
    "lr_multipliers": "",
    "layer_decay": 1.0,
}


def pretraining_row(model: str, dataset: str) -> Pretraining:
    """The row of Table 3 for a model and a data set; see `pretrain` for what it lacks."""
    if dataset not in SIGMOID_DATASETS:
        return TABLE_3["ViT-*", "imagenet2012"]
    stand_in = model
    for pattern, replacement in STAND_INS[dataset]:
        stand_in = re.sub(pattern, replacement, stand_in)
    family = stand_in.split("/")[0]
    rows = [row for (name, data), row in TABLE_3.items() if data == dataset and name == stand_in]
    rows += [
        row
        for (name, data), row in TABLE_3.items()
        if data == dataset and name.split("/")[0] == family
    ]
    if not rows:
        raise UserError(f"Table 3 has no row for {model} on {dataset}")
    epochs = WIDEST_RESNETS.get(model) if dataset == "jft" else None
    return rows[0]._replace(epochs=epochs) if epochs else rows[0]


def finetune(model: str, dataset: str) -> ConfigDict:
    """Table 4: fine-tuning at a higher resolution.

    Not in the paper: dropout is that of `FINETUNE_DROPOUT`, by the model alone, for VTAB too; a
    model that the published code does not have is fine-tuned without. The tasks of VTAB share one
    row; some are not cropped or not mirrored, where the label would not survive it. What travels
    with weights is left to them, see `LEFT_TO_WEIGHTS`.
    """
    row = finetuning_row(dataset)
    config = base(model, dataset)
    if model in FINETUNE_DROPOUT:
        config.model.dropout_rate = FINETUNE_DROPOUT[model]
    config.batch_size = FINETUNE_BATCH_SIZE
    config.duration = f"{row.steps} steps"
    # 384 is no multiple of H/14's patches: 378 has the 27 x 27 that the published code cuts.
    downsampling = models.describe(config.model).downsampling
    config.dataset.image_size = FINETUNE_IMAGE_SIZE // downsampling * downsampling
    config.dataset.protocol = "bit"
    if vtab.is_vtab(dataset):
        task = vtab.get_task(dataset)
        config.dataset.random_crop = task.random_crop
        config.dataset.random_flip = task.random_flip
    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "momentum": MOMENTUM,
            "weight_decay": 0.0,
            "decay": "all",
            "mu_dtype": "float32",
            "clip_norm": FINETUNE_CLIP_NORM,
            "lr_multipliers": "",
            "layer_decay": 1.0,
        }
    )
    config.schedule.base_lr = FINETUNE_LR if FINETUNE_LR in row.base_lrs else max(row.base_lrs)
    config.schedule.decay = "cosine"
    config.schedule.warmup = f"{row.warmup_steps} steps"
    config.init_from = REQUIRED
    for key in LEFT_TO_WEIGHTS.keys() & config.model.keys():
        config.model[key] = config_dict.placeholder(LEFT_TO_WEIGHTS[key])
    return config


def masked(model: str, dataset: str) -> ConfigDict:
    """Appendix B.1.2: pre-training by masked patch prediction, the same on any data set."""
    config = base(model, dataset)
    config.objective = "masked_patches"
    config.batch_size = MASKED_BATCH_SIZE
    config.duration = f"{MASKED_STEPS} steps"
    config.dataset.image_size = PRETRAIN_IMAGE_SIZE
    config.dataset.protocol = "big_vision"
    config.optimizer = adam(MASKED_WEIGHT_DECAY, clip_norm=0.0)
    config.schedule.base_lr = MASKED_LR
    config.schedule.decay = "cosine"
    config.schedule.warmup = f"{MASKED_WARMUP_STEPS} steps"
    return config


def finetuning_row(dataset: str) -> FineTuning:
    """The row of Table 4 for a data set.

    Not in the paper: one that Table 4 does not have takes the row of Pets and Flowers, which are of
    the size that people fine-tune on.
    """
    return TABLE_4.get(table_name(dataset), TABLE_4["oxford_flowers102"])


def enlarge(config: ConfigDict) -> None:
    """Table 2's ImageNet rows: a larger resolution, and Polyak averaging."""
    # 512 is no multiple of H/14's patches: 518, the next, is the paper's.
    downsampling = models.describe(config.model).downsampling
    config.dataset.image_size = -(-LARGE_IMAGE_SIZE // downsampling) * downsampling
    config.ema_decay = POLYAK_DECAY


# Stands for a value that only the user can give.
REQUIRED = "REQUIRED"
# What travels with weights, in `config.model`, and its type. None, as fine-tuning has it, is what
# the weights of init_from were trained with, and without weights the model's default.
LEFT_TO_WEIGHTS = {
    "classifier": str,
    "distillation_token": bool,
    "gelu": str,
    "group_norm_epsilon": float,
    "layer_norm_epsilon": float,
    "layer_scale": float,
    "mlp": str,
    "num_registers": int,
    "position_embedding": str,
    "position_placement": str,
}


def base(model: str, dataset: str) -> ConfigDict:
    """Every key of a config, with the values that both recipes share or leave open."""
    sizes = {"num_classes": 0, "dtype": "bfloat16", **models.model_config(model)}
    return ConfigDict(
        {
            "seed": 0,
            "batch_size": 0,
            "accumulate_steps": 1,
            "duration": "",
            "init_from": "",
            # Whether the weights' head stays where it knows the classes of the data: never, as the
            # paper's (Section 3.2 removes it), or auto.
            "keep_head": "never",
            "objective": "classification",  # or masked_patches, segmentation, detection
            # Of masked patch prediction: the share of patches to corrupt, and what is predicted of
            # them: mean_color, downsized or pixels.
            "masking": {"rate": MASKED_RATE, "target": MASKED_TARGET},
            # Of detection: the channels and convolutions of each tower, cells on each side of a
            # patch (1, 2 or 4), and the objects of an image that are learned, the largest.
            "detection": {"width": 256, "layers": 4, "upsample": 1, "most_boxes": 100},
            # A teacher: any weights, "" is none; hard or soft; its share of the loss; and what
            # logits are divided by where it is soft. DeiT has hard with 0.5, soft with 0.1 and 3.
            "distillation": {"teacher": "", "kind": "hard", "alpha": 0.5, "temperature": 3.0},
            "loss": "softmax",
            "label_smoothing": 0.0,
            "class_weights": "",  # or balanced: classes of few images count for more of the loss
            # A name of `data.augmentation.AUGREG`, or for example "randaugment(2,15)+mixup(0.2)".
            "augment": "none",
            # The gray that RandAugment's Contrast goes from, of a name of AUGREG and in words:
            # augreg, as in that code, or pil, the image's mean.
            "augment_contrast": "augreg",
            "ema_decay": 0.0,
            # LoRA: the rank of the change of each kernel, 0 is off; what it is multiplied by is
            # alpha / rank; of query, key, value, out and mlp which kernels.
            "lora": {"rank": 0, "alpha": 8.0, "targets": "query,value"},
            "sharding": "replicated",
            "log_every": "50 steps",
            # Pictures for TensorBoard: inputs, attention, confusion; see `pictures`.
            "log_images": "",
            # What is evaluated while the run goes and at its end, see `evaluation.registry`; "val"
            # decides which checkpoint is the best.
            "evals": {
                "val": registry.complete({"type": "objective"}),
                "fewshot": registry.complete(
                    {"type": "fewshot"}
                ),  # off until it is given a data set
            },
            # Evaluations of val without a better one until the run stops; 0 never does.
            "patience": 0,
            "checkpoint_every": "1000 steps",
            "keep_checkpoints": 2,
            "dataset": _dataset(dataset),
            "model": {
                "architecture": sizes["architecture"],
                **dataclasses.asdict(models.describe(sizes)),
            },
            "optimizer": {},
            "schedule": {
                "base_lr": 0.0,
                "decay": "cosine",
                "warmup": "0 steps",
                "end_lr": 0.0,
                "timescale": "10000 steps",  # of decay rsqrt
                "drops": DROPS,  # of decay staircase
                "cooldown": "0 steps",
            },
        }
    )


def _dataset(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "data_dir": "",
        "train_split": "",
        "eval_split": "",
        "development": False,
        "subset": "",  # of the training images: "10%" or "5000"; "" is all
        "subset_seed": 0,
        "sampling": "",  # or balanced: every class equally often
        # Of a folder or list without splits, the share of each class that is evaluated on.
        "holdout": 0.2,
        "broken": "refuse",  # files that should be images and are not, or "skip" them
        "image_size": config_dict.FieldReference(0, field_type=ImageSize),
        "channels": 3,
        "protocol": "",
        # Of decoding JPEG: accurate, as PIL, or fast, TensorFlow's default, which Google's
        # checkpoints saw. They are about a gray level apart.
        "jpeg_dct": "accurate",
        "random_crop": True,
        "random_flip": True,
        # Processes that read and crop the training images; 0 is threads, which are enough
        # unless Python's lock holds up a machine of many cores.
        "workers": 0,
    }
