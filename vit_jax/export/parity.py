"""The difference of an exported model from Flax in float32, and its speed. Imports no JAX."""

import dataclasses
import functools
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export.precisions import PRECISIONS, thresholds
from vit_jax.files import atomic_write, write_json
from vit_jax.image_size import of_sides, sides
from vit_jax.pixel_classes import IGNORED
from vit_jax.printable import table_cell

Predict = Callable[[np.ndarray], np.ndarray]


class RawImages:
    """Images of any size, which are decoded where they are asked for."""

    def __init__(self, read: Sequence[Callable[[], np.ndarray]]):
        """Takes what decodes each, uint8 [height, width, channels]."""
        self._read = list(read)

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._read[index]()

    def chosen(self, mask: np.ndarray) -> "RawImages":
        """The images of which a bool [n] is true."""
        return RawImages([read for read, is_one in zip(self._read, mask, strict=True) if is_one])


_ENOUGH = 200  # photographs, for the first class to tell something
SYNTHETIC = "synthetic"
# Of synthetic raw images, the heights and widths by those of the model.
_RAW_SIZES = ((1, 1), (1.4, 2.1), (2.3, 1.2), (0.6, 0.7), (3.1, 4.2))
_PERCENTILES = (50, 90, 99)
# Bytes of outputs: of a call, or kept in a file; and of all images that are compared.
_OF_A_CALL, _OF_ALL = 2**28, 2**30
_REFERENCE, _REPORT = "parity_reference.npz", "parity.json"
_STAGES = "hops"  # The key that parity.json has always had for the stages.


@dataclasses.dataclass(frozen=True)
class Reference:
    """The outputs of Flax for some images in float32.

    Attributes:
        images: [n, height, width, channels], of the type of the model's input, or raw ones.
        outputs: float32 [n, ...].
        labels: [n], the true classes, [n, height, width] of pixels, or None.
        data: where the images are from.
    """

    images: np.ndarray | RawImages
    outputs: np.ndarray
    labels: np.ndarray | None
    data: str


def read_images(
    directory: str, preprocessing: Preprocessing, class_names: Sequence[str] | None, number: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads images from the files below a directory, evenly spread over them.

    Args:
        directory: searched recursively.
        preprocessing: of the model.
        class_names: of the model. Where every image's directory has the name of one of them, or
            its WordNet id, it is the image's label.
        number: how many images to read, at most.

    Returns:
        float32 [n, height, width, channels], and labels [n] or None.

    Raises:
        UserError: there are no images, or one is damaged.
    """
    raw, labels = raw_files(directory, preprocessing, class_names, number)
    return prepared(raw, preprocessing), labels


def prepared(raw: RawImages, preprocessing: Preprocessing) -> np.ndarray:
    """The view of raw images that evaluation has, float32 [n, height, width, channels].

    Raises:
        UserError: an image is damaged.
    """
    from vit_jax.data.images import preprocess

    return np.stack([preprocess(raw[i], preprocessing) for i in range(len(raw))])


def raw_files(
    directory: str, preprocessing: Preprocessing, class_names: Sequence[str] | None, number: int
) -> tuple[RawImages, np.ndarray | None]:
    """The images of `read_images` before they are prepared, and their labels [n] or None."""
    from vit_jax.data.image_files import find_images
    from vit_jax.data.imagenet import comparable
    from vit_jax.data.images import read_image

    files = find_images([directory], preprocessing.channels)
    files = (
        [files[i * len(files) // number] for i in range(number)] if len(files) > number else files
    )
    dct, channels = preprocessing.jpeg_dct, preprocessing.channels
    raw = RawImages(
        [functools.partial(read_image, x, jpeg_dct=dct, channels=channels) for x in files]
    )
    indices = {comparable(name): i for i, name in enumerate(class_names or ())}
    labels = [indices.get(comparable(os.path.basename(os.path.dirname(file)))) for file in files]
    return raw, None if None in labels else np.array(labels)


def read_dataset(
    source: Any, preprocessing: Preprocessing, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads images of a `vit_jax.data.datasets.Source`, evenly spread over it.

    Returns:
        float32 [n, height, width, channels] and labels [n], of masks [n, height, width]; n is
        `number` at most.

    Raises:
        UserError: an image is damaged.
    """
    from vit_jax.data.pipeline import eval_batches

    chosen = _spread(source, number)
    size = chosen.num_examples
    (batch,) = eval_batches(chosen, batch_size=size, preprocessing=preprocessing)
    return batch["image"], batch["label"]


def raw_dataset(
    source: Any, preprocessing: Preprocessing, number: int
) -> tuple[RawImages, np.ndarray | None]:
    """The images of `read_dataset` before they are prepared, and labels [n]; none of masks."""
    from vit_jax.data.images import read_image

    chosen = _spread(source, number)
    dct, channels, border = preprocessing.jpeg_dct, preprocessing.channels, source.border

    def read(index: int) -> np.ndarray:
        encoded = chosen[index]["image"]
        image = read_image("the image", encoded, dct, turn=source.turn, channels=channels)
        return image[border : len(image) - border, border : image.shape[1] - border]

    reading = [functools.partial(read, i) for i in range(chosen.num_examples)]
    return RawImages(reading), None if source.has_masks else chosen.labels()


def _spread(source: Any, number: int) -> Any:
    """Examples of a data set, at most `number`, evenly spread over it."""
    total = source.num_examples
    number = min(number, total)
    return source.select(-(-np.arange(1, number + 1) * total // number) - 1)


def synthetic_images(number: int, preprocessing: Preprocessing) -> np.ndarray:
    """Colored blotches, as smooth as photographs are, the same each time.

    Returns:
        float32 [number, height, width, channels] with the channel statistics of the model.
    """
    generator = np.random.default_rng(0)
    coarse = generator.uniform(size=(number, 8, 8, preprocessing.channels))
    rows, columns = (
        np.maximum(0, 1 - np.abs(np.linspace(0, 7, side)[:, None] - np.arange(8)))  # Linear.
        for side in sides(preprocessing.image_size)
    )
    pixels = np.einsum("yi,xj,nijc->nyxc", rows, columns, coarse)
    return ((pixels - preprocessing.mean) / preprocessing.std).astype(np.float32)


def synthetic_raw(number: int, preprocessing: Preprocessing) -> RawImages:
    """Synthetic images of several sizes, smaller and larger than the model's, odd ones too."""

    def read(index: int) -> np.ndarray:
        factors = _RAW_SIZES[index % len(_RAW_SIZES)]
        image_sides = zip(sides(preprocessing.image_size), factors, strict=True)
        height, width = (max(1, round(side * x)) | 1 for side, x in image_sides)
        at_size = dataclasses.replace(preprocessing, image_size=of_sides(height, width))
        at_size = dataclasses.replace(at_size, center_crop=None)
        return as_pixels(synthetic_images(index + 1, at_size)[index:], at_size)[0]

    return RawImages([functools.partial(read, i) for i in range(number)])


def as_pixels(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The nearest uint8 pixels of normalized images, for models that take these."""
    return np.rint(preprocessing.to_pixels(images) * 255).astype(np.uint8)


def at_a_time(output_bytes: int, most: int = 16) -> int:
    """How many images go through a model together, so that outputs are no more than 256 MiB.

    Args:
        output_bytes: of an image.
        most: of them where outputs are small.
    """
    return max(1, min(most, _OF_A_CALL // output_bytes))


def compared(output_bytes: int, most: int) -> int:
    """How many images are compared, so that the outputs of all are no more than 1 GiB.

    Args:
        output_bytes: of an image.
        most: of them where outputs are small.
    """
    return max(1, min(most, _OF_ALL // output_bytes))


def in_batches(
    predict: Predict, images: np.ndarray | RawImages, batch_size: int = 16
) -> np.ndarray:
    """Runs a model on many images, a few at a time; every call has the same batch size.

    Raw images go one by one: each has a size of its own.
    """
    if isinstance(images, RawImages):
        return np.concatenate([predict(images[i][None]) for i in range(len(images))])
    parts = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        filling = np.repeat(part[-1:], batch_size - len(part), axis=0)
        parts.append(predict(np.concatenate([part, filling]))[: len(part)])
    return np.concatenate(parts)


def compare(reference: Reference, outputs: np.ndarray) -> dict[str, float]:
    """Metrics of the difference between two models on the same images.

    All that is made of an image counts as one vector, also features of its patches; but the first
    class is that along the last axis, so of pixels each has its own.

    Returns:
        `max_difference` and `mean_difference` of the outputs; `relative_difference`, the former by
        the reference's largest output; the smallest `cosine` of an image's outputs;
        `top1_agreement`; and where labels are known `accuracy` and `reference_accuracy`, of pixels
        of those that count.
    """
    pairs = list(zip(reference.outputs, outputs, strict=True))
    # In float64 one image at a time: of the pixels of all there would not be the memory.
    differences, means, cosines, largest = np.transpose([_difference(*pair) for pair in pairs])
    # Of a head of zeros nothing differs, and there is no largest output to divide by.
    same = not differences.any()
    firsts = [(expected.argmax(-1), found.argmax(-1)) for expected, found in pairs]
    row = {
        "max_difference": differences.max(),
        "mean_difference": means.mean(),
        "relative_difference": 0.0 if same else differences.max() / largest.max(),
        "cosine": 1.0 if same else cosines.min(),
        "top1_agreement": np.mean([(expected == found).mean() for expected, found in firsts]),
    }
    if reference.labels is not None:
        counted = reference.labels != IGNORED if reference.labels.ndim > 1 else True
        for name, which in (("accuracy", 1), ("reference_accuracy", 0)):
            right = np.array([first[which] for first in firsts]) == reference.labels
            row[name] = right.mean(where=counted)
    return {name: float(value) for name, value in row.items()}


def _difference(expected: np.ndarray, found: np.ndarray) -> tuple[float, float, float, float]:
    """The largest and the mean difference of an image, the cosine, and the largest output."""
    expected, found = (x.astype(np.float64).ravel() for x in (expected, found))
    difference = np.abs(found - expected)
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    cosine = float(np.dot(found, expected) / (norms or 1))
    return difference.max(), difference.mean(), cosine, np.abs(expected).max()


def failures(row: Mapping[str, float], precision: str, reference: Reference) -> list[str]:
    """Lists what is beyond the thresholds of a precision, one phrase each; none if all is well.

    Args:
        row: from `compare`, and of an emulation also the result of its `range`.
        precision: of the model, a key of `precisions.thresholds`.
        reference: what was compared with; of few or synthetic images the first class says little.
    """
    limits = thresholds()[precision]
    found = []
    # Negated, so that NaN fails.
    if not row["relative_difference"] <= limits["relative_difference"]:
        found.append(
            f"relative difference {row['relative_difference']:.2g} is above "
            f"{limits['relative_difference']:.0e}"
        )
    names = ["cosine"]
    if reference.data != SYNTHETIC and len(reference.images) >= _ENOUGH:
        names.append("top1_agreement")
    for name in names:
        if not row[name] >= limits[name]:
            found.append(f"{name} {row[name]:.5g} is below {limits[name]:g}")
    if found and row.get("overflow_at"):
        kind = PRECISIONS[precision]
        return [
            f"{row['overflow_at']} is beyond {kind.largest}, the largest number of {kind.name}, "
            f"and what comes after it is lost ({found[0]}): use --precision {kind.wider}"
        ]
    return found


def latency(
    predict: Predict, image: np.ndarray, batch_sizes: Sequence[int], seconds: float
) -> list[dict[str, float]]:
    """Times a model, each call from NumPy array to NumPy array.

    Args:
        predict: the model.
        image: one of its images.
        batch_sizes: each is timed on its own, after two calls that are not.
        seconds: how long to time each; at least 5 calls are.

    Returns:
        For each `batch`, the number of `calls`, `p50_ms`, `p90_ms`, `p99_ms` and
        `images_per_second`.
    """
    rows = []
    for batch in batch_sizes:
        images = np.repeat(image[None], batch, axis=0)
        for _ in range(2):
            predict(images)
        times: list[float] = []
        while len(times) < 5 or sum(times) < seconds:
            start = time.perf_counter()
            predict(images)
            times.append(time.perf_counter() - start)
        row = {f"p{p}_ms": 1e3 * float(np.percentile(times, p)) for p in _PERCENTILES}
        speed = batch * len(times) / sum(times)
        rows.append({"batch": batch, "calls": len(times), **row, "images_per_second": speed})
    return rows


def table(stages: Sequence[Mapping[str, Any]]) -> str:
    """The stages as two Markdown tables: the differences, and the times if any were taken.

    Args:
        stages: each has a `name` and what `compare` gives; a `latency` if it was timed; and of an
            emulation its `range` and the name of its `precision`. None: not finite.
    """
    stages = [_with_nans(stage) for stage in stages]
    accuracy = any("accuracy" in stage for stage in stages)
    limits = {PRECISIONS[stage["precision"]].largest for stage in stages if "largest" in stage}
    ranged = bool(limits)
    lines = ["| | max | mean | relative | cosine | top-1 agreement |" + " accuracy |" * accuracy]
    lines[0] += f" largest, of {' or '.join(map(str, limits))} |" * ranged
    lines.append("|-|-|-|-|-|-|" + "-|" * (accuracy + ranged))
    for stage in stages:
        cells = [
            table_cell(stage["name"]),
            *(f"{stage[f'{kind}_difference']:.1e}" for kind in ("max", "mean", "relative")),
            f"{stage['cosine']:.6f}",
            f"{stage['top1_agreement']:.2%}",
        ]
        if accuracy:
            cells.append(f"{stage['accuracy']:.2%} (Flax {stage['reference_accuracy']:.2%})")
        if ranged:
            where = table_cell(stage.get("largest_at", ""))
            cells.append(f"{stage['largest']:.4g} at {where}" if "largest" in stage else "")
        lines.append(f"| {' | '.join(cells)} |")
    if timed := [(stage, row) for stage in stages for row in stage.get("latency", ())]:
        lines += ["", "| | batch | p50 ms | p90 ms | p99 ms | images/s |", "|-|-|-|-|-|-|"]
        for stage, row in timed:
            times = " | ".join(f"{row[f'p{p}_ms']:.2f}" for p in _PERCENTILES)
            speed = f"{row['images_per_second']:.1f}"
            lines.append(f"| {table_cell(stage['name'])} | {row['batch']} | {times} | {speed} |")
    return "\n".join(lines)


def _with_nans(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float("nan") if value is None else value for key, value in stage.items()}


def save_reference(reference: Reference, directory: Path, number: int = 64) -> None:
    """Writes `parity_reference.npz`, with which an engine is checked on another machine.

    There is none of raw images: of a graph that takes these no engine is built. Of large outputs
    there are fewer images.
    """
    if isinstance(reference.images, RawImages):
        (directory / _REFERENCE).unlink(missing_ok=True)
        return
    number = at_a_time(reference.outputs[0].nbytes, number)
    arrays: dict[str, Any] = {
        "images": reference.images[:number],
        "outputs": reference.outputs[:number],
        "data": np.array(reference.data),
    }
    if reference.labels is not None:
        arrays["labels"] = reference.labels[:number]
    with atomic_write(directory / _REFERENCE) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_reference(directory: Path) -> Reference:
    """Reads what `save_reference` wrote.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = directory / _REFERENCE
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = file.get("labels")
            return Reference(file["images"], file["outputs"], labels, str(file["data"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read ({error}): export with --stages onnx into {directory} first"
        ) from error


def load_report(directory: Path) -> list[dict[str, Any]]:
    """The stages in `parity.json`; none where there is no such file, or it is damaged."""
    try:
        return json.loads((directory / _REPORT).read_text())[_STAGES]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def save_report(reference: Reference, stages: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Writes `parity.json`."""
    report = {
        "compared_with": "the Flax model in float32",
        "data": reference.data,
        "thresholds": thresholds(),
        _STAGES: stages,
    }
    write_json(directory / _REPORT, report)
