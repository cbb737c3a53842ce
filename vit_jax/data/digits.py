"""scikit-learn's handwritten digits: real images with nothing to download and nothing to prepare.

1,797 gray 8x8 images (UCI ML repository). The source has no test split. Every fifth image of each
digit, in scikit-learn's order, is the test split here: 355 images, and 1,442 to train on. The split
is by digit because the order is not random: it often runs from 0 to 9 again and again.
"""

import dataclasses
import functools
import importlib.util
import io
import pathlib

import numpy as np
from PIL import Image

from vit_jax.data import splits
from vit_jax.data.source import Example, Source
from vit_jax.errors import UserError

NAME = "digits"
# So the images in a slice such as "train[:90%]" are a random sample, as TFDS's are.
_ORDER_SEED = 0


@functools.cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [1797, 8, 8], and their digits, in scikit-learn's order.

    Raises:
        UserError: scikit-learn is not installed.
    """
    # The file alone: to import scikit-learn takes a second.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("data set 'digits' is in scikit-learn, which is missing: pip install it")
    path = pathlib.Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)
    # Ink is counted from 0 to 16.
    images = np.round(rows[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    return images, rows[:, -1]


@dataclasses.dataclass(frozen=True)
class _Examples:
    indices: np.ndarray  # among all images

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        where = int(self.indices[index])
        return {"image": _png(where), "label": int(load()[1][where]), "id": f"{NAME} {where}"}

    def ids(self) -> list[str]:
        return [f"{NAME} {index}" for index in self.indices]

    def labels(self) -> np.ndarray:
        return load()[1][self.indices]


@functools.cache
def _png(where: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(load()[0][where]).save(buffer, "PNG")
    return buffer.getvalue()


class DigitsDataset:
    """The splits train and test."""

    split_names = ("train", "test")

    def __init__(self) -> None:
        """Reads the images.

        Raises:
            UserError: scikit-learn is not installed.
        """
        _, labels = load()
        places = np.zeros(len(labels), int)
        for digit in range(10):
            places[labels == digit] = np.arange(np.sum(labels == digit))
        order = np.random.default_rng(_ORDER_SEED).permutation(len(labels))
        is_test = places[order] % 5 == 4
        self._indices = {"train": order[~is_test], "test": order[is_test]}

    def source(self, split: str) -> Source:
        """Returns a split, in the syntax of TFDS.

        Raises:
            ValueError: if `split` is malformed, names no split or selects nothing.
        """
        sizes = {name: len(indices) for name, indices in self._indices.items()}
        parts = splits.slices(split, sizes)
        indices = np.concatenate([self._indices[name][part] for name, part in parts])
        class_names = tuple("0123456789")
        num_bytes = sum(len(_png(int(index))) for index in indices)
        return Source(NAME, split, class_names, num_bytes, _Examples(indices))
