"""The evaluators that go once over the images of one split."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vit_jax.errors import UserError
from vit_jax.evaluation import metrics
from vit_jax.evaluation.watched import Watched
from vit_jax.steps import eval_step

Settings = Mapping[str, Any]
Evaluate = Callable[[Any], dict[str, float]]  # from the parameters


def describe(title: str, scalars: Mapping[str, float]) -> str:
    """Formats an evaluation to print: "evaluated on 355 images of test: accuracy 0.9437"."""
    values = {name: value for name, value in scalars.items() if name != "examples"}
    listed = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    if "examples" in scalars:
        return f"evaluated on {scalars['examples']:,} images of {title}: {listed}"
    return f"evaluated {title}: {listed}"


def objective(settings: Settings, watched: Watched) -> Evaluate:
    """The training objective on other images: "loss", and "accuracy" where there is one."""
    step = jax.jit(functools.partial(eval_step, objective=watched.objective))
    batches = watched.batches(watched.open(settings))
    return lambda params: metrics.mean_metrics(step, params, batches, watched.mesh)


def classification(settings: Settings, watched: Watched) -> Evaluate:
    """All of `metrics.ClassificationMetrics` that is a number."""
    _check_classes(watched, "classification")
    batches = watched.batches(watched.open(settings))
    apply_fn = metrics.make_apply_fn(watched.model, watched.mesh)

    def scores(params: Any) -> dict[str, float]:
        found = metrics.classification_metrics(
            apply_fn, params, batches, watched.mesh, watched.loss
        )
        return found.scalars()

    return scores


def real(settings: Settings, watched: Watched) -> Evaluate:
    """ImageNet-ReaL: "accuracy", and the number of "examples" that have labels."""
    from vit_jax.data import datasets

    _check_classes(watched, "real")
    if settings["dataset"] != datasets.REAL:
        raise UserError(
            f"data set {settings['dataset']!r} has no labels of ReaL: type real takes "
            f"{datasets.REAL} only"
        )
    split = settings["split"] or "validation"
    source = datasets.open_real(data_dir=settings["data_dir"], split=split)
    batches = watched.batches(watched.label(source))
    apply_fn = metrics.make_apply_fn(watched.model, watched.mesh)

    def scores(params: Any) -> dict[str, float]:
        accuracy, examples = metrics.real_accuracy(apply_fn, params, batches, watched.mesh)
        return {"accuracy": accuracy, "examples": examples}

    return scores


def objectnet(settings: Settings, watched: Watched) -> Evaluate:
    """ObjectNet: "accuracy" and "top5_accuracy" where each of several classes is right."""
    from vit_jax.data.objectnet import PREFIX, open_objectnet

    _check_classes(watched, "objectnet")
    if not settings["dataset"].startswith(PREFIX) or settings["split"] or settings["data_dir"]:
        raise UserError(
            f"data set {settings['dataset']!r}: type objectnet takes {PREFIX}PATH, and neither "
            "split nor data_dir"
        )
    source, _, _ = open_objectnet(settings["dataset"])
    batches = watched.batches(watched.label(source))
    apply_fn = metrics.make_apply_fn(watched.model, watched.mesh)
    return lambda params: metrics.multilabel_accuracy(apply_fn, params, batches, watched.mesh)


def _check_classes(watched: Watched, kind: str) -> None:
    if watched.class_names is None:
        raise UserError(
            f"type {kind} scores predicted classes, which the run's objective has none of: use "
            "type objective or fewshot"
        )
