"""The analyses of trained models: tasks that return numbers and leave arrays for pictures."""

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


def embeddings_of(workdir: pathlib.Path, runs: list[pathlib.Path]) -> dict[str, float]:
    """Leaves the principal components of the filters, and the similarities of the positions.

    Args:
        workdir: takes "components" [components, height, width, 3] and "similarity" [rows, columns,
            rows, columns].
        runs: of the model.

    Returns:
        "variance", the share of it that the components hold, and mean similarities, see
        `vit_jax.analysis.embeddings.similarity_by_place`.
    """
    from vit_jax.analysis import embeddings
    from vit_jax.analysis.intermediates import position_embedding

    observed = observe(runs[0])
    params = observed.pretrained.params
    components, shares = embeddings.principal_filters(embeddings.rgb_filters(params))
    images = np.zeros((1, observed.image_size, observed.image_size, 3), np.float32)
    positions = np.asarray(position_embedding(observed.model, params, images))
    similarity = embeddings.position_similarity(positions, observed.grid)
    save_arrays(workdir, components=components, similarity=similarity)
    return {"variance": float(shares.sum()), **embeddings.similarity_by_place(similarity)}


def distances_of(workdir: pathlib.Path, runs: list[pathlib.Path], images: int) -> dict[str, float]:
    """Leaves the mean attention distance of every head.

    Args:
        workdir: takes "distances" [layers, heads] in pixels, "uniform", that of a head that looks
            at all tokens alike, and "images", how many there were.
        runs: of the model.
        images: how many, at most.

    Returns:
        In sides of the image: "lowest_nearest" and "lowest_farthest", of the heads of the lowest
        layer, and "highest_mean", over those of the highest.
    """
    from vit_jax.analysis.attention import attention_distance, uniform_distance

    observed = observe(runs[0])
    grid, side = observed.grid, observed.side
    batch = observed.evaluation_images(images)
    each = observed.attention(lambda weights: attention_distance(weights, grid, side), batch)
    distances = each.astype(np.float64).mean(axis=0)
    tokens = grid[0] * grid[1] + (observed.pretrained.model["classifier"] == "token")
    uniform = uniform_distance(grid, side, tokens)
    save_arrays(workdir, distances=distances, uniform=uniform, images=len(batch))
    shares = distances / observed.image_size
    return {
        "lowest_nearest": shares[0].min(),
        "lowest_farthest": shares[0].max(),
        "highest_mean": shares[-1].mean(),
    }


def rollouts(workdir: pathlib.Path, runs: list[pathlib.Path], images: int) -> dict[str, float]:
    """Leaves images and the masks that attention makes of them.

    Args:
        workdir: takes "images" [images, height, width, 3] and "masks" [images, height, width].
        runs: of the model.
        images: how many.

    Returns:
        "spread", the mean of exp(entropy) / patches, in [0, 1].
    """
    from vit_jax.analysis.attention import on_patches, rollout, to_mask

    observed = observe(runs[0])
    batch = observed.evaluation_images(images)
    maps = observed.attention(lambda weights: on_patches(rollout(weights), observed.grid), batch)
    masks = np.asarray(to_mask(maps, batch.shape[1:3]))
    save_arrays(workdir, images=observed.pixels(batch), masks=masks)
    return {"spread": float(np.mean(spread(maps)))}


def spread(maps: np.ndarray) -> np.ndarray:
    """The share of the patches over which attention is spread, [...] in [0, 1].

    Args:
        maps: [..., rows, columns], not negative.
    """
    shares = maps / maps.sum(axis=(-2, -1), keepdims=True)
    entropy = -np.where(shares > 0, shares * np.log(np.maximum(shares, 1e-30)), 0).sum((-2, -1))
    return np.exp(entropy) / np.prod(maps.shape[-2:])


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


def nothing(figure: "FigureBase", result: "Result") -> None:
    """Says in place of a picture why there is none.

    Args:
        figure: to write in, or a part of one.
        result: that it would be of.
    """
    options = {"ha": "center", "va": "center", "fontsize": 9, "wrap": True, "parse_math": False}
    figure.text(0.5, 0.5, printable(*result.problems[:1] or ("not run",)), **options)
