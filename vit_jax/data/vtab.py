"""VTAB-1k: the facts of its 19 tasks, without TensorFlow.

Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation
Benchmark" (2019); splits and labels as in google-research/task_adaptation, crops and flips from
the ViT paper (Appendix B.1.1, D.10). Where TFDS has moved on, the version here is today's:
task_adaptation read oxford_iiit_pet 3.*.*, whose corrupt images 4.0.0 mends, and kitti 3.1.0.
"""

from collections.abc import Mapping
from typing import NamedTuple

from vit_jax.errors import UserError, nearest

PREFIX = "vtab:"
NUM_TRAIN, NUM_VALIDATION = 800, 200

# The class of a distance is the number of thresholds below it, less one.
CLEVR_THRESHOLDS = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_THRESHOLDS = (-100.0, 8.0, 20.0, 999.0)
KITTI_NO_VEHICLE = 1000.0  # metres; beyond the last threshold
KITTI_VEHICLES = 3  # types 0, 1 and 2: car, van and truck
CLEVR_FEWEST = 3  # objects in an image, of 3 to 10
DSPRITES_BINS = 16


class Task(NamedTuple):
    """A task, one of the 19.

    Attributes:
        builder: of TFDS, with its configuration and version.
        group: "natural", "specialized" or "structured".
        validation: the TFDS split, and the percentage of it at which the 200 images begin.
        test: likewise; all that follows is the test set.
        features: of TFDS that the label is made of, nested as there, each with True.
        rule: how: "class" takes the feature; see `labels.RULES` for the others.
        class_names: by label; none are those of the feature.
        random_crop: whether training crops at random.
        random_flip: whether training mirrors at random.
        binary_pixels: whether a pixel is stored as 0 or 1, not up to 255.
    """

    builder: str
    group: str
    validation: tuple[str, int]
    test: tuple[str, int]
    features: Mapping[str, bool | Mapping[str, bool]] = {"label": True}
    rule: str = "class"
    class_names: tuple[str, ...] = ()
    random_crop: bool = True
    random_flip: bool = True
    binary_pixels: bool = False


def _natural(builder, validation, test=("test", 0)):
    return Task(builder, "natural", validation, test)


def _specialized(builder, validation, test=("test", 0)):
    return Task(builder, "specialized", validation, test)


def _clevr(rule, feature, class_names):
    # The test split of CLEVR has no objects: its validation split is the test set.
    return Task(
        "clevr:3.*.*",
        "structured",
        ("train", 90),
        ("validation", 0),
        {"objects": {feature: True}},
        rule,
        class_names,
        random_crop=False,
    )


def _dsprites(feature, random_crop):
    return Task(
        "dsprites:2.*.*",
        "structured",
        ("train", 80),
        ("train", 90),
        {feature: True},
        "bins",
        tuple(str(index) for index in range(DSPRITES_BINS)),
        random_crop,
        random_flip=False,
        binary_pixels=True,
    )


def _smallnorb(feature, random_flip):
    return Task(
        "smallnorb:2.*.*",
        "structured",
        ("test", 0),
        ("test", 50),
        {feature: True},
        random_flip=random_flip,
    )


_VALIDATION = ("validation", 0)

# In the order of Table 9.
TASKS = {
    "caltech101": _natural("caltech101:3.*.*", ("train", 90)),
    "cifar100": _natural("cifar100:3.*.*", ("train", 90)),
    "dtd": _natural("dtd:3.*.*", _VALIDATION),
    "oxford_flowers102": _natural("oxford_flowers102:2.*.*", _VALIDATION),
    "oxford_iiit_pet": _natural("oxford_iiit_pet:4.*.*", ("train", 80)),
    "sun397": _natural("sun397/tfds:4.*.*", _VALIDATION),
    "svhn": _natural("svhn_cropped:3.*.*", ("train", 90)),
    "patch_camelyon": _specialized("patch_camelyon:2.*.*", _VALIDATION),
    "eurosat": _specialized("eurosat/rgb:2.*.*", ("train", 60), ("train", 80)),
    "resisc45": _specialized("resisc45:3.*.*", ("train", 60), ("train", 80)),
    "diabetic_retinopathy": _specialized(
        "diabetic_retinopathy_detection/btgraham-300:3.*.*", _VALIDATION
    ),
    "clevr_count": _clevr("count", "size", tuple(map(str, range(3, 11)))),
    "clevr_distance": _clevr(
        "closest object",
        "pixel_coords",
        ("up to 8", "up to 8.5", "up to 9", "up to 9.5", "up to 10", "above 10"),
    ),
    "dmlab": Task("dmlab:2.*.*", "structured", _VALIDATION, ("test", 0), random_crop=False),
    "dsprites_location": _dsprites("label_x_position", random_crop=False),
    "dsprites_orientation": _dsprites("label_orientation", random_crop=True),
    "kitti_distance": Task(
        "kitti:3.*.*",
        "structured",
        _VALIDATION,
        ("test", 0),
        {"objects": {"type": True, "location": True}},
        "closest vehicle",
        ("up to 8 m", "up to 20 m", "above 20 m", "no vehicle"),
        random_crop=False,
    ),
    "smallnorb_azimuth": _smallnorb("label_azimuth", random_flip=False),
    "smallnorb_elevation": _smallnorb("label_elevation", random_flip=True),
}
GROUPS = ("natural", "specialized", "structured")


def is_vtab(dataset: str) -> bool:
    """Tells whether the name of a data set is that of a task, "vtab:svhn"."""
    return dataset.startswith(PREFIX)


def get_task(dataset: str) -> Task:
    """The task "vtab:NAME".

    Raises:
        UserError: there is none of that name.
    """
    name = dataset.removeprefix(PREFIX)
    if name not in TASKS:
        near = nearest(name, TASKS)
        hint = f"did you mean {PREFIX}{near}?" if near else f"there are {', '.join(TASKS)}"
        raise UserError(f"{dataset!r} is none of the 19 tasks of VTAB: {hint}")
    return TASKS[name]


def splits(task: Task, sizes: Mapping[str, int], development: bool) -> tuple[str, str]:
    """The splits to train and to evaluate on, in the syntax of TFDS.

    Args:
        task: one of `TASKS`.
        sizes: examples in each split of the builder.
        development: train on 800 and evaluate on 200 others; else train on these 1,000 together
            and evaluate on the whole test set.
    """
    split, percent = task.validation
    start = _first(sizes[split], percent)
    train = f"train[:{NUM_TRAIN}]"
    validation = f"{split}[{start or ''}:{start + NUM_VALIDATION}]"
    if development:
        return train, validation
    split, percent = task.test
    test = f"{split}[{_first(sizes[split], percent)}:]" if percent else split
    return f"{train}+{validation}", test


def _first(size: int, percent: int) -> int:
    # Rounded down, as in task_adaptation; TFDS rounds a percentage to the nearest.
    return size * percent // 100
