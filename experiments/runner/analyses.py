"""What the analyses of runs share: images to look at, and arrays that they leave for pictures."""

import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax.files import atomic_write
from vit_jax.printable import printable

if TYPE_CHECKING:
    import jax
    from matplotlib.figure import FigureBase

    from experiments.runner.results import Result, Results
    from vit_jax.checkpoints.pretrained import Pretrained
    from vit_jax.models import Model

# Attention weights of ViT-L/16 at 384 pixels are half a gigabyte an image.
_IMAGES_AT_A_TIME = 4
_ARRAYS = "arrays.npz"


class Observed(NamedTuple):
    """A trained model that is looked at.

    Attributes:
        run: its folder.
        pretrained: its weights and what belongs to them.
        model: the module.
        grid: rows and columns of patches.
        side: of a patch in pixels.
    """

    run: pathlib.Path
    pretrained: "Pretrained"
    model: "Model"
    grid: tuple[int, int]
    side: int

    @property
    def image_size(self) -> int:
        """The side of its images in pixels."""
        return self.pretrained.preprocessing.image_size

    def attention(
        self, function: "Callable[[jax.Array], jax.Array]", images: np.ndarray
    ) -> np.ndarray:
        """Maps the attention weights of images, few at a time.

        Args:
            function: from weights [batch, layers, heads, tokens, tokens] to [batch, ...].
            images: [images, height, width, 3], as the model takes them.

        Returns:
            [images, ...].
        """
        import jax

        from vit_jax.analysis.intermediates import attention_weights

        params = jax.device_put(self.pretrained.params)
        compiled = jax.jit(lambda params, x: function(attention_weights(self.model, params, x)))
        parts = np.split(images, range(_IMAGES_AT_A_TIME, len(images), _IMAGES_AT_A_TIME))
        return np.concatenate([np.asarray(compiled(params, part)) for part in parts])

    def evaluation_images(self, count: int) -> np.ndarray:
        """Some of the images that the run is evaluated on, drawn at random but always the same.

        Args:
            count: how many; all if there are fewer.

        Returns:
            [images, height, width, 3], as the model takes them.
        """
        from vit_jax.data import datasets, pipeline

        data = json.loads((self.run / "config.json").read_text())["dataset"]
        keys = ("data_dir", "train_split", "eval_split", "development")
        _, source = datasets.open_dataset(data["name"], **{key: data[key] for key in keys})
        chosen = np.random.default_rng(0).permutation(source.num_examples)[:count]
        batches = pipeline.eval_batches(
            source.select(chosen),
            batch_size=len(chosen),
            preprocessing=self.pretrained.preprocessing,
        )
        return next(iter(batches))["image"]

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Images in [0, 1] again, of the shape in which the model takes them."""
        preprocessing = self.pretrained.preprocessing
        mean, std = (np.float32(x) for x in (preprocessing.mean, preprocessing.std))
        return np.clip(images * std + mean, 0, 1)


def observe(run: pathlib.Path) -> Observed:
    """Loads the model of a run, as it was at its end."""
    from vit_jax.checkpoints.pretrained import load_pretrained
    from vit_jax.models import create_model

    pretrained = load_pretrained(run)
    model = create_model(pretrained.model)
    count = pretrained.preprocessing.image_size // model.downsampling
    return Observed(run, pretrained, model, (count, count), model.downsampling)


def save_arrays(workdir: pathlib.Path, **arrays: Any) -> None:
    """Leaves arrays in the folder of a task."""
    with atomic_write(workdir / _ARRAYS) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_arrays(results: "Results", result: "Result") -> dict[str, np.ndarray] | None:
    """The arrays that the first task of a result has left, None if it has not finished."""
    folder = results.folders.get(result.measurement.sources[0].name)
    if folder is None:
        return None
    with np.load(folder / _ARRAYS) as arrays:
        return dict(arrays)


def nothing(result: "Result", figure: "FigureBase | None" = None) -> "FigureBase":
    """Says in place of a picture why there is none.

    Args:
        result: that it would be of.
        figure: to write in, by default a new one.
    """
    from matplotlib.figure import Figure

    figure = figure or Figure(figsize=(6, 1.5))
    lines = result.problems or ("not run",)
    options = {"ha": "center", "va": "center", "fontsize": 9, "wrap": True, "parse_math": False}
    figure.text(0.5, 0.5, printable(lines[0]), **options)
    return figure
