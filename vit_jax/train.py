"""The training loop. Pre-training and fine-tuning are the same loop under two recipes."""

import contextlib
import errno
import functools
import json
import math
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_jax import fewshot, metrics, recipes
from vit_jax.analysis import flops
from vit_jax.checkpoints.pretrained import Pretrained, fold_normalization, load_pretrained
from vit_jax.checkpoints.training import CheckpointStore, config_differences
from vit_jax.checkpoints.transfer import print_report, transfer
from vit_jax.config import (
    adopt,
    check_config,
    count_steps,
    migrate,
    parse_shots,
    to_dict,
)
from vit_jax.data import datasets, pipeline
from vit_jax.data.augmentation import parse_augment
from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.data.subset import take_subset
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.files import write_json
from vit_jax.models import create_model, masked, prediction_defaults
from vit_jax.sharding import Mesh, batch_sharding, make_mesh, state_sharding, to_devices
from vit_jax.state import (
    TrainState,
    create_optimizer,
    create_schedule,
    init_train_state,
    replace_params,
)
from vit_jax.steps import (
    Objective,
    classification,
    eval_step,
    masked_patches,
    mixup,
    train_step,
)

# What may change when a run goes on: nothing here alters a parameter.
RESUMABLE_CHANGES = {
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sharding",
    "dataset.data_dir",
    "fewshot",
}


class Run(NamedTuple):
    """All that is fixed for the length of a run."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    train_source: datasets.Source
    eval_source: datasets.Source
    model: nn.Module
    objective: Objective
    multiply_adds: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    fewshot_every: int
    fewshot: Callable[[Any], dict[int, list[float]]] | None


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Runs a config to its end, from where an earlier run in the same workdir stopped.

    Args:
        config: of the whole run; see `vit_jax.recipes`.
        workdir: takes config.json, metrics.jsonl, metrics.json, TensorBoard's event files, and the
            checkpoints. Nothing else is written.

    Returns:
        What metrics.json holds: the last evaluation and the best.

    Raises:
        UserError: for any mistake of the user's, a loss that is not finite, and a full disk.
        SystemExit: 143 after SIGTERM, when the state has been saved.
    """
    check_config(config)
    workdir = _make_workdir(workdir)
    finished = workdir / "metrics.json"
    store = CheckpointStore(workdir, keep=config.keep_checkpoints, report=_say)
    with _sigterm() as terminated, _full_disk(workdir), contextlib.closing(store):
        saved = store.latest_metadata()
        if saved is not None:
            saved_config = migrate(saved["config"])
            config = adopt(config, saved_config["model"])
            _refuse_another_run(config, workdir, saved_config)
        if finished.exists():
            _say(f"{workdir} holds a finished run: nothing to do")
            return json.loads(finished.read_text())
        weights = None
        if saved is None and config.init_from:
            config, weights = _read_weights(config)
        config = adopt(config, prediction_defaults(config.model.architecture))
        run = _prepare(config, workdir, saved_names=(saved or {}).get("class_names"))
        if jax.process_index() == 0:
            write_json(workdir / "config.json", to_dict(config))
        state, progress = _start(run, store, weights)
        del weights  # They need not stay in memory while the run goes.
        final = _loop(run, state, progress, store, terminated)
        if jax.process_index() == 0:
            write_json(finished, final)
    return final


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _make_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    workdir = pathlib.Path(workdir).absolute()
    probe = workdir / f".writable-{jax.process_index()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"workdir {workdir} is not writable ({error.strerror}): choose another --workdir"
        ) from error
    return workdir


def _refuse_another_run(config: ConfigDict, workdir: pathlib.Path, saved: dict[str, Any]) -> None:
    may_change = set(RESUMABLE_CHANGES)
    if not parse_augment(config.augment).num_operations:
        may_change.add("augment_contrast")  # Without RandAugment nothing depends on it.
    differences = config_differences(saved, to_dict(config), may_change)
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differences)}): "
            "choose another --workdir, or change these back"
        )


# What the weights of init_from decide: a model that differs in one of these is another.
OF_WEIGHTS = (
    "architecture",
    "patch_size",
    "hidden_size",
    "num_layers",
    "mlp_dim",
    "num_heads",
    "resnet_layers",
    "width_factor",
    "gelu",
    "layer_norm_epsilon",
    "group_norm_epsilon",
    "position_embedding",
    "position_placement",
)


def _read_weights(config: ConfigDict) -> tuple[ConfigDict, dict[str, Any]]:
    """The config with what it leaves to the weights of init_from, and their parameters.

    That they fit is told here, before a data set is opened or anything compiled.
    """
    pretrained = load_pretrained(config.init_from)
    _check_weights(config.model, pretrained)
    adopted = adopt(config, pretrained.model)
    weights = {**fold_normalization(pretrained), **pretrained.masked}
    model, *_ = _prepare_objective(adopted, num_classes=1)
    size = config.dataset.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    transfer(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), weights)
    left = sorted(key for key in recipes.ADOPTED if config.model.get(key, "") is None)
    if left:
        values = ", ".join(f"{key} {adopted.model[key]}" for key in left)
        _say(f"as {pretrained.source} has it: {values}")
    return adopted, weights


def _check_weights(model: ConfigDict, pretrained: Pretrained) -> None:
    for key in OF_WEIGHTS:
        wanted, found = (_plain(x.get(key)) for x in (model, pretrained.model))
        if wanted is not None and wanted != found:
            known = f"--config.model.{key}={found}" if key != "architecture" else "its own config"
            raise UserError(
                f"model.{key} is {wanted} but {pretrained.source} was trained with {found}: "
                f"set {known}"
            )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _prepare(config: ConfigDict, workdir: pathlib.Path, saved_names: list[str] | None) -> Run:
    mesh = make_mesh()
    parts = mesh.size * config.accumulate_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} does not divide evenly over {mesh.size} devices x "
            f"{config.accumulate_steps} accumulate_steps: use a multiple of {parts}"
        )
    data = config.dataset
    train_source, eval_source = datasets.open_dataset(
        data.name,
        data_dir=data.data_dir,
        train_split=data.train_split,
        eval_split=data.eval_split,
        development=data.development,
    )
    if saved_names is not None:
        sources = (train_source, eval_source)
        train_source, eval_source = (_with_labels(x, saved_names, workdir) for x in sources)
    train_source = take_subset(train_source, data.subset, data.subset_seed)
    count = functools.partial(
        count_steps, num_examples=train_source.num_examples, batch_size=config.batch_size
    )
    total_steps = count(config.duration)
    if total_steps < 1:
        raise UserError(
            f"duration {config.duration!r} is {total_steps} steps: it must be at least 1"
        )
    eval_every = count(config.eval_every)
    if config.patience and not eval_every:
        raise UserError(
            f"patience is {config.patience} but eval_every is {config.eval_every!r}: only "
            "evaluations can stop the run, set an interval"
        )
    schedule_keys = dict(config.schedule)
    schedule = create_schedule(
        warmup_steps=count(schedule_keys.pop("warmup")), total_steps=total_steps, **schedule_keys
    )
    model, objective, multiply_adds = _prepare_objective(config, len(train_source.class_names))
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        train_source=train_source,
        eval_source=eval_source,
        model=model,
        objective=objective,
        multiply_adds=multiply_adds,
        schedule=schedule,
        optimizer=create_optimizer(config.optimizer, schedule),
        total_steps=total_steps,
        log_every=count(config.log_every),
        eval_every=eval_every,
        checkpoint_every=count(config.checkpoint_every),
        fewshot_every=count(config.fewshot.every),
        fewshot=_prepare_fewshot(config, mesh) if config.fewshot.dataset else None,
    )


def _with_labels(
    source: datasets.Source, saved_names: list[str], workdir: pathlib.Path
) -> datasets.Source:
    """The source with the labels that a run began with: folders of numbers were once text."""
    if list(source.class_names) == saved_names:
        return source
    if sorted(source.class_names) != sorted(saved_names):
        raise UserError(
            f"{workdir} holds a run whose {len(saved_names)} classes are not the "
            f"{len(source.class_names)} that {source.name} has now: choose another --workdir"
        )
    return datasets.relabel(
        source, [saved_names.index(name) for name in source.class_names], saved_names
    )


def _prepare_objective(config: ConfigDict, num_classes: int) -> tuple[nn.Module, Objective, int]:
    """The model, what it is trained for, and the multiply-adds of one image."""
    size = config.dataset.image_size
    if config.objective == "masked_patches":
        rate, target = config.masking.rate, config.masking.target
        model = masked.predictor(create_model(config.model), target)
        multiply_adds = masked.multiply_adds(model, size, rate)
        return model, masked_patches(model, rate, target), multiply_adds
    if 0 < config.model.num_classes < num_classes:
        raise UserError(
            f"model.num_classes is {config.model.num_classes} but {config.dataset.name} has "
            f"{num_classes} classes: use at least as many, or 0 to take the data set's"
        )
    num_classes = config.model.num_classes or num_classes
    model = create_model(config.model, num_classes=num_classes)
    objective = classification(model, config.loss, config.label_smoothing)
    return model, objective, flops.multiply_adds(config.model, size, num_classes)


def _prepare_fewshot(config: ConfigDict, mesh: Mesh) -> Callable:
    data = config.fewshot
    support, test = datasets.open_dataset(data.dataset, data_dir=data.data_dir)
    return fewshot.create_fewshot(
        create_model(config.model, num_classes=0),
        support,
        test,
        shots=parse_shots(data.shots),
        preprocessing=_preprocessing(config),
        batch_size=config.batch_size // config.accumulate_steps,
        mesh=mesh,
        report=_say,
    )


def _preprocessing(config: ConfigDict) -> Preprocessing:
    data = config.dataset
    return evaluation(data.protocol, data.image_size, data.jpeg_dct)


def _start(
    run: Run, store: CheckpointStore, weights: dict[str, Any] | None
) -> tuple[TrainState, dict[str, Any]]:
    """The state to begin with: restored, or fresh with the parameters of init_from if given."""
    config = run.config
    init = functools.partial(
        init_train_state,
        run.model,
        run.optimizer,
        seed=config.seed,
        image_size=config.dataset.image_size,
        average=config.ema_decay > 0,
    )
    shapes = jax.eval_shape(init)
    sharding = state_sharding(shapes, run.mesh, config.sharding)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding
    )
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))
    _say(
        f"{parameters:,} parameters, {run.train_source.num_examples:,} training images, "
        f"{run.total_steps:,} steps of {config.batch_size:,} on {run.mesh.size} "
        f"{jax.devices()[0].device_kind} device(s)"
    )
    restored = store.restore(abstract)
    if restored is not None:
        state, metadata = restored
        _say(f"continuing from step {int(state.step)} in {run.workdir}")
        return state, metadata["progress"]
    state = jax.jit(init, out_shardings=sharding)()
    if weights is not None:
        state = _initialize_from(weights, state)
    progress = {"window": {}, "evaluation": {}, "best": {}, "evaluations_since_best": 0}
    return state, progress | {"seconds": 0.0}


def _initialize_from(weights: dict[str, Any], state: TrainState) -> TrainState:
    fresh = multihost_utils.process_allgather(state.params, tiled=True)
    params, report = transfer(fresh, weights)
    if jax.process_index() == 0:
        print_report(report)
    return replace_params(state, params)


def _loop(
    run: Run,
    state: TrainState,
    progress: dict[str, Any],
    store: CheckpointStore,
    terminated: Callable[[int], bool],
) -> dict[str, Any]:
    step = int(state.step)
    step_fn, evaluator = _compile(run, state)
    window = metrics.Window(progress["window"])
    stopwatch = metrics.Stopwatch(progress.get("seconds", 0.0))
    laps = step
    batches = to_devices(_train_batches(run, step), run.mesh)
    with contextlib.closing(metrics.create_writer(run.workdir, step)) as writer:
        while step < run.total_steps and not _out_of_patience(run, progress):
            try:
                batch = next(batches)
            except UserError:  # An image that cannot be decoded must not cost what was learned.
                if jax.process_count() == 1:
                    progress["window"] = window.drain()
                    progress["seconds"] = stopwatch.total()
                    store.save(step, state, _metadata(run, progress))
                raise
            state, step_metrics = step_fn(state, batch)
            step += 1
            last = step == run.total_steps
            with _stopping_at_bad_loss(store):
                window.add(step, step_metrics)
                if last or _due(step, run.log_every):
                    scalars = window.mean()
                    _log(run, writer, step, step - laps, scalars, stopwatch)
                    laps = step
                stop = terminated(step)
                due_fewshot = run.fewshot and (last or _due(step, run.fewshot_every))
                due = _due(step, run.eval_every, run.checkpoint_every)
                if not (last or stop or due or due_fewshot):
                    continue
                progress["window"] = window.drain()
            progress["seconds"] = stopwatch.total()
            with stopwatch:
                if last or _due(step, run.eval_every):
                    progress["evaluation"] = {"step": step, **evaluator(state.eval_params)}
                    _report_evaluation(run, writer, progress, state, store)
                    last = last or _out_of_patience(run, progress)
                if due_fewshot or (last and run.fewshot):
                    _report_fewshot(run, writer, step, run.fewshot(state.eval_params))
                if last or stop or _due(step, run.checkpoint_every):
                    writer.flush()
                    store.save(step, state, _metadata(run, progress))
            if stop and not last:
                store.wait()
                _say(f"SIGTERM: saved step {step}; the same command continues from there")
                raise SystemExit(128 + signal.SIGTERM)
    store.wait()
    final = {**progress["evaluation"], "best": progress["best"]}
    if run.config.patience:
        final["stopped_early"] = step < run.total_steps
    return final


def _out_of_patience(run: Run, progress: dict[str, Any]) -> bool:
    patience = run.config.patience
    return 0 < patience <= progress.get("evaluations_since_best", 0)


def _due(step: int, *intervals: int) -> bool:
    return any(interval and step % interval == 0 for interval in intervals)


def _compile(run: Run, state: TrainState) -> tuple[Callable, Callable]:
    """The jitted training step, and a function from parameters to evaluation metrics."""
    config = run.config
    size = config.dataset.image_size
    sharding = jax.tree.map(lambda x: x.sharding, state)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    mix = None
    if alpha := parse_augment(config.augment).mixup_alpha:
        mix = functools.partial(mixup, alpha=alpha, num_classes=run.model.num_classes)
    step_fn = jax.jit(
        functools.partial(
            train_step,
            objective=run.objective,
            optimizer=run.optimizer,
            accumulate_steps=config.accumulate_steps,
            ema_decay=config.ema_decay,
            mix=mix,
        ),
        in_shardings=(sharding, batch_sharding(run.mesh)),
        out_shardings=(sharding, None),
        donate_argnums=0,
    )
    # Compiled here, the first step takes no longer than the others.
    step_fn = step_fn.lower(state, batch).compile()
    eval_fn = jax.jit(functools.partial(eval_step, objective=run.objective))
    batches = pipeline.eval_batches(
        run.eval_source,
        batch_size=config.batch_size // config.accumulate_steps,
        preprocessing=_preprocessing(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return step_fn, lambda params: evaluate(eval_fn, params, batches, run.mesh)


def _train_batches(run: Run, first_step: int) -> Iterator[dict[str, Any]]:
    data = run.config.dataset
    augmentation = parse_augment(run.config.augment)
    return pipeline.train_batches(
        run.train_source,
        batch_size=run.config.batch_size,
        image_size=data.image_size,
        protocol=data.protocol,
        jpeg_dct=data.jpeg_dct,
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        num_operations=augmentation.num_operations,
        magnitude=augmentation.magnitude,
        contrast=run.config.augment_contrast,
        seed=run.config.seed,
        first_step=first_step,
        shuffle_buffer=data.shuffle_buffer,
        cache=data.cache,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether to save and stop, the same on all processes."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # noqa: ARG005
        return
    received = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()  # noqa: ARG005
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _full_disk(workdir: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise UserError(
            f"{workdir} cannot be written: {error.strerror}; free space and run the same command "
            "again, it continues from the last checkpoint"
        ) from error


@contextlib.contextmanager
def _stopping_at_bad_loss(store: CheckpointStore) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        store.wait()
        kept = store.latest_step()
        raise UserError(
            f"{error}: stopped; "
            + ("there is no checkpoint yet" if kept is None else f"step {kept} is the last saved")
            + ". Start anew in another --workdir with a lower schedule.base_lr, a longer "
            "schedule.warmup or optimizer.clip_norm"
        ) from None


def _log(
    run: Run,
    writer: Any,
    step: int,
    steps: int,
    scalars: dict[str, float],
    stopwatch: metrics.Stopwatch,
) -> None:
    """Writes the means over the last `steps` steps, and what the run has cost so far."""
    config = run.config
    seconds = stopwatch.lap()
    scalars["device_days"] = stopwatch.total() * run.mesh.size / (24 * 60 * 60)
    images_per_second = steps * config.batch_size / seconds
    scalars["learning_rate"] = float(run.schedule(step - 1))
    scalars["images_per_second"] = images_per_second
    needed = flops.train_flops(run.multiply_adds)  # of one image
    scalars["exaflops"] = needed * config.batch_size * step / 1e18
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    if peak:
        scalars["mfu"] = needed * images_per_second / (peak * run.mesh.size)
    writer.write_scalars(step, scalars)
    left = (run.total_steps - step) * seconds / steps
    _say(metrics.progress_line(step, run.total_steps, scalars, left))


def _report_evaluation(
    run: Run, writer: Any, progress: dict[str, Any], state: TrainState, store: CheckpointStore
) -> None:
    result = progress["evaluation"]
    scalars = {name: result[name] for name in ("accuracy", "loss") if name in result}
    writer.write_scalars(result["step"], {f"eval_{name}": value for name, value in scalars.items()})
    listed = "  ".join(f"{name} {value:.4f}" for name, value in scalars.items())
    _say(
        f"step {result['step']}/{run.total_steps}  evaluated on {result['examples']:,} images of "
        f"{run.eval_source.split}: {listed}"
    )
    progress["evaluations_since_best"] = progress.get("evaluations_since_best", 0) + 1
    best = progress["best"]
    if _is_better(result, best):
        progress.update(best=result, evaluations_since_best=0)
        store.save_best(result["step"], state, _metadata(run, progress))
    elif _out_of_patience(run, progress) and result["step"] < run.total_steps:
        _say(
            f"step {result['step']}/{run.total_steps}  stopped: {run.config.patience} evaluations "
            f"without one better than that of step {best['step']}, whose weights are in "
            f"{run.workdir / 'best'}"
        )


def _is_better(result: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether an evaluation is the best so far: by its loss where there is no accuracy."""
    if "accuracy" in result:
        return result["accuracy"] > best.get("accuracy", -1.0)
    return result["loss"] < best.get("loss", math.inf)


def _report_fewshot(run: Run, writer: Any, step: int, accuracies: dict[int, list[float]]) -> None:
    name = fewshot.short_name(run.config.fewshot.dataset)
    means = {shots: float(np.mean(values)) for shots, values in accuracies.items()}
    writer.write_scalars(step, {f"fewshot/{name}/{k}shot": mean for k, mean in means.items()})
    listed = "  ".join(f"{k}-shot {mean:.4f}" for k, mean in means.items())
    _say(f"step {step}/{run.total_steps}  few-shot accuracy on {name}: {listed}")


def _metadata(run: Run, progress: dict[str, Any]) -> dict[str, Any]:
    classes = run.config.objective == "classification"
    return {
        "config": to_dict(run.config),
        "class_names": list(run.train_source.class_names) if classes else None,
        "progress": progress,
    }
