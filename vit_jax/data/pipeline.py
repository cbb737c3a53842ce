"""Batches of NumPy arrays from a data set, for one of several processes.

Training is addressed by one number, the global position g = step * batch_size: its epoch is
g // n and its place in the epoch g % n. The order of an epoch is a pure function of (seed, epoch),
the augmentation of an image one of (seed, g). So the step is the whole state of the input, and
neither the order nor the augmentation depends on the number of processes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from vit_jax.data.images import read_image
from vit_jax.data.preprocess import eval_view, train_view
from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.data.source import Source
from vit_jax.errors import UserError

Example = dict[str, Any]  # of a `Source`, or decoded
Decode = Callable[[tf.Tensor, Example], Example]  # of a position in the run, and an example

_CACHE_LIMIT = 2 * 2**30  # bytes of encoded images that cache="auto" keeps in memory


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    protocol: str,
    random_crop: bool,
    random_flip: bool,
    seed: int,
    shuffle_buffer: int,
    jpeg_dct: str = "accurate",
    num_operations: int = 0,
    magnitude: float = 0,
    contrast: str = "augreg",
    first_step: int = 0,
    cache: str = "auto",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns this process' rows of batches `first_step`, `first_step` + 1 and so on, endlessly.

    Batches run on across the ends of epochs; no image is dropped.

    Args:
        source: what to read.
        batch_size: of the global batch. Process p owns the p-th of `process_count` equal runs of
            its rows.
        image_size: in pixels.
        protocol: one of `protocols.PROTOCOLS`.
        random_crop: crop as the protocol does in training, not as in evaluation.
        random_flip: mirror every other image.
        seed: of the order and the augmentation.
        shuffle_buffer: encoded images to shuffle among when they are streamed. Files are shuffled
            too. What is in memory is shuffled as a whole.
        jpeg_dct: one of `protocols.JPEG_DCTS`.
        num_operations: of RandAugment for each image; 0 for none.
        magnitude: of RandAugment.
        contrast: of RandAugment, one of `augmentation.CONTRASTS`.
        first_step: the batch to begin with. What comes before is skipped without decoding.
        cache: where the encoded images are read from again: "memory", "disk", or "auto", memory
            below 2 GiB. The two have different orders.
        process_index: of this process.
        process_count: of all processes.

    Returns:
        Dicts of "image" (float32 [rows, image_size, image_size, 3] in [-1, 1]) and "label"
        (int32 [rows]), rows = batch_size / process_count.

    Raises:
        UserError: if `batch_size` cannot be divided or `protocol` is unknown; while iterating, if
            an image is broken, with its name.
    """
    rows = _rows_per_process(batch_size, process_count)
    evaluation(protocol, image_size, jpeg_dct)  # Checks all three.
    if cache not in ("auto", "memory", "disk"):
        raise UserError(f"cache {cache!r} is unknown: use auto, memory or disk")
    in_memory = cache == "memory" or (cache == "auto" and source.num_bytes < _CACHE_LIMIT)
    epoch_of, lookup = (
        _in_memory(source, seed) if in_memory else _streamed(source, seed, shuffle_buffer)
    )
    elements = _epochs(epoch_of, source.num_examples, start=first_step * batch_size)
    numbered = _own_rows(elements, batch_size, rows, process_index).map(
        lambda position, element: (position, lookup(element))
    )

    def decode(position: tf.Tensor, example: Example) -> Example:
        image = train_view(
            example["image"],
            tf.stack([tf.constant(seed, tf.int64), position]),
            image_size=image_size,
            protocol=protocol,
            jpeg_dct=jpeg_dct,
            random_crop=random_crop,
            random_flip=random_flip,
            num_operations=num_operations,
            magnitude=magnitude,
            contrast=contrast,
            decode_with_pil=_needs_pil(example),
        )
        return {"image": image, "label": tf.cast(example["label"], tf.int32)}

    return _decoded_batches(numbered, decode, rows)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """This process' rows of every evaluation batch; can be iterated over again and again."""

    num_batches: int
    _numbered: tf.data.Dataset = dataclasses.field(repr=False)
    _decode: Decode = dataclasses.field(repr=False)
    _rows: int
    _image_size: int

    def __len__(self) -> int:
        """Returns the number of batches, the same on every process."""
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields batches padded to full size, with a "mask" that is 0 on the padding."""
        batches = _decoded_batches(self._numbered, self._decode, self._rows)
        size = self._image_size
        label_shape = self._numbered.element_spec[1]["label"].shape
        nothing: dict[str, np.ndarray] = {
            "image": np.zeros((0, size, size, 3), np.float32),
            "label": np.zeros((0, *label_shape), np.int32),
        }
        for _ in range(self.num_batches):
            batch = next(batches, nothing)
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
    without randomness, with "mask" (float32 [rows]): 1 for an image, 0 for padding.

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

    def decode(position: tf.Tensor, example: Example) -> Example:
        del position
        image = eval_view(
            example["image"],
            preprocessing,
            border=source.border,
            decode_with_pil=_needs_pil(example),
        )
        return {"image": image, "label": tf.cast(example["label"], tf.int32)}

    numbered = _own_rows(source.examples().enumerate(), batch_size, rows, process_index)
    num_batches = -(-source.num_examples // batch_size)
    return EvalBatches(num_batches, numbered, decode, rows, preprocessing.image_size)


def _needs_pil(example: Example) -> tf.Tensor | bool:
    return ~example["tensorflow_reads"] if "tensorflow_reads" in example else False


def _rows_per_process(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} is not a positive multiple of the {process_count} processes"
        )
    return batch_size // process_count


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    if len(array) == rows:
        return array
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def _in_memory(source: Source, seed: int) -> tuple[Callable, Callable]:
    # An element of an epoch is an index, so that skipping costs next to nothing.
    with _unreadable_files():
        everything = source.examples().batch(source.num_examples).get_single_element()

    def epoch_of(epoch):
        order = tf.range(source.num_examples)
        order = tf.random.experimental.stateless_shuffle(order, tf.stack([seed, epoch]))
        return tf.data.Dataset.from_tensor_slices(order)

    def lookup(index):
        return {key: tf.gather(value, index) for key, value in everything.items()}

    return epoch_of, lookup


def _streamed(source: Source, seed: int, shuffle_buffer: int) -> tuple[Callable, Callable]:
    def epoch_of(epoch):
        epoch_seed = tf.random.stateless_uniform(
            [], tf.stack([seed, epoch]), minval=None, maxval=None, dtype=tf.int64
        )
        return source.examples(epoch_seed).shuffle(
            shuffle_buffer, epoch_seed, reshuffle_each_iteration=False
        )

    return epoch_of, lambda example: example


def _epochs(
    epoch_of: Callable[[tf.Tensor], tf.data.Dataset], num_examples: int, start: int
) -> tf.data.Dataset:
    """All epochs one after the other from position `start` on, which numbers the elements."""
    return (
        tf.data.Dataset.range(start // num_examples, tf.int64.max)
        .flat_map(tf.autograph.experimental.do_not_convert(epoch_of))
        .skip(start % num_examples)
        .enumerate(start)
    )


def _own_rows(
    numbered: tf.data.Dataset, batch_size: int, rows: int, process_index: int
) -> tf.data.Dataset:
    return numbered.filter(lambda position, _: position % batch_size // rows == process_index)


def _decoded_batches(
    numbered: tf.data.Dataset, decode: Decode, rows: int
) -> Iterator[dict[str, np.ndarray]]:
    dataset = numbered.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    batches = dataset.batch(rows).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    done = 0
    while True:
        try:
            with _unreadable_files():
                batch = next(batches)
        except StopIteration:
            return
        except tf.errors.InvalidArgumentError:
            _name_broken_image(numbered.skip(done * rows).take(rows), decode)
            raise
        yield batch
        done += 1


@contextlib.contextmanager
def _unreadable_files() -> Generator[None]:
    try:
        yield
    except (
        tf.errors.DataLossError,
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
    ) as error:
        raise UserError(
            f"the data cannot be read: {error.message.splitlines()[0]}; restore the file or "
            "prepare the data set again"
        ) from error


def _name_broken_image(numbered: tf.data.Dataset, decode: Decode) -> None:
    for position, example in numbered:
        try:
            decode(position, example)
        except (tf.errors.InvalidArgumentError, UserError) as error:  # TensorFlow's or PIL's
            name = example["id"].numpy().decode()
            if not example.get("tensorflow_reads", True):
                read_image(name, example["image"].numpy())  # says what is wrong
            raise UserError(
                f"image {name} cannot be decoded: it is cut off or damaged; replace or remove it"
            ) from error
