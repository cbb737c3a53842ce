"""ObjectNet (Barbu et al., 2019): the 113 of its 313 classes that ImageNet has, too.

objectnet_classes.txt has a line for each of them: the directory's name, and the WordNet ids of the
ImageNet classes that it stands for, of some several. It joins the two files of ObjectNet's archive,
mappings/folder_to_objectnet_label.json and mappings/objectnet_to_imagenet_1k.json, as they stand in
github.com/mlfoundations/wise-ft (src/datasets/objectnet_metadata), by the names of the classes.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vit_jax.data import folder, imagenet
from vit_jax.data.labeled_files import FileExamples
from vit_jax.data.source import Example, Source
from vit_jax.errors import UserError

PREFIX = "objectnet:"
# Red, around every image, against images getting into training sets unnoticed.
BORDER = 2


@functools.cache
def classes() -> Mapping[str, tuple[int, ...]]:
    """The ImageNet classes, as indices of logits, by the name of ObjectNet's directory."""
    index = {name: i for i, name in enumerate(imagenet.classes())}
    text = importlib.resources.files("vit_jax.data").joinpath("objectnet_classes.txt").read_text()
    lines = (line.split() for line in text.splitlines())
    return {name: tuple(index[wordnet_id] for wordnet_id in ids) for name, *ids in lines}


def open_objectnet(name: str) -> tuple[Source, int, int]:
    """Opens ObjectNet's images of the classes that ImageNet has.

    Args:
        name: "objectnet:PATH", the folder `images` of its archive or what is around it, with one
            directory per class.

    Returns:
        A source whose labels are int64 [1000], 1 for every ImageNet class that an image's class
        stands for, and whose border is to be cut off; how many of the 113 classes are there; and
        how many directories are of none of them and were passed over.

    Raises:
        UserError: the folder is missing or has none of the classes, or a file is not an image.
    """
    root = Path(name.removeprefix(PREFIX)).expanduser()
    root = root / "images" if (root / "images").is_dir() else root
    if not root.is_dir():
        raise UserError(f"{root} is not a directory: give the folder images of ObjectNet's archive")
    directories = [entry for entry in folder.visible(root) if entry.is_dir()]
    labels = {directory: index for index, directory in enumerate(classes())}
    shared_classes = [directory for directory in directories if directory.name in labels]
    files = tuple(
        folder.check_image(path, labels[directory.name])
        for directory in shared_classes
        for path in folder.visible(directory)
    )
    if not files:
        raise UserError(
            f"{root} has no images of ObjectNet's classes that ImageNet has: one directory per "
            "class is expected, such as alarm_clock"
        )
    targets = np.zeros((len(labels), len(imagenet.classes())), np.int64)
    for row, indices in zip(targets, classes().values(), strict=True):
        row[list(indices)] = 1

    source = Source(
        name,
        split="test",
        class_names=tuple(imagenet.classes()),
        num_bytes=sum(file.num_bytes for file in files),
        examples=_MultiHot(files, targets),
        border=BORDER,
    )
    return source, len({file.label for file in files}), len(directories) - len(shared_classes)


@dataclasses.dataclass(frozen=True)
class _MultiHot(FileExamples):
    targets: np.ndarray  # of each class of ObjectNet, int64 [113, 1000]

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return example | {"label": self.targets[example["label"]]}
