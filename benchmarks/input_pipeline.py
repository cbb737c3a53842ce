"""Batches for training from photographs: ours beside what one would use instead.

    python benchmarks/input_pipeline.py IMAGES_DIR
    python benchmarks/input_pipeline.py IMAGES_DIR --protocol bit --image_size 384

IMAGES_DIR has JPEG files, in folders or not. The peers are the plain published pipeline in tf.data
(google-research/vision_transformer: the whole image is decoded, cropped, resized), and
torchvision's transforms in the worker processes of PyTorch's DataLoader. All read the same files,
at random, on all cores.

Protocol big_vision is that of pre-training, an inception crop; bit that of fine-tuning, a random
crop of the resized image. What they give is random; before anything is timed, labels, shapes and
ranges are checked, and that the mean and the deviation of every channel are alike.

In a turn each begins anew, and is timed from its third batch on. The last line has the ratio of
images/s, ours to the plain pipeline's, above 1 where ours is faster: a median over the rounds.
"""

import argparse
import contextlib
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

with contextlib.suppress(ImportError):
    # PyTorch imports it, which ends the process where TensorFlow has been loaded before.
    import triton  # noqa: F401

import numpy as np
import paired
from paired import Unavailable

Batch = tuple[np.ndarray, np.ndarray]
OURS, PLAIN, TORCHVISION = "ours", "plain tf.data", "torchvision, DataLoader"
PROTOCOLS = ("big_vision", "bit")
BIT_RESIZE = 448 / 384
TOLERANCE = 4  # standard errors, by which what is drawn may differ
SKIPPED = 2


class Workload(NamedTuple):
    """What is read, and how.

    Attributes:
        folder: has train/CLASS/FILE.
        protocol: one of `PROTOCOLS`.
        image_size: in pixels.
        batch: images in a batch.
    """

    folder: Path
    protocol: str
    image_size: int
    batch: int

    @property
    def resized(self) -> int:
        """The side that an image is resized to before a random crop under bit."""
        return math.floor(BIT_RESIZE * self.image_size)

    @property
    def files(self) -> list[Path]:
        """All images."""
        return sorted(self.folder.glob("train/*/*"))


def link_images(images: Path, folder: Path) -> None:
    """Makes a folder of classes of the JPEG files anywhere below `images`.

    Raises:
        Unavailable: there are none.
    """
    files = [x for x in sorted(images.rglob("*")) if x.suffix.lower() in (".jpg", ".jpeg")]
    if not files:
        raise Unavailable(f"{images} has no .jpg files")
    for split, chosen in (("train", files), ("test", files[:2])):
        for i, file in enumerate(chosen):
            place = folder / split / f"class{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:06}.jpg").symlink_to(file.resolve())


def ours(load: Workload) -> Callable[[int], Iterator[Batch]]:
    """`vit_jax.data.pipeline.train_batches`."""
    from vit_jax.data.datasets import open_dataset
    from vit_jax.data.pipeline import train_batches

    source, _ = open_dataset(f"folder:{load.folder}")

    def begin(turn: int) -> Iterator[Batch]:
        batches = train_batches(
            source,
            batch_size=load.batch,
            image_size=load.image_size,
            protocol=load.protocol,
            random_crop=True,
            random_flip=True,
            seed=turn,
        )
        return ((x["image"], x["label"]) for x in batches)

    return begin


def plain(load: Workload) -> Callable[[int], Iterator[Batch]]:
    """The published pipeline."""
    import tensorflow as tf

    names = [str(path) for path in load.files]
    labels = [int(path.parent.name[-1]) for path in load.files]
    size = [load.image_size, load.image_size]

    def decode(name: Any, label: Any) -> Any:
        image = tf.io.decode_jpeg(tf.io.read_file(name), channels=3)
        if load.protocol == "bit":
            image = tf.image.resize(image, [load.resized, load.resized])
            image = tf.image.random_crop(image, [*size, 3])
        else:
            begin, extent, _ = tf.image.sample_distorted_bounding_box(
                tf.shape(image),
                tf.zeros([0, 0, 4], tf.float32),
                area_range=(0.05, 1.0),
                min_object_covered=0,
                use_image_if_no_bounding_boxes=True,
            )
            image = tf.slice(image, begin, extent)
            image.set_shape([None, None, 3])
            image = tf.image.resize(image, size)
        image = tf.image.random_flip_left_right(image)
        return (image - 127.5) / 127.5, label

    def begin(turn: int) -> Iterator[Batch]:
        dataset = tf.data.Dataset.from_tensor_slices((names, labels))
        dataset = dataset.repeat().shuffle(len(names), seed=turn)
        dataset = dataset.map(decode, tf.data.AUTOTUNE).batch(load.batch, drop_remainder=True)
        options = tf.data.Options()
        options.threading.private_threadpool_size = os.cpu_count() or 1
        dataset = dataset.prefetch(tf.data.AUTOTUNE).with_options(options)
        return dataset.as_numpy_iterator()

    return begin


def torchvision(load: Workload) -> Callable[[int], Iterator[Batch]]:
    """Its transforms, in as many processes as there are cores."""
    import multiprocessing

    import torch
    from torchvision import datasets, transforms

    crops = {
        "big_vision": [transforms.RandomResizedCrop(load.image_size, scale=(0.05, 1.0))],
        "bit": [
            transforms.Resize((load.resized, load.resized)),
            transforms.RandomCrop(load.image_size),
        ],
    }
    steps = [
        *crops[load.protocol],
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    dataset = datasets.ImageFolder(str(load.folder / "train"), transforms.Compose(steps))
    # A fork of a process with other libraries' threads may hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.datasets", "torchvision.transforms"])

    def begin(turn: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(turn)
        loader = torch.utils.data.DataLoader(
            dataset,
            load.batch,
            sampler=torch.utils.data.RandomSampler(
                dataset, replacement=True, num_samples=10**9, generator=generator
            ),
            num_workers=os.cpu_count() or 1,
            multiprocessing_context=context,
        )
        return ((images.permute(0, 2, 3, 1).numpy(), x.numpy()) for images, x in loader)

    return begin


PIPELINES: dict[str, Callable[[Workload], Callable[[int], Iterator[Batch]]]] = {
    OURS: ours,
    PLAIN: plain,
    TORCHVISION: torchvision,
}


class Statistics(NamedTuple):
    """What is compared of pipelines, of pixels in [-1, 1].

    Attributes:
        values: the mean and the mean square of each channel, [2, 3].
        errors: their standard errors, from how images differ.
    """

    values: np.ndarray
    errors: np.ndarray


def check(name: str, load: Workload, batches: Iterator[Batch], count: int) -> Statistics:
    """Checks that many batches, and returns what is to be alike.

    Raises:
        AssertionError: a batch is not what is to be made.
    """
    everything = []
    for images, labels in itertools.islice(batches, count):
        shape = (load.batch, load.image_size, load.image_size, 3)
        assert images.shape == shape, f"{name}: images of shape {images.shape}, not {shape}"
        assert {*np.unique(labels)} <= {0, 1}, f"{name}: labels {np.unique(labels)}"
        if images.dtype == np.uint8:
            images = images / np.float32(127.5) - 1
        assert np.abs(images).max() <= 1 + 1e-5, f"{name}: pixels beyond -1 and 1"
        everything.append(images)
    pixels = np.concatenate(everything)
    of_images = np.stack([(pixels**power).mean(axis=(1, 2)) for power in (1, 2)])
    return Statistics(of_images.mean(axis=1), of_images.std(axis=1) / len(pixels) ** 0.5)


def check_alike(name: str, found: Statistics, expected: Statistics) -> None:
    """Raises AssertionError if two pipelines differ by more than chance."""
    off = np.abs(found.values - expected.values) / np.hypot(found.errors, expected.errors)
    for what, errors in zip(("mean", "mean square"), off, strict=True):
        assert errors.max() <= TOLERANCE, (
            f"{name}: the {what} of a channel is off by {errors.max():.1f} standard errors"
        )


def build(load: Workload, names: list[str], count: int) -> dict[str, Callable]:
    """Ours and those that can take part, by name, each checked on that many batches."""
    pipelines: dict[str, Callable] = {}
    expected: Statistics | None = None
    for name in (OURS, *names):
        try:
            begin = PIPELINES[name](load)
        except ImportError as error:
            if name == OURS:
                raise
            print(f"{name} cannot take part: {error}", flush=True)
            continue
        found = check(name, load, begin(0), count)
        expected = expected or found
        check_alike(name, found, expected)
        mean, square = found.values.round(2)
        print(f"{name}: mean {mean}, mean square {square}", flush=True)
        pipelines[name] = begin
    return pipelines


def time_turn(begin: Callable[[int], Iterator[Batch]], count: int, turn: int) -> float:
    """Seconds of a batch, of that many after the first `SKIPPED`, of a pipeline that begins."""
    batches = begin(turn)
    for _ in range(SKIPPED):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - start
    if close := getattr(batches, "close", None):  # Its threads or processes stop.
        close()
    return seconds / count


def main(argv: list[str] | None = None) -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images_dir", type=Path)
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=16, help="of a turn")
    peers = [PLAIN, TORCHVISION]
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers, metavar="PEER")
    paired.add_arguments(parser, rounds=9)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        load = Workload(Path(temporary), args.protocol, args.image_size, args.batch)
        try:
            link_images(args.images_dir, load.folder)
        except Unavailable as error:
            parser.error(str(error))
        pipelines = build(load, args.peers, args.batches)
        times: dict[str, list[float]] = {name: [] for name in pipelines}
        start = time.perf_counter()
        for turn in range(args.rounds):
            if turn >= paired.FEWEST_ROUNDS and time.perf_counter() - start > args.seconds:
                break
            for name in itertools.islice(itertools.cycle(pipelines), turn, turn + len(pipelines)):
                times[name].append(time_turn(pipelines[name], args.batches, turn))
        print_report(load, times, args.output)


def print_report(load: Workload, times: dict[str, list[float]], output: str | None) -> None:
    """Prints a table, and the ratio as the last line."""
    found, rows = {}, []
    for name, taken in times.items():
        ratio = paired.ratio(taken, times[OURS])
        batch = paired.summary(taken)
        rates = [load.batch / seconds for seconds in (batch.upper, batch.median, batch.lower)]
        found[name] = {
            "images_per_second": rates[1],
            "ours_to_it": ratio._asdict(),
            "seconds_of_a_batch": taken,
        }
        cells = [f"{rates[1]:.0f}", f"{rates[0]:.0f} to {rates[2]:.0f}"]
        rows.append([name, *cells, f"{ratio.median:.2f} ({ratio.lower:.2f} to {ratio.upper:.2f})"])
    info = paired.report(
        benchmark="input_pipeline",
        images=len(load.files),
        protocol=load.protocol,
        image_size=load.image_size,
        batch=load.batch,
        candidates=found,
    )
    print(f"\n{len(load.files)} photographs, {load.protocol}, {load.image_size} px, {info['date']}")
    print(paired.markdown(["", "images/s", "quartiles", "ours / it"], rows))
    paired.write(output, info)
    plain = f"{found[PLAIN]['ours_to_it']['median']:.2f}" if PLAIN in found else "not measured"
    print(f"ours/plain {plain}")


if __name__ == "__main__":
    sys.exit(main())
