"""Pictures of a run, for TensorBoard and trackers: what its model sees, looks at and confuses."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.analysis.attention import on_patches, rollout, to_mask
from vit_jax.analysis.intermediates import attention_weights
from vit_jax.config_rules import parse_pictures
from vit_jax.data.pipeline import eval_batches
from vit_jax.data.source import Source
from vit_jax.errors import UserError
from vit_jax.evaluation import metrics
from vit_jax.evaluation.per_class import readable_confusion
from vit_jax.models.vit import ViTConfig
from vit_jax.preparation import Prepared
from vit_jax.program import batch_mix
from vit_jax.sharding import Mesh, gathering
from vit_jax.steps import pixels_to_inputs

if TYPE_CHECKING:  # It imports matplotlib.
    from matplotlib.figure import Figure

Picture = tuple[str, bytes]  # its name, and it as a PNG

_INPUTS = 18  # of the first batch
_WATCHED = 6  # of the images of evaluation, spread over them


def check_pictures(prepared: Prepared) -> frozenset[str]:
    """The pictures that the run's `log_images` asks for.

    Raises:
        UserError: its model or objective has none of a kind.
    """
    wanted = parse_pictures(prepared.config.log_images)
    if "attention" in wanted and not isinstance(prepared.model.config, ViTConfig):
        raise _none_of("attention", "the model has no attention between all patches")
    if prepared.class_names is None:
        for name in sorted(wanted & {"attention", "confusion"}):
            raise _none_of(name, "the objective predicts no classes")
    if "confusion" in wanted and prepared.train_source.multi_label:
        raise _none_of("confusion", "an image has several labels")
    if "confusion" in wanted and not _is_labeled(prepared.eval_source):
        raise _none_of("confusion", "images of evaluation have no label (-1)")
    return wanted


def _is_labeled(source: Source) -> bool:
    """Tells by a hundred of its images, as a split usually has labels for all or for none."""
    chosen = np.unique(np.linspace(0, source.num_examples - 1, 100).astype(int))
    return bool(source.select(chosen).labels().min() >= 0)


def _none_of(name: str, reason: str) -> UserError:
    return UserError(f"config.log_images asks for {name}, but {reason}: leave {name} out")


class Pictures:
    """Makes the pictures that a run's `log_images` asks for; every process makes the same calls.

    Args:
        prepared: the run.

    Raises:
        UserError: as `check_pictures` does.
    """

    def __init__(self, prepared: Prepared):
        self._prepared = prepared
        self._wanted = check_pictures(prepared)
        self._names = prepared.class_names
        if "attention" in self._wanted:
            self._watched = _watched(prepared)
            self._look = _looking(prepared)
        if "confusion" in self._wanted:
            self._apply = metrics.make_apply_fn(prepared.model, prepared.mesh)
            self._batches = prepared.watched.batches(prepared.eval_source)

    def inputs(self, rng: jax.Array, step: int, batch: dict[str, jax.Array]) -> list[Picture]:
        """The first images of a batch as the model sees them in training, with their labels.

        Args:
            rng: of the state.
            step: the steps done before.
            batch: on the devices.
        """
        if "inputs" not in self._wanted:
            return []
        images, labels = jax.device_get(_seeing(self._prepared)(rng, step, batch))
        lines = [(words(label, self._names),) for label in labels]
        return self._sheet("train/inputs", images, lines, f"The first images of step {step + 1}")

    def evaluated(self, params: Any) -> list[Picture]:
        """Pictures of what the parameters look at and confuse, of the images of evaluation."""
        found = []
        if "attention" in self._wanted:
            found += self._attention(params)
        if "confusion" in self._wanted:
            found += self._confusion(params)
        return found

    def _attention(self, params: Any) -> list[Picture]:
        images, labels = self._watched
        masks, logits = jax.device_get(self._look(params, images))
        seen = jax.device_get(images)
        # Image and what is left of it under its mask in turn, as in Figure 6.
        both = np.stack([seen, (seen + 1) * masks[..., None] - 1], axis=1)
        lines = []
        for label, predicted in zip(labels, logits.argmax(-1), strict=True):
            lines += [
                (words(label, self._names), ""),
                ("attention rollout", f"taken for {words(predicted, self._names)}"),
            ]
        pixels = both.reshape(-1, *seen.shape[1:])
        return self._sheet("eval/attention", pixels, lines, "Attention rollout over all layers")

    def _confusion(self, params: Any) -> list[Picture]:
        prepared, names = self._prepared, self._names or []
        found = metrics.classification_metrics(
            self._apply, params, self._batches, prepared.mesh, prepared.config.loss
        )
        if jax.process_index() != 0:
            return []
        from vit_jax.evaluation.pictures import confusion_matrix  # With matplotlib.

        of_all = [words(i, names) for i in range(found.num_classes)]
        figure = confusion_matrix(*readable_confusion(found.labels, found.predicted, of_all))
        return [("eval/confusion", _png(figure))]

    def _sheet(
        self, name: str, images: np.ndarray, lines: Sequence[tuple[str, ...]], title: str
    ) -> list[Picture]:
        if jax.process_index() != 0:
            return []
        from vit_jax.evaluation.pictures import Shown, contact_sheet  # With matplotlib.

        shown = [Shown(_pixels(x), text) for x, text in zip(images, lines, strict=True)]
        return [(name, _png(contact_sheet(shown, title)))]


def words(label: Any, names: Sequence[str] | None) -> str:
    """A label in words: the name of a class, or of several, with their shares where they have some.

    Args:
        label: an int, -1 for none, or the share of each class, [classes].
        names: of the classes; None where there are none.
    """
    if names is None:
        return ""
    if np.ndim(label) == 0:
        # A head may have more classes than its data set has names.
        return "no label" if label < 0 else _name(int(label), names)
    order = [i for i in np.argsort(-np.asarray(label), kind="stable") if label[i] > 0.005]
    return ", ".join(
        _name(i, names) + ("" if label[i] > 0.995 else f" {label[i]:.0%}") for i in order
    )


def _name(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _seeing(prepared: Prepared) -> Any:
    """From key, step and batch to what `steps.train_step` makes of it, images and labels."""
    mix = batch_mix(prepared.config, prepared.model.config.num_classes)

    def see(rng: jax.Array, step: int, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if mix is not None:
            _, mix_rng = jax.random.split(jax.random.fold_in(rng, step))
            batch = mix(mix_rng, batch)
        images = pixels_to_inputs(batch["image"][:_INPUTS])
        return images, batch.get("targets", batch["label"])[:_INPUTS]

    return jax.jit(see, out_shardings=_whole(prepared.mesh))


def _looking(prepared: Prepared) -> Any:
    """From parameters and images to masks of what is looked at [images, height, width], and logits.

    One image after another: its attention between all tokens in all layers and heads is large.
    """
    model = prepared.model

    def look(params: Mapping[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        height, width = images.shape[1:3]
        grid = model.config.grid(height, width)

        def mask(image: jax.Array) -> jax.Array:
            weights = attention_weights(model, params, image[None])
            return to_mask(on_patches(rollout(weights), grid), (height, width))[0]

        logits: Any = model.apply({"params": params}, images)
        return jax.lax.map(mask, images), logits

    return jax.jit(gathering(look, prepared.mesh), out_shardings=_whole(prepared.mesh))


def _watched(prepared: Prepared) -> tuple[jax.Array, np.ndarray]:
    """A few images of evaluation, whole on every process, and their labels."""
    source = prepared.eval_source
    chosen = np.unique(np.linspace(0, source.num_examples - 1, _WATCHED).astype(int))
    (batch,) = eval_batches(
        source.select(chosen),
        batch_size=len(chosen),
        preprocessing=prepared.watched.preprocessing,
    )
    images = batch["image"]
    place = jax.make_array_from_callback(
        images.shape, _whole(prepared.mesh), lambda index: images[index]
    )
    return place, batch["label"]


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _pixels(image: np.ndarray) -> np.ndarray:
    """An image in [-1, 1] as uint8 of three channels; of more the first three are shown."""
    shown = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    return np.clip(np.round((shown + 1) * 127.5), 0, 255).astype(np.uint8)


def _png(figure: "Figure") -> bytes:
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of names in letters that matplotlib's font has not.
        figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
