"""The evaluators of a run: entries of `config.evals`, each of a type that is listed here.

An entry names its type, its images, and how often it is due:

    config.evals.imagenet_v2 = {"type": "objective", "dataset": "imagenet_v2", "every": "5 epochs"}

What it leaves out has the default of its type. An evaluator is a function from parameters to
scalars; "examples" among them is the number of images that they are of. A new type is a function
that makes one from the settings of an entry and the run, and a line in `EVALUATORS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from vit_jax.errors import UserError, brief, nearest
from vit_jax.evaluation import detection, fewshot, metrics, multilabel, segmentation
from vit_jax.evaluation.detections import detect, make_detecting
from vit_jax.evaluation.watched import Watched
from vit_jax.steps import eval_step
from vit_jax.xla_flags import compiler_options

if TYPE_CHECKING:  # It imports TFDS.
    from vit_jax.data.source import Source

Settings = Mapping[str, Any]
Scalars = Mapping[str, float]
Evaluate = Callable[[Any], dict[str, float]]  # from the parameters

# The entry that decides which checkpoint is the best and, with config.patience, when a run stops.
DECIDING = "val"

# What every entry has. Of dataset, "" is the run's own.
COMMON_KEYS = {"dataset": "", "data_dir": "", "split": "", "every": "1000 steps"}


def describe(title: str, scalars: Scalars) -> str:
    """Formats an evaluation to print: "evaluated on 355 images of test: accuracy 0.9437"."""
    values = {name: value for name, value in scalars.items() if name != "examples"}
    listed = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    if "examples" in scalars:
        return f"evaluated on {scalars['examples']:,} images of {title}: {listed}"
    return f"evaluated {title}: {listed}"


def objective(settings: Settings, watched: Watched) -> Evaluate:
    """The training objective on other images: "loss", and "accuracy" where there is one.

    Of images with several labels, all of `multilabel.MultiLabelMetrics` that is a number, of those
    with masks, all of `segmentation.SegmentationMetrics`, and of those with boxes, all of
    `detection.DetectionMetrics`.
    """
    source = watched.open(settings)
    if source.has_boxes:
        return _boxes(source, watched)
    if source.has_masks:
        return _masks(source, watched)
    if source.multi_label and watched.class_names is not None:
        return _several_labels(source, watched)
    step = jax.jit(
        functools.partial(eval_step, objective=watched.objective),
        compiler_options=compiler_options(watched.mesh.devices.flat[0].platform),
    )
    batches = watched.batches(source)
    return lambda params: metrics.mean_metrics(step, params, batches, watched.mesh)


def classification(settings: Settings, watched: Watched) -> Evaluate:
    """All of `metrics.ClassificationMetrics` that is a number.

    Of images with several labels, of `multilabel.MultiLabelMetrics`.
    """
    _check_classes(watched, "classification")
    source = watched.open(settings)
    if source.multi_label:
        return _several_labels(source, watched)
    batches = watched.batches(source)
    apply_fn = metrics.make_apply_fn(watched.model, watched.mesh)

    def scores(params: Any) -> dict[str, float]:
        found = metrics.classification_metrics(
            apply_fn, params, batches, watched.mesh, watched.loss
        )
        return found.scalars()

    return scores


def _several_labels(source: "Source", watched: Watched) -> Evaluate:
    multilabel.check_loss(source.name, watched.loss)
    batches = watched.batches(source)
    apply_fn = metrics.make_apply_fn(watched.model, watched.mesh)

    def scores(params: Any) -> dict[str, float]:
        return multilabel.multilabel_metrics(apply_fn, params, batches, watched.mesh).scalars()

    return scores


def _masks(source: "Source", watched: Watched) -> Evaluate:
    batches = watched.batches(source)
    counting = segmentation.make_counting(watched.model, watched.mesh)
    return lambda params: segmentation.segmentation_metrics(
        counting, params, batches, watched.mesh
    ).scalars()


def _boxes(source: "Source", watched: Watched) -> Evaluate:
    detection.check_installed()
    batches, truth = watched.batches(source), detection.truth(source)
    names = watched.box_names or source.class_names
    detecting = make_detecting(watched.model, watched.mesh)

    def scores(params: Any) -> dict[str, float]:
        found = detect(detecting, params, batches, watched.mesh, watched.preprocessing)
        return detection.detection_metrics(list(found), truth, names).scalars()

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


@dataclasses.dataclass(frozen=True)
class EvaluatorType:
    """A type of evaluator: how it is made, and its settings.

    Attributes:
        create: from the settings of an entry and the run it watches to the evaluator.
        keys: of an entry beyond `COMMON_KEYS`, or with another default.
        needs_dataset: whether it has no images without a data set: "" switches it off.
        decides: whether its scalars have one that decides the best, see `reporting`.
        check: raises a UserError if the settings have no meaning; nothing is opened.
        title: of an entry, from its name and settings.
        label: before the title, in the names of the scalars in metrics.jsonl.
        describe: from the title and the scalars to what is printed.
    """

    create: Callable[[Settings, Watched], Evaluate]
    keys: Settings = dataclasses.field(default_factory=dict)
    needs_dataset: bool = False
    decides: bool = False
    check: Callable[[Settings], Any] = lambda settings: None  # noqa: ARG005
    title: Callable[[str, Settings], str] = lambda name, settings: name  # noqa: ARG005
    label: str = ""
    describe: Callable[[str, Scalars], str] = describe

    @property
    def defaults(self) -> dict[str, Any]:
        """The keys of an entry but its type, with their defaults."""
        return {**COMMON_KEYS, **self.keys}


EVALUATORS = {
    "objective": EvaluatorType(objective, decides=True),
    "classification": EvaluatorType(classification, decides=True),
    "real": EvaluatorType(
        real, keys={"dataset": "imagenet2012_real"}, needs_dataset=True, decides=True
    ),
    "objectnet": EvaluatorType(objectnet, needs_dataset=True, decides=True),
    "fewshot": EvaluatorType(
        fewshot.create,
        keys={"shots": "1,5,10,25", "every": "10000 steps"},
        needs_dataset=True,
        check=lambda settings: fewshot.parse_shots(settings["shots"]),
        title=lambda _, settings: fewshot.short_name(settings["dataset"]),
        label="fewshot/",
        describe=fewshot.describe,
    ),
}


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """An entry of `config.evals` in a run.

    Attributes:
        name: of the entry.
        every: steps from one evaluation to the next; 0 is at the end alone.
        run: the evaluator itself, from parameters to scalars.
        prefix: of its scalars in metrics.jsonl.
        describe: from the scalars to what is printed.
    """

    name: str
    every: int
    run: Evaluate
    prefix: str
    describe: Callable[[Scalars], str]


def complete(settings: Settings) -> dict[str, Any]:
    """An entry of `config.evals` with the default of every key that it leaves out.

    Raises:
        UserError: its type is missing or unknown.
    """
    kind = str(settings.get("type", ""))
    if kind not in EVALUATORS:
        near = nearest(kind, EVALUATORS)
        hint = f"did you mean {near}? Valid are" if near else "use one of"
        raise UserError(f"type {brief(kind)} is unknown: {hint} {', '.join(EVALUATORS)}")
    return {"type": kind, **EVALUATORS[kind].defaults, **settings}


def is_on(settings: Settings) -> bool:
    """Tells whether an entry with all its keys is evaluated at all."""
    return bool(settings["dataset"]) or not EVALUATORS[settings["type"]].needs_dataset


def prefix(name: str, settings: Settings) -> str:
    """Returns the prefix of the names of an entry's scalars in metrics.jsonl."""
    row = EVALUATORS[settings["type"]]
    return "eval_" if name == DECIDING else f"{row.label}{row.title(name, settings)}/"


def create_evaluators(
    evals: Mapping[str, Settings], watched: Watched, count_steps: Callable[[str], int]
) -> list[Evaluator]:
    """The evaluators of a run that are on, the deciding one first.

    Args:
        evals: of the config, each with all its keys.
        watched: the run.
        count_steps: of an interval, such as "1000 steps" or "5 epochs".

    Raises:
        UserError: an evaluator cannot be made, with the name of its entry.
    """
    evaluators = []
    for name in sorted(evals, key=lambda name: (name != DECIDING, name)):
        settings = evals[name]
        if not is_on(settings):
            continue
        row = EVALUATORS[settings["type"]]
        try:
            run, every = row.create(settings, watched), count_steps(settings["every"])
        except UserError as error:
            raise UserError(f"config.evals.{name}: {error}") from error
        title = row.title(name, settings)
        if name == DECIDING and not settings["dataset"]:
            title = settings["split"] or watched.eval_source.split
        describe = functools.partial(row.describe, title)
        evaluators.append(Evaluator(name, every, run, prefix(name, settings), describe))
    return evaluators
