"""Batches of NumPy arrays from a data set, for one of several processes.

Training is addressed by one number, the global position g = step * batch_size + row: its epoch is
g // n and its place in the epoch g % n. The order of an epoch is a pure function of (seed, epoch),
the augmentation of an image one of (seed, g). So the step is the whole state of the input, any
step is reached without reading what came before, and neither the order nor the augmentation
depends on the number of processes, threads or workers. See `order` for the orders that there are.
"""

import atexit
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
import types
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
from absl import flags, logging

from vit_jax.data.box_views import eval_boxes, train_boxes
from vit_jax.data.images import read_image
from vit_jax.data.order import Order, Shuffled, augmentation_rng
from vit_jax.data.preprocess import eval_pair, eval_view, train_pair, train_view
from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.data.source import Example, Source
from vit_jax.errors import UserError
from vit_jax.image_size import ImageSize

Batch = dict[str, np.ndarray]

# The number of this order and augmentation. A run goes on only with that with which it began.
INPUT_VERSION = 2

_CHUNK = 8  # images that a thread makes in one go, at most: what Grain takes for each is spread


def check_channels(source: Source, channels: int) -> None:
    """Checks the first image of a source, which else is read when all is compiled.

    Args:
        source: of at least one image.
        channels: that an image must have; any can be made one of 3.

    Raises:
        UserError: it has others, or cannot be read.
    """
    if channels != 3:
        example = source[0]
        read_image(example["id"], example["image"], channels=channels)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: ImageSize,
    channels: int = 3,
    protocol: str,
    random_crop: bool,
    random_flip: bool,
    seed: int,
    order: Order | None = None,
    jpeg_dct: str = "accurate",
    num_operations: int = 0,
    magnitude: float = 0,
    contrast: str = "augreg",
    most_boxes: int = 0,
    first_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Returns this process' rows of batches `first_step`, `first_step` + 1 and so on, endlessly.

    Batches run on across the ends of epochs; no image is dropped.

    Args:
        source: what to read.
        batch_size: of the global batch. Process p owns the p-th of `process_count` equal runs of
            its rows, and reads no others.
        image_size: of them.
        channels: of an image.
        protocol: one of `protocols.PROTOCOLS`.
        random_crop: crop as the protocol does in training, not as in evaluation.
        random_flip: mirror every other image.
        seed: of the order and the augmentation.
        order: of the images, from `order.create_order`; None takes every image once an epoch.
        jpeg_dct: one of `protocols.JPEG_DCTS`.
        num_operations: of RandAugment for each image; 0 for none.
        magnitude: of RandAugment.
        contrast: of RandAugment, one of `augmentation.CONTRASTS`.
        most_boxes: of an image, where the source has boxes: of more the largest are kept.
        first_step: the batch to begin with.
        workers: processes that make the images; 0 for threads of this one.
        process_index: of this process.
        process_count: of all processes.

    Returns:
        Dicts of "image" (uint8 [rows, height, width, channels]) and "label" (int32 [rows], of
        several labels an image float32 [rows, classes], of masks uint8 [rows, height, width], of
        boxes float32 [rows, most_boxes, 5], see `boxes.in_rows`), rows = batch_size /
        process_count.

    Raises:
        UserError: if `batch_size` cannot be divided or `protocol` is unknown, or RandAugment is
            asked for where there are masks; while iterating, if an image or mask is broken, with
            the image's name.
    """
    rows = _rows_per_process(batch_size, process_count)
    evaluation(protocol, image_size, jpeg_dct, channels)  # Checks all.
    if num_operations and (source.has_masks or source.has_boxes):
        what = "masks, whose pixels" if source.has_masks else "boxes, which"
        raise UserError(
            f"{source.name} has {what} RandAugment would not move with those of the image: leave "
            "randaugment out of config.augment"
        )
    geometry = {
        "image_size": image_size,
        "channels": channels,
        "protocol": protocol,
        "jpeg_dct": jpeg_dct,
        "random_crop": random_crop,
        "random_flip": random_flip,
        "turn": source.turn,
    }
    colors = {"num_operations": num_operations, "magnitude": magnitude, "contrast": contrast}
    if source.has_boxes:
        with_label = functools.partial(train_boxes, most_boxes=most_boxes, **geometry)
    else:
        with_label = functools.partial(train_pair, num_classes=len(source.class_names), **geometry)
    view = _View(functools.partial(train_view, **geometry, **colors), with_label, source)
    first_row = first_step * batch_size + process_index * rows
    positions = _Positions(first_row, rows, batch_size)
    order = order or Shuffled(seed, source.num_examples)
    return _batches(_TrainImages(source, seed, order, positions, view), rows, workers)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """This process' rows of every evaluation batch; can be iterated over again and again."""

    num_batches: int
    _images: "_EvalImages" = dataclasses.field(repr=False)
    _rows: int

    def __len__(self) -> int:
        """Returns the number of batches, the same on every process."""
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches padded to full size, with a "mask" that is 0 on the padding."""
        batches = _batches(self._images, self._rows)
        for _ in range(self.num_batches):
            batch = next(batches, None) or self._images.nothing()
            batch["mask"] = np.ones(len(batch["label"]), np.float32)
            yield {key: _pad(value, self._rows) for key, value in batch.items()}


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    preprocessing: Preprocessing,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Returns this process' rows of all ceil(num_examples / batch_size) batches of `source`.

    Over all processes every image comes exactly once. The batches are those of `train_batches`
    without randomness, but "image" is float32 and normalized as the model wants it, a label may be
    [classes], and of a source of boxes it is the size of the image, see `box_views.eval_boxes`;
    with "mask" (float32 [rows]): 1 for an image, 0 for padding.

    Args:
        source: what to read.
        batch_size: of the global batch, rows divided as in `train_batches`.
        preprocessing: of the model.
        process_index: of this process.
        process_count: of all processes.

    Raises:
        UserError: if `batch_size` cannot be divided; while iterating, if an image is broken, with
            its name.
    """
    rows = _rows_per_process(batch_size, process_count)
    positions = _Positions(process_index * rows, rows, batch_size)
    num_batches = -(-source.num_examples // batch_size)
    return EvalBatches(num_batches, _EvalImages(source, positions, preprocessing), rows)


def _rows_per_process(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} is not a positive multiple of the {process_count} processes"
        )
    return batch_size // process_count


@dataclasses.dataclass(frozen=True)
class _Positions:
    """The global positions of a process' rows: `rows` from `first` on in every `batch_size`."""

    first: int
    rows: int
    batch_size: int

    def __getitem__(self, index: int) -> int:
        step, row = divmod(index, self.rows)
        return self.first + step * self.batch_size + row

    def count(self, end: int) -> int:
        """Returns how many of them lie below `end`."""
        steps, rest = divmod(max(end - self.first, 0), self.batch_size)
        return steps * self.rows + min(rest, self.rows)


class _TrainImages:
    """The endless row of images that a process trains on."""

    def __init__(
        self,
        source: Source,
        seed: int,
        order: Order,
        positions: _Positions,
        view: "_View",
    ):
        self._source = source
        self._seed = seed
        self._order = order
        self._positions = positions
        self.label_dtype = _label_dtype(source)
        self._view = view

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        position = self._positions[index]
        example = self._source[self._order[position]]
        return self._view(example, augmentation_rng(self._seed, position))


class _View:
    """From an example, and what a view depends on beside it, to the view and the label.

    Args:
        of_image: the view of an image.
        with_label: the views of an image and its mask or boxes.
        source: of the examples, whose labels may be either.
    """

    def __init__(
        self,
        of_image: Callable[..., np.ndarray],
        with_label: Callable[..., tuple[np.ndarray, np.ndarray]],
        source: Source,
    ):
        self._of_image = of_image
        self._with_label = with_label
        self._is_viewed = source.has_masks or source.has_boxes

    def __call__(self, example: Example, drawn: Any) -> tuple[np.ndarray, Any]:
        try:
            if not self._is_viewed:
                return self._of_image(example["image"], drawn), example["label"]
            return self._with_label(example["image"], example["label"], drawn)
        except UserError as error:
            fault = str(error)
            colon = ":" if fault.startswith("the mask ") else ""
            fault = fault.removeprefix("the image ")
            raise UserError(f"image {example['id']}{colon} {fault}") from error


def _label_dtype(source: Source) -> type:
    """Shares of classes are floats, which mixup and smoothing make other shares of."""
    if source.has_masks:
        return np.uint8
    return np.float32 if source.multi_label or source.has_boxes else np.int32


@dataclasses.dataclass(frozen=True)
class _EvalImages:
    """A process' images of a source, in its order."""

    source: Source
    positions: _Positions
    preprocessing: Preprocessing

    @property
    def label_dtype(self) -> type:
        return _label_dtype(self.source)

    def __len__(self) -> int:
        return self.positions.count(self.source.num_examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        source = self.source
        if source.has_boxes:
            with_label = functools.partial(eval_boxes, turn=source.turn)
        else:
            with_label = functools.partial(
                eval_pair, turn=source.turn, num_classes=len(source.class_names)
            )
        of_image = functools.partial(eval_view, border=source.border, turn=source.turn)
        view = _View(of_image, with_label, source)
        return view(source[self.positions[index]], self.preprocessing)

    def nothing(self) -> Batch:
        """A batch of no image."""
        shape = self.preprocessing.image_shape
        if self.source.has_boxes:
            label_shape = (2,)
        else:
            label_shape = shape[:2] if self.source.has_masks else np.shape(self.source[0]["label"])
        return {
            "image": np.zeros((0, *shape), np.float32),
            "label": np.zeros((0, *label_shape), self.label_dtype),
        }


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    if len(array) == rows:
        return array
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Images in equal runs of `size`, as arrays; the last may be shorter.

    Of a run with a broken image it is the error: what is raised Grain lengthens by a paragraph.
    """

    images: Any
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, index: int) -> Batch | UserError:
        begin = index * self.size
        end = min(begin + self.size, len(self.images))
        try:
            images, labels = zip(*(self.images[i] for i in range(begin, end)), strict=True)
        except UserError as error:
            return error
        return {"image": np.stack(images), "label": np.array(labels, self.images.label_dtype)}


def _batches(images: Any, rows: int, workers: int = 0) -> Generator[Batch]:
    """Joins images to batches of `rows`, the last one shorter, made ahead by threads or workers."""
    batches = _generate(images, rows, workers)
    _open.add(batches)
    return batches


# What a traceback, or a module, still holds at the end of the program is closed while it can be.
_open: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()


@atexit.register
def _close() -> None:
    for batches in list(_open):
        batches.close()


def _generate(images: Any, rows: int, workers: int) -> Generator[Batch]:
    grain = _import_grain()
    threads = _num_threads()
    chunk = math.gcd(rows, _CHUNK)
    # A batch ahead, so that it is there when the one before has been computed.
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(rows // chunk, 2 * threads)
    )
    chunks = grain.MapDataset.source(_Chunks(images, chunk)).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks for some; there are none without a command.
            flags.FLAGS.mark_as_parsed()
        chunks = chunks.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_end_with_parent
        )
    iterator = iter(chunks)
    try:
        while batch := _join(iterator, rows // chunk):
            yield batch
    finally:
        iterator.close()


def _import_grain() -> types.ModuleType:
    """Imports Grain, which takes a second, without its word on a JAX older than it likes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        import grain
    finally:
        logging.set_verbosity(verbosity)
    return grain


def _join(iterator: Iterator[Batch | UserError], count: int) -> Batch | None:
    """Joins the next chunks; none of them, which may be shared memory, is kept."""
    chunks = []
    for _, chunk in zip(range(count), iterator, strict=False):
        if isinstance(chunk, UserError):
            raise chunk
        chunks.append(chunk)
    return {key: np.concatenate([x[key] for x in chunks]) for key in chunks[0]} if chunks else None


def _end_with_parent(worker: int, count: int) -> None:
    """Ends this worker when the process that started it is gone, killed for example.

    Ctrl-C, which a terminal sends to all, is for that process.
    """
    del worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _num_threads() -> int:
    if hasattr(os, "sched_getaffinity"):  # Not on macOS.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
