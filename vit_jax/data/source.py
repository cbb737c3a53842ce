"""A data set as the rest of the program knows it: a split of encoded, labeled images."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

# TensorFlow only reads images here; it would otherwise take the accelerator's memory from JAX.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

ReadExamples = Callable[..., tf.data.Dataset]


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
        name: of the data set, as it was asked for.
        split: in TFDS syntax, such as "train[:98%]".
        class_names: by label.
        num_examples: in the split.
        num_bytes: of all encoded images, about; 0 if unknown.
        examples: `examples(seed=None)` reads the split once as {"image": scalar string, encoded;
            "label": int64, of `open_real` int64 [classes]; "id": scalar string, names the example;
            of a folder also "tensorflow_reads": bool, see `headers.tensorflow_reads`}.
            The order is fixed; with an int64 scalar `seed`, which may be a tensor, it is another
            one (TFDS: of whole files) and a pure function of the seed.
        border: pixels of every side of an image that evaluation cuts off.
        ids: the ids of all examples, without reading any; None if only reading finds them.
        select: `select(chosen)`, of a bool for each of `ids`, returns `examples` of the chosen ones
            that does not read the others; None if none can be had without those before it.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    num_examples: int
    num_bytes: int
    examples: ReadExamples = dataclasses.field(repr=False)
    border: int = 0
    ids: Callable[[], list[str]] | None = dataclasses.field(default=None, repr=False)
    select: Callable[[np.ndarray], ReadExamples] | None = dataclasses.field(
        default=None, repr=False
    )


def relabel(source: Source, labels: Sequence[int], class_names: Sequence[str]) -> Source:
    """Returns a source with other labels.

    Args:
        source: whose examples have a label, or one for every class as of `open_real`.
        labels: the new one of each class of `source`; of an example without (-1) it stays.
        class_names: by new label.
    """
    table = tf.constant(labels, tf.int64)

    def new_label(label: tf.Tensor) -> tf.Tensor:
        if label.shape.rank:
            return tf.scatter_nd(tf.expand_dims(table, 1), label, [len(class_names)])
        return tf.where(tf.less(label, 0), label, tf.gather(table, tf.maximum(label, 0)))

    def relabeled(examples: ReadExamples) -> ReadExamples:
        return lambda seed=None: examples(seed).map(lambda x: x | {"label": new_label(x["label"])})

    select = source.select
    return dataclasses.replace(
        source,
        class_names=tuple(class_names),
        examples=relabeled(source.examples),
        select=select and (lambda chosen: relabeled(select(chosen))),
    )
