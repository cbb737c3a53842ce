"""The teacher of a run that distills one: any weights, beside the state and never trained."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.checkpoints.feature_file import fingerprint_params, fingerprint_text
from vit_jax.checkpoints.pretrained import Pretrained, check_exists, load_pretrained
from vit_jax.data import classes
from vit_jax.data.imagenet import comparable
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError, shortlist
from vit_jax.image_size import ImageSize
from vit_jax.models import create_model, family_of
from vit_jax.printable import printable
from vit_jax.sharding import Mesh
from vit_jax.steps import pixels_to_inputs


class Teacher(NamedTuple):
    """A model that is only applied.

    Attributes:
        params: of the model, whole on every device.
        logits: from the parameters and images as `steps.train_step` has them to the logits of the
            classes of the data set, [batch, classes].
        fingerprint: of the weights, whatever their path and format.
    """

    params: Any
    logits: Callable[[Any, jax.Array], jax.Array]
    fingerprint: str


def check_teacher(path: str) -> None:
    """Raises a UserError if a path of weights is neither there nor a published name."""
    with _naming_the_key():
        check_exists(path)


@contextlib.contextmanager
def _naming_the_key() -> Generator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from error


def load_teacher(
    path: str,
    *,
    class_names: Sequence[str],
    image_size: ImageSize,
    channels: int = 3,
    dtype: str,
    kind: str,
    mesh: Mesh,
) -> Teacher:
    """Reads a teacher from any format of weights.

    It sees the images of the student, in its own normalization, and its position embeddings are
    interpolated to their size.

    Args:
        path: see `load_pretrained`.
        class_names: of the data set, in the order of the labels.
        image_size: of the run.
        channels: likewise.
        dtype: of the computation.
        kind: see `distillation.Distillation`.
        mesh: the devices.

    Raises:
        UserError: the weights cannot be read, or their model does not know the classes.
    """
    with _naming_the_key():
        pretrained = load_pretrained(path, image_size=image_size)
        pretrained.check_head()
        if pretrained.preprocessing.channels != channels:
            raise UserError(
                f"{pretrained.source} is for images of {pretrained.preprocessing.channels} "
                f"channels and dataset.channels is {channels}: choose a teacher for the same"
            )
        columns = teacher_columns(pretrained, class_names)
        if kind == "soft" and pretrained.loss != "softmax":
            raise UserError(
                f"{pretrained.source} was trained for the loss {pretrained.loss}, so it has no "
                "probabilities of classes that sum to 1: set --config.distillation.kind=hard"
            )
    module = create_model(pretrained.model, dtype=dtype)
    normalize = _normalization(pretrained.preprocessing)

    def logits(params: Any, images: jax.Array) -> jax.Array:
        inputs = normalize(pixels_to_inputs(images))
        found = cast(jax.Array, module.apply({"params": params}, inputs))
        return jax.lax.stop_gradient(found)[:, columns]

    whole = NamedSharding(mesh, PartitionSpec())

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

    return Teacher(jax.tree.map(place, pretrained.params), logits, _fingerprint(pretrained))


def _fingerprint(pretrained: Pretrained) -> str:
    """A digest of the model, and of all arrays but those that are fitted to the size of images.

    Their rounding is the machine's, and a run may go on on another.
    """
    resized = family_of(pretrained.model["architecture"]).resizers
    arrays = flatten_dict(pretrained.params, sep="/")
    kept = {name: x for name, x in arrays.items() if name.rpartition("/")[2] not in resized}
    view = dataclasses.asdict(pretrained.preprocessing)
    description = pretrained.model, view, pretrained.class_names
    return fingerprint_text(fingerprint_params(kept).hex(), *description).hex()


def check_same_teacher(teacher: Teacher | None, before: str | None, workdir: Path) -> None:
    """Checks that a run goes on with the teacher that it began with.

    Args:
        teacher: of now.
        before: the fingerprint in its checkpoint; None where none was noted.
        workdir: of the run.

    Raises:
        UserError: it is another one.
    """
    if teacher and before and before != teacher.fingerprint:
        raise UserError(
            f"{workdir} holds a run that learned from other weights than those that are at "
            "config.distillation.teacher now: bring them back, or choose another --workdir"
        )


def teacher_columns(pretrained: Pretrained, class_names: Sequence[str]) -> np.ndarray:
    """The columns of a teacher's logits that are those of a data set's classes, in their order.

    By name where the names of its classes are known, else by number, see `classes.match`.

    Raises:
        UserError: it does not know them all, or has another number of classes.
    """
    num_classes, names = pretrained.model["num_classes"], pretrained.class_names
    found = classes.match(num_classes, names, class_names)
    if found is not None:
        return np.array(found)
    if names is None:
        raise UserError(
            f"{pretrained.source} has {num_classes} classes without names, "
            f"the data set {len(class_names)}: choose a teacher of the same classes"
        )
    known = set(map(comparable, names))
    if unknown := [printable(name) for name in class_names if comparable(name) not in known]:
        raise UserError(
            f"{pretrained.source} does not know {len(unknown)} of the {len(class_names)} classes "
            f"of the data set ({shortlist(unknown)}): choose a teacher that was trained on them"
        )
    raise UserError(
        f"{pretrained.source} has {num_classes} classes, the data set {len(class_names)}, and "
        "names that are numbers or several classes' do not tell which are the same: choose a "
        "teacher of the same classes"
    )


def _normalization(preprocessing: Preprocessing) -> Callable[[jax.Array], jax.Array]:
    """Maps images in [-1, 1] to what the teacher was trained on."""
    mean, std = (np.asarray(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
    if np.all(mean == 0.5) and np.all(std == 0.5):
        return lambda images: images
    return lambda images: ((images + 1.0) / 2.0 - jnp.asarray(mean)) / jnp.asarray(std)
