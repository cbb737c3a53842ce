"""The numbers of "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929).

Typed from the paper. Accuracies are in percent. A table is a mapping from the key of a cell, the
labels of its row and then those of its column, to its number; cells that the paper leaves empty are
left out. Models and data sets have the names of this codebase: "ViT-B/16", "R50x1", "jft",
"imagenet21k", "imagenet2012"; "real" is ImageNet with the labels of ReaL.

Where the paper contradicts itself, each place has what stands there: ViT-H/14 of JFT has 88.04% on
ImageNet in Table 5 and 88.08% in Table 6, and other tasks of it differ, too; in Table 6 the 859
exaFLOPs of R50+ViT-L/16 are not half of the 1668 of twice the epochs.

This module imports nothing: the tests hold the recipes against it.
"""


def _cells(columns, rows):
    """The cells that are not None, by the key of the row and that of the column, both tuples."""
    return {
        (*row, *column): number
        for row, numbers in rows.items()
        for column, number in zip(columns, numbers, strict=True)
        if number is not None
    }


def _of(*names):
    return tuple((name,) for name in names)


# Layers, hidden size, MLP size, heads, and parameters in millions.
TABLE_1 = {
    "ViT-B": (12, 768, 3072, 12, 86),
    "ViT-L": (24, 1024, 4096, 16, 307),
    "ViT-H": (32, 1280, 5120, 16, 632),
}

# Mean and standard deviation of three fine-tuning runs. ImageNet and ReaL: at 512 pixels (518 of
# H/14), with Polyak averaging.
TABLE_2 = _cells(
    (("ViT-H/14", "jft"), ("ViT-L/16", "jft"), ("ViT-L/16", "imagenet21k")),
    {
        ("imagenet2012",): ((88.55, 0.04), (87.76, 0.03), (85.30, 0.02)),
        ("real",): ((90.72, 0.05), (90.54, 0.03), (88.62, 0.05)),
        ("cifar10",): ((99.50, 0.06), (99.42, 0.03), (99.15, 0.03)),
        ("cifar100",): ((94.55, 0.04), (93.90, 0.05), (93.25, 0.05)),
        ("oxford_iiit_pet",): ((97.56, 0.03), (97.32, 0.11), (94.67, 0.15)),
        ("oxford_flowers102",): ((99.68, 0.02), (99.74, 0.00), (99.61, 0.02)),
        ("vtab",): ((77.63, 0.23), (76.28, 0.46), (72.72, 0.21)),
    },
)
# The columns of others: BiT-L is R152x4, Noisy Student is EfficientNet-L2, of which the paper
# gives two numbers on ImageNet, 88.4 and 88.5. A deviation of None is not given.
TABLE_2_OTHERS = _cells(
    _of("BiT-L", "Noisy Student"),
    {
        ("imagenet2012",): ((87.54, 0.02), (88.5, None)),
        ("real",): ((90.54, None), (90.55, None)),
        ("cifar10",): ((99.37, 0.06), None),
        ("cifar100",): ((93.51, 0.08), None),
        ("oxford_iiit_pet",): ((96.62, 0.23), None),
        ("oxford_flowers102",): ((99.63, 0.03), None),
        ("vtab",): ((76.29, 1.70), None),
    },
)
# TPUv3-core-days of pre-training, in thousands.
TABLE_2_CORE_DAYS = {
    ("ViT-H/14", "jft"): 2.5,
    ("ViT-L/16", "jft"): 0.68,
    ("ViT-L/16", "imagenet21k"): 0.23,
    ("BiT-L",): 9.9,
    ("Noisy Student",): 12.3,
}

# Pre-training: the epochs that were tried, base learning rate, decay, weight decay, dropout. All
# with Adam (0.9, 0.999), batch 4096, 10,000 steps of warm-up, 224 pixels; on ImageNet clipping at
# global norm 1.
TABLE_3 = {
    ("ViT-B/32", "jft"): ((7,), 8e-4, "linear", 0.1, 0.0),
    ("ViT-B/16", "jft"): ((7,), 8e-4, "linear", 0.1, 0.0),
    ("ViT-L/32", "jft"): ((7,), 6e-4, "linear", 0.1, 0.0),
    ("ViT-L/16", "jft"): ((7, 14), 4e-4, "linear", 0.1, 0.0),
    ("ViT-H/14", "jft"): ((14,), 3e-4, "linear", 0.1, 0.0),
    ("R50x1", "jft"): ((7,), 1e-3, "linear", 0.1, 0.0),
    ("R50x2", "jft"): ((7,), 1e-3, "linear", 0.1, 0.0),
    ("R101x1", "jft"): ((7,), 8e-4, "linear", 0.1, 0.0),
    ("R152x1", "jft"): ((7,), 6e-4, "linear", 0.1, 0.0),
    ("R152x2", "jft"): ((7,), 6e-4, "linear", 0.1, 0.0),
    ("R50+ViT-B/32", "jft"): ((7,), 8e-4, "linear", 0.1, 0.0),
    ("R50+ViT-B/16", "jft"): ((7,), 8e-4, "linear", 0.1, 0.0),
    ("R50+ViT-L/32", "jft"): ((7,), 2e-4, "linear", 0.1, 0.0),
    ("R50+ViT-L/16", "jft"): ((7, 14), 4e-4, "linear", 0.1, 0.0),
    ("ViT-B/16", "imagenet21k"): ((90,), 1e-3, "linear", 0.03, 0.1),
    ("ViT-B/32", "imagenet21k"): ((90,), 1e-3, "linear", 0.03, 0.1),
    ("ViT-L/16", "imagenet21k"): ((30, 90), 1e-3, "linear", 0.03, 0.1),
    ("ViT-L/32", "imagenet21k"): ((30, 90), 1e-3, "linear", 0.03, 0.1),
    ("ViT-*", "imagenet2012"): ((300,), 3e-3, "cosine", 0.3, 0.1),
}
# Accuracy of pre-training on its own validation images at 224 pixels; of ImageNet-21k precision@1.
# Not in the paper: of the logs that the authors published later.
UPSTREAM = {
    ("ViT-B/32", "imagenet2012"): 69.19,
    ("ViT-B/16", "imagenet2012"): 74.79,
    ("ViT-L/32", "imagenet2012"): 66.90,
    ("ViT-L/16", "imagenet2012"): 72.59,
    ("ViT-B/16", "imagenet21k"): 47.88,
    ("ViT-B/32", "imagenet21k"): 44.04,
    ("ViT-L/16", "imagenet21k"): 49.90,
    ("ViT-L/32", "imagenet21k"): 45.42,
    ("ViT-H/14", "imagenet21k"): 49.06,
}

# Fine-tuning: steps, and the base learning rates that were tried. All with SGD of momentum 0.9,
# cosine decay, batch 512, no weight decay, clipping at global norm 1, 384 pixels.
TABLE_4 = {
    "imagenet2012": (20_000, (0.003, 0.01, 0.03, 0.06)),
    "cifar100": (10_000, (0.001, 0.003, 0.01, 0.03)),
    "cifar10": (10_000, (0.001, 0.003, 0.01, 0.03)),
    "oxford_iiit_pet": (500, (0.001, 0.003, 0.01, 0.03)),
    "oxford_flowers102": (500, (0.001, 0.003, 0.01, 0.03)),
    "vtab": (2_500, (0.01,)),
}
# Percent of train on which the rate was chosen.
HELD_OUT = {
    "imagenet2012": 1,
    "cifar100": 2,
    "cifar10": 2,
    "oxford_iiit_pet": 10,
    "oxford_flowers102": 10,
}

# At 384 pixels, without Polyak averaging.
TABLE_5 = _cells(
    _of("ViT-B/16", "ViT-B/32", "ViT-L/16", "ViT-L/32", "ViT-H/14"),
    {
        ("imagenet2012", "cifar10"): (98.13, 97.77, 97.86, 97.94, None),
        ("imagenet2012", "cifar100"): (87.13, 86.31, 86.35, 87.07, None),
        ("imagenet2012", "imagenet2012"): (77.91, 73.38, 76.53, 71.16, None),
        ("imagenet2012", "real"): (83.57, 79.56, 82.19, 77.83, None),
        ("imagenet2012", "oxford_flowers102"): (89.49, 85.43, 89.66, 86.36, None),
        ("imagenet2012", "oxford_iiit_pet"): (93.81, 92.04, 93.64, 91.35, None),
        ("imagenet21k", "cifar10"): (98.95, 98.79, 99.16, 99.13, 99.27),
        ("imagenet21k", "cifar100"): (91.67, 91.97, 93.44, 93.04, 93.82),
        ("imagenet21k", "imagenet2012"): (83.97, 81.28, 85.15, 80.99, 85.13),
        ("imagenet21k", "real"): (88.35, 86.63, 88.40, 85.65, 88.70),
        ("imagenet21k", "oxford_flowers102"): (99.38, 99.11, 99.61, 99.19, 99.51),
        ("imagenet21k", "oxford_iiit_pet"): (94.43, 93.02, 94.73, 93.09, 94.82),
        ("jft", "cifar10"): (99.00, 98.61, 99.38, 99.19, 99.50),
        ("jft", "cifar100"): (91.87, 90.49, 94.04, 92.52, 94.55),
        ("jft", "imagenet2012"): (84.15, 80.73, 87.12, 84.37, 88.04),
        ("jft", "real"): (88.85, 86.27, 89.99, 88.28, 90.33),
        ("jft", "oxford_flowers102"): (99.56, 99.27, 99.56, 99.45, 99.68),
        ("jft", "oxford_iiit_pet"): (95.80, 93.40, 97.11, 95.83, 97.56),
    },
)

# Pre-trained on JFT, by model and epochs. "exaflops" are those of pre-training.
TABLE_6 = _cells(
    _of(
        "imagenet2012",
        "real",
        "cifar10",
        "cifar100",
        "oxford_iiit_pet",
        "oxford_flowers102",
        "exaflops",
    ),
    {
        ("ViT-B/32", 7): (80.73, 86.27, 98.61, 90.49, 93.40, 99.27, 55),
        ("ViT-B/16", 7): (84.15, 88.85, 99.00, 91.87, 95.80, 99.56, 224),
        ("ViT-L/32", 7): (84.37, 88.28, 99.19, 92.52, 95.83, 99.45, 196),
        ("ViT-L/16", 7): (86.30, 89.43, 99.38, 93.46, 96.81, 99.66, 783),
        ("ViT-L/16", 14): (87.12, 89.99, 99.38, 94.04, 97.11, 99.56, 1567),
        ("ViT-H/14", 14): (88.08, 90.36, 99.50, 94.71, 97.11, 99.71, 4262),
        ("R50x1", 7): (77.54, 84.56, 97.67, 86.07, 91.11, 94.26, 50),
        ("R50x2", 7): (82.12, 87.94, 98.29, 89.20, 93.43, 97.02, 199),
        ("R101x1", 7): (80.67, 87.07, 98.48, 89.17, 94.08, 95.95, 96),
        ("R152x1", 7): (81.88, 87.96, 98.82, 90.22, 94.17, 96.94, 141),
        ("R152x2", 7): (84.97, 89.69, 99.06, 92.05, 95.37, 98.62, 563),
        ("R152x2", 14): (85.56, 89.89, 99.24, 91.92, 95.75, 98.75, 1126),
        ("R200x3", 14): (87.22, 90.15, 99.34, 93.53, 96.32, 99.04, 3306),
        ("R50+ViT-B/32", 7): (84.90, 89.15, 99.01, 92.24, 95.75, 99.46, 106),
        ("R50+ViT-B/16", 7): (85.58, 89.65, 99.14, 92.63, 96.65, 99.40, 274),
        ("R50+ViT-L/32", 7): (85.68, 89.04, 99.24, 92.93, 96.97, 99.43, 246),
        ("R50+ViT-L/16", 7): (86.60, 89.72, 99.18, 93.64, 97.03, 99.40, 859),
        ("R50+ViT-L/16", 14): (87.12, 89.76, 99.31, 93.89, 97.36, 99.11, 1668),
    },
)

# ResNets pre-trained on JFT for 7 epochs, by optimizer; "mean" is that of the five tasks.
TABLE_7 = _cells(
    _of("adam", "sgd"),
    {
        ("R50x1", "imagenet2012"): (77.54, 78.24),
        ("R50x1", "cifar10"): (97.67, 97.46),
        ("R50x1", "cifar100"): (86.07, 85.17),
        ("R50x1", "oxford_iiit_pet"): (91.11, 91.00),
        ("R50x1", "oxford_flowers102"): (94.26, 92.06),
        ("R50x1", "mean"): (89.33, 88.79),
        ("R152x2", "imagenet2012"): (84.97, 84.37),
        ("R152x2", "cifar10"): (99.06, 99.07),
        ("R152x2", "cifar100"): (92.05, 91.06),
        ("R152x2", "oxford_iiit_pet"): (95.37, 94.79),
        ("R152x2", "oxford_flowers102"): (98.62, 99.32),
        ("R152x2", "mean"): (94.01, 93.72),
    },
)

# ViT-B/16, 5 images a class of ImageNet: position embedding, and where it is added.
TABLE_8 = _cells(
    _of("stem", "layers", "shared"),
    {
        ("none",): (61.382, None, None),
        ("learned",): (64.206, 63.964, 64.292),
        ("2d",): (64.001, 64.046, 64.022),
        ("relative",): (64.032, None, None),
    },
)

# VTAB-1k.
TABLE_9 = _cells(
    (("ViT-H/14", "jft"), ("ViT-L/16", "jft"), ("ViT-L/16", "imagenet21k")),
    {
        ("caltech101",): (95.3, 95.4, 90.8),
        ("cifar100",): (85.5, 81.9, 84.1),
        ("dtd",): (75.2, 74.3, 74.1),
        ("oxford_flowers102",): (99.7, 99.7, 99.3),
        ("oxford_iiit_pet",): (97.2, 96.7, 92.7),
        ("sun397",): (65.0, 63.5, 61.0),
        ("svhn",): (88.9, 87.4, 80.9),
        ("patch_camelyon",): (83.3, 83.6, 82.5),
        ("eurosat",): (96.7, 96.5, 95.6),
        ("resisc45",): (91.4, 89.7, 85.2),
        ("diabetic_retinopathy",): (76.6, 77.1, 75.3),
        ("clevr_count",): (91.7, 86.4, 70.3),
        ("clevr_distance",): (63.8, 63.1, 56.1),
        ("dmlab",): (53.1, 49.7, 41.9),
        ("dsprites_location",): (79.4, 74.5, 74.7),
        ("dsprites_orientation",): (63.3, 60.5, 64.9),
        ("kitti_distance",): (84.5, 82.2, 79.9),
        ("smallnorb_azimuth",): (33.2, 36.2, 30.5),
        ("smallnorb_elevation",): (51.2, 51.1, 41.7),
        ("mean",): (77.6, 76.3, 72.7),
    },
)

# Read off: 5 images a class of ImageNet, by model and pre-training images of JFT.
FIGURE_4 = _cells(
    _of(9_000_000, 30_000_000, 90_000_000, 300_000_000),
    {
        ("ViT-L/16",): (42, 58, 70, 71.5),
        ("ViT-L/32",): (36, 53.5, 64, 65.3),
        ("ViT-B/32",): (38, 53, 54.7, 55.2),
        ("ViT-b/32",): (37.4, 40.7, 41.2, 42),
        ("R50x1",): (47.8, 50.8, 51.9, 52),
        ("R152x2",): (52.7, 66.9, 68.9, 69.3),
    },
)

# Appendix D.2: what is scaled, one at a time and all together.
FIGURE_8_BASE = {"num_layers": 8, "hidden_size": 1024, "mlp_dim": 2048, "patch_size": 32}

# Read off: 5 images a class of ImageNet, by classifier and base learning rate.
FIGURE_9 = {("token", 8e-4): 56.0, ("gap", 8e-4): 50.4, ("gap", 3e-4): 55.7}

# Speed and memory: sides of the image in pixels, on the axis from 64 to 512, and the models.
FIGURE_12_IMAGE_SIZES = (64, 128, 224, 384, 512)
FIGURE_12_MODELS = (
    "R50x1",
    "R50x2",
    "R152x4",
    "ViT-B/32",
    "ViT-B/16",
    "ViT-L/32",
    "ViT-L/16",
    "ViT-H/14",
)

# Read off: exaFLOPs of pre-training on JFT for 7 epochs, and 5 images a class of ImageNet.
FIGURE_13 = {
    "Axial-ViT-B/16": (430, 65.8),
    "ViT-B/16": (224, 63.5),
    "Axial-ViT-B/32": (107, 58.2),
    "ViT-B/32": (56, 56.4),
    "AxialResNet50": (56, 55.3),
    "R50x1": (51, 49.5),
}

# Appendix D.9: ViT-H/14 of Table 2.
OBJECTNET = {"accuracy": 61.7, "top5_accuracy": 82.1}

# Section 4.6: ViT-B/16 on ImageNet after masked patch prediction on JFT, 2% above training from
# scratch and 4% below supervised pre-training. Those two are in Table 5: 77.91, trained on ImageNet
# alone, and 84.15, pre-trained on JFT. 15% corruption was "slightly worse".
SELF_SUPERVISION = 79.9

# Images.
IMAGES = {"jft": 303_000_000, "imagenet21k": 14_000_000, "imagenet2012": 1_300_000}
CLASSES = {"jft": 18_291, "imagenet21k": 21_843, "imagenet2012": 1_000}
