"""Analyses that run a model on images: attention, rollout, distances and tokens."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import command
from vit_jax.analysis import captions, intermediates, plots
from vit_jax.analysis.attention import (
    attention_distance,
    on_patches,
    rollout,
    to_mask,
    uniform_distance,
)
from vit_jax.analysis.output import Output
from vit_jax.analysis.page import label_of
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.image_files import read_batches
from vit_jax.evaluation.ranking import top
from vit_jax.image_size import sides
from vit_jax.models import create_model

# As many as rollout.png shows; rollout.npz has all.
_SHOWN = 24
_TOP = 5
_LONGEST_LABEL = 36  # letters beside a probability, above an image


def grid_of(pretrained: Pretrained) -> tuple[tuple[int, int], int]:
    """Rows and columns of patches, and the side of one in pixels."""
    side = create_model(pretrained.model).downsampling
    height, width = sides(pretrained.preprocessing.image_size)
    return (height // side, width // side), side


def analyze_images(
    pretrained: Pretrained,
    files: Sequence[str],
    batch_size: int,
    names: Sequence[str],
    output: Output,
) -> int:
    """The analyses that run the model, all in one pass; returns how many images it had."""
    grid, side = grid_of(pretrained)
    observe = _observer(pretrained, names, grid, side)
    knows_classes = pretrained.model["num_classes"] and not pretrained.has_untrained_head
    seen: Counter[str] = Counter()
    kept = _Kept()
    for found, batch in read_batches(files, pretrained.preprocessing, batch_size, command.report):
        # Only as many rows leave the device as there are images.
        observed = {name: np.asarray(x[: len(found)]) for name, x in observe(batch).items()}
        for index, file in enumerate(found):
            row = {name: x[index] for name, x in observed.items()}
            seen[stem := Path(file).stem] += 1
            image = _Image(
                file,
                stem if seen[stem] == 1 else f"{stem}_{seen[stem]}",
                pretrained.preprocessing.to_picture(batch[index]),
                top(row["logits"], pretrained.class_names, pretrained.loss, _TOP)
                if knows_classes
                else [],
            )
            kept.keep(image, row)
            _analyze_image(image, row, grid, side, output)
    if kept.files and "rollout" in names:
        _rollout(kept, output)
    if kept.files and "distance" in names:
        num_tokens = observed["num_tokens"][0]
        _distance(kept, grid, side, num_tokens, output)
    return len(kept.files)


class _Image(NamedTuple):
    """An image, the name of its own files, its pixels [height, width, 3], and its classes."""

    file: str
    name: str
    pixels: np.ndarray
    predictions: list[dict[str, Any]]


class _Kept:
    """The parts of every image that are left for the pictures of all."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.shown: list[_Image] = []
        self.rollout: list[np.ndarray] = []
        self.distance: list[np.ndarray] = []

    def keep(self, image: _Image, row: Mapping[str, np.ndarray]) -> None:
        """Takes what is needed of an image and of what was observed of it."""
        self.files.append(image.file)
        if len(self.shown) < _SHOWN:
            self.shown.append(image)
        for name in ("rollout", "distance"):
            if name in row:
                getattr(self, name).append(row[name])


def _analyze_image(
    image: _Image,
    row: Mapping[str, np.ndarray],
    grid: tuple[int, int],
    side: int,
    output: Output,
) -> None:
    """Draws what one image has of its own."""
    page = output.page
    shown = page is not None and page.begin(image.file, image.predictions)
    if shown and "rollout" in row:
        figure = plots.rollouts(image.pixels[None], row["rollout"][None])
        caption = captions.of_rollout(row["rollout"], side)
        output.show("Attention rollout", caption, figure, file=image.file)
    if "attention" in row:
        _attention(image, row["attention"], grid, output, shown)
    if "intermediates" in row:
        _intermediates(image, row["intermediates"], grid, output, shown)


def _rollout(kept: _Kept, output: Output) -> None:
    maps, pixels = np.stack(kept.rollout), np.stack([image.pixels for image in kept.shown])
    lines = [(Path(image.file).name, _in_words(image.predictions)) for image in kept.shown]
    figure = plots.rollouts(pixels, maps[: len(pixels)], lines)
    masks = np.asarray(to_mask(jnp.asarray(maps), pixels.shape[1:3]))
    output.save("rollout", figure, files=np.array(kept.files), rollout=maps, mask=masks)


def _in_words(predictions: Sequence[Mapping[str, Any]]) -> str:
    """The most probable class with its probability; "" where no class is known."""
    if not predictions:
        return ""
    label, probability = label_of(predictions[0]), predictions[0]["probability"]
    if len(label) > _LONGEST_LABEL:
        label = f"{label[: _LONGEST_LABEL - 1]}…"
    return f"{label} {probability:.1%}"


def _distance(
    kept: _Kept, grid: tuple[int, int], side: int, num_tokens: int, output: Output
) -> None:
    each = np.stack(kept.distance)
    mean = each.astype(np.float64).mean(axis=0)
    uniform = uniform_distance(grid, side, num_tokens)
    figure = plots.attention_distances(mean, uniform, len(each))
    arrays = {"distance": mean, "distance_of_images": each, "uniform": uniform}
    output.save("distance", figure, files=np.array(kept.files), **arrays)
    output.show("Attention distance", captions.of_distances(mean, uniform), figure)


def _observer(
    pretrained: Pretrained, names: Sequence[str], grid: tuple[int, int], side: int
) -> Callable[[np.ndarray], dict[str, Any]]:
    """A function from a batch of images to what the analyses need of it, [batch, ...] each."""
    # Without scan_layers, a layer's attention weights need not outlive what is made of them.
    model = create_model(pretrained.model)
    of_weights = {
        "attention": lambda weights: weights,
        "rollout": lambda weights: on_patches(rollout(weights), grid),
        "distance": lambda weights: attention_distance(weights, grid, side),
    }

    def observe(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        logits, weights = intermediates.logits_and_attention(model, params, images)
        observed = {name: of_weights[name](weights) for name in names if name in of_weights}
        observed |= {"logits": logits, "num_tokens": jnp.full(len(images), weights.shape[-1])}
        if "intermediates" in names:
            observed["intermediates"] = intermediates.layer_tokens(model, params, images)
        return observed

    compiled, params = jax.jit(observe), jax.device_put(pretrained.params)
    return lambda images: compiled(params, images)


def _attention(
    image: _Image, weights: np.ndarray, grid: tuple[int, int], output: Output, shown: bool
) -> None:
    maps = np.asarray(on_patches(jnp.asarray(weights), grid))
    has_class_token = weights.shape[-1] > grid[0] * grid[1]
    who = "the class token" if has_class_token else "the mean of the patches"
    figure = plots.head_maps(image.pixels, maps, f"Attention of {who} to every patch")
    output.save(f"attention_{image.name}", figure, image=np.array(image.file), weights=weights)
    if shown:
        options = {"file": image.file, "closed": True}
        output.show("Every head of every layer", captions.of_heads(who), figure, **options)


def _intermediates(
    image: _Image, tokens: np.ndarray, grid: tuple[int, int], output: Output, shown: bool
) -> None:
    patches = tokens[:, -grid[0] * grid[1] :].reshape(len(tokens), *grid, -1)
    title = "Patches after every layer: the first three principal components as colors"
    figure = plots.layer_colors(image.pixels, patches, title)
    output.save(f"intermediates_{image.name}", figure, image=np.array(image.file), tokens=tokens)
    if shown:
        options = {"file": image.file, "closed": True}
        output.show("The patches after every layer", captions.of_layers(), figure, **options)
