"""The training loop. Pre-training and fine-tuning are the same loop under two recipes."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax.analysis import flops
from vit_jax.checkpoints.training import CheckpointStore, config_differences, latest_metadata
from vit_jax.config import check_config, complete_evals, take_from_weights, to_dict
from vit_jax.config_migration import complete_sections, migrate
from vit_jax.data import holdout
from vit_jax.data.augmentation import parse_augment
from vit_jax.data.pipeline import INPUT_VERSION
from vit_jax.errors import UserError
from vit_jax.evaluation.registry import DECIDING, Evaluator
from vit_jax.files import write_json
from vit_jax.initialization import Weights, initial_state, read_weights
from vit_jax.interruption import Stop, full_disk, making_workdir, only_run, stopping
from vit_jax.longer import is_longer, reopen
from vit_jax.lora import merge
from vit_jax.models import prediction_defaults
from vit_jax.pictures import Pictures
from vit_jax.preparation import Prepared, compile_train_step, prepare, train_batches
from vit_jax.profiling import Profile, check_steps, parse_steps
from vit_jax.program import abstract_state, check_multipliers, state_initializer
from vit_jax.reporting import Cost, Progress, Reporter, deciding_scalar
from vit_jax.sharding import to_devices
from vit_jax.state import TrainState
from vit_jax.steps import Batch, Metrics
from vit_jax.teacher import check_same_teacher, check_teacher
from vit_jax.terminal import say
from vit_jax.trackers import Track, parse_track

# What may change when a run goes on: nothing here alters a parameter. Of `evals` too all may but
# which images decide, by which the evaluations before and after are compared.
RESUMABLE_CHANGES = {
    "log_every",
    "log_images",
    "checkpoint_every",
    "keep_checkpoints",
    "sharding",
    "model.remat",
    "dataset.data_dir",
    "dataset.workers",
    f"evals.{DECIDING}.every",
}


class Shown(NamedTuple):
    """Ways to show a run, beyond its config; nothing that it finds depends on them.

    Attributes:
        track: as `trackers.parse_track` reads it.
        profile: the steps of which a trace is written, as `profiling.parse_steps` reads them.
    """

    track: str = ""
    profile: str = ""


PLAIN = Shown()


def train(
    config: ConfigDict, workdir: str | os.PathLike[str], shown: Shown = PLAIN
) -> dict[str, Any]:
    """Runs a config to its end, from where an earlier run in the same workdir stopped.

    Args:
        config: of the whole run; see `vit_jax.recipes`.
        workdir: takes config.json, metrics.jsonl, metrics.json, TensorBoard's event files, the
            checkpoints, and of images without splits split.csv. Nothing else is written, but for
            what `shown` asks for.
        shown: beyond the config.

    Returns:
        What metrics.json holds: the last evaluation and the best.

    Raises:
        UserError: for any mistake of the user's, a loss that is not finite, and a full disk.
        SystemExit: 143 after SIGTERM, when the state has been saved.
        KeyboardInterrupt: after Ctrl-C, likewise.
    """
    check_config(config)
    return run_checked(config, workdir, shown)


def run_checked(
    config: ConfigDict, workdir: str | os.PathLike[str], shown: Shown = PLAIN
) -> dict[str, Any]:
    """Runs as `train` a config that has been checked."""
    track, traced = parse_track(shown.track), parse_steps(shown.profile)
    config = complete_evals(complete_sections(config))
    workdir = pathlib.Path(workdir).absolute()
    saved, saved_config = latest_metadata(workdir), None
    if saved is not None:
        saved_config = migrate(saved["config"])
        config = take_from_weights(config, saved_config["model"])
        _refuse_another_run(config, workdir, saved_config)
    finished = workdir / "metrics.json"
    before = (saved_config or {}).get("duration", config.duration)
    if finished.exists() and before == config.duration:
        return _read_finished(finished)
    if saved is not None and saved.get("input") != INPUT_VERSION:
        raise UserError(
            f"{workdir} holds a run of another version, which reads the images in another order: "
            "finish it with that version, or start anew in another --workdir"
        )
    if saved is None:
        check_multipliers(config)
    if config.distillation.teacher:
        check_teacher(config.distillation.teacher)
    with stopping() as stop, full_disk(workdir), making_workdir(workdir), only_run(workdir):
        weights = None
        if saved is None and config.init_from:
            config, weights = read_weights(config)
        config = take_from_weights(config, prediction_defaults(config.model.architecture))
        saved_names = (saved or {}).get("class_names")
        prepared = prepare(config, workdir, saved_names, goes_on=saved is not None)
        check_same_teacher(prepared.teacher, (saved or {}).get("teacher"), workdir)
        check_steps(traced, prepared.total_steps)
        pictures = Pictures(prepared)
        if is_longer(prepared, before, (saved or {}).get("progress", {})):
            reopen(workdir)
        elif finished.exists():  # The same number of steps in other words.
            return _read_finished(finished)
        store = CheckpointStore(workdir, keep=config.keep_checkpoints, report=say)
        with contextlib.closing(store):
            if jax.process_index() == 0:
                write_json(workdir / "config.json", to_dict(config))
                if saved is None:
                    holdout.record(prepared.train_source.partition, workdir)
            state, progress = _start(prepared, store, weights)
            del weights  # They need not stay in memory while the run goes.
            final = _finish(prepared, state, progress, store, stop, track, traced, pictures)
        if jax.process_index() == 0:
            write_json(finished, final)
    return final


def _read_finished(path: pathlib.Path) -> dict[str, Any]:
    say(f"{path.parent} holds a finished run: nothing to do")
    return json.loads(path.read_text())


def resumable_changes(config: dict[str, Any]) -> set[str]:
    """The keys in which a run may differ from an earlier part of itself, with all below them.

    It alters neither a parameter nor what is measured.

    Args:
        config: of the run, nested.
    """
    may_change = RESUMABLE_CHANGES | {f"evals.{name}.data_dir" for name in config["evals"]}
    if not parse_augment(config["augment"]).num_operations:
        may_change.add("augment_contrast")  # Without RandAugment nothing depends on it.
    return may_change


def _refuse_another_run(config: ConfigDict, workdir: pathlib.Path, saved: dict[str, Any]) -> None:
    watching = {*config.evals, *saved.get("evals", {})} - {DECIDING}
    may_change = resumable_changes(to_dict(config)) | {f"evals.{name}" for name in watching}
    may_change.add("duration")  # Only the data set tells how long it is, see `is_longer`.
    differences = config_differences(saved, to_dict(config), may_change)
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differences)}): "
            "choose another --workdir, or change these back"
        )


def _start(
    prepared: Prepared, store: CheckpointStore, weights: Weights | None
) -> tuple[TrainState, Progress]:
    """The state to begin with: restored, or fresh with the weights of init_from if given."""
    config = prepared.config
    init = state_initializer(config, prepared.model, prepared.optimizer)
    abstract = abstract_state(init, prepared.mesh)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
    say(
        f"{parameters:,} parameters, {prepared.train_source.num_examples:,} training images, "
        f"{prepared.total_steps:,} steps of {config.batch_size:,} on {prepared.mesh.size} "
        f"{jax.devices()[0].device_kind} device(s)"
    )
    if jax.default_backend() == "cpu" and config.model.dtype != "float32":
        say(f"a CPU is slow in {config.model.dtype}: it takes --config.model.dtype=float32 faster")
    restored = store.restore(abstract)
    if restored is not None:
        state, metadata = restored
        say(f"continuing from step {int(state.step)} in {prepared.workdir}")
        return state, Progress(**metadata["progress"])
    return initial_state(prepared, abstract, weights), Progress()


class Run(NamedTuple):
    """The inputs of the training loop.

    Attributes:
        prepared: all that is fixed.
        step: the compiled training step.
        batches: on the devices, from the first one that is due.
        reporter: takes what is found.
        metadata: saved beside the state.
        store: of the checkpoints.
        stop: by a signal.
        profile: what is traced.
        pictures: that the config asks for.
    """

    prepared: Prepared
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    batches: Iterator[Batch]
    reporter: Reporter
    metadata: dict[str, Any]
    store: CheckpointStore
    stop: Stop
    profile: Profile
    pictures: Pictures


def _finish(
    prepared: Prepared,
    state: TrainState,
    progress: Progress,
    store: CheckpointStore,
    stop: Stop,
    track: Track,
    traced: range,
    pictures: Pictures,
) -> dict[str, Any]:
    """Takes the steps that are left; returns what metrics.json is to hold."""
    config, step = prepared.config, int(state.step)
    profile = Profile(traced, prepared.workdir / "profile", step)
    say("compiling the training step")  # Of a large model this takes minutes.
    begin = time.perf_counter()
    train_step = compile_train_step(prepared, state)
    say(f"compiled in {time.perf_counter() - begin:.1f} s")
    cost = Cost(config.batch_size, prepared.mesh.size, flops.train_flops(prepared.multiply_adds))
    reporter = Reporter(
        prepared.workdir,
        step,
        prepared.total_steps,
        progress,
        cost,
        prepared.schedule,
        track,
        to_dict(config),
    )
    with contextlib.closing(reporter), stop.held(), contextlib.closing(profile):
        run = Run(
            prepared=prepared,
            step=train_step,
            batches=to_devices(train_batches(prepared, step), prepared.mesh),
            reporter=reporter,
            metadata={
                "config": to_dict(config),
                "class_names": prepared.class_names or prepared.mask_names or prepared.box_names,
                "multi_label": prepared.multi_label,
                "input": INPUT_VERSION,
                "teacher": prepared.teacher and prepared.teacher.fingerprint,
            },
            store=store,
            stop=stop,
            profile=profile,
            pictures=pictures,
        )
        step = _loop(run, state, progress)
        store.wait()
    _say_best(prepared, progress)
    final = {**progress.evaluation, "best": progress.best}
    if config.patience:
        final["stopped_early"] = step < prepared.total_steps
    return final


def _say_best(prepared: Prepared, progress: Progress) -> None:
    if not (best := progress.best):  # No evaluation was finite.
        return
    name = deciding_scalar(best)
    directory = prepared.workdir / "best" / str(best["step"])
    say(f"best: {name} {best[name]:.4f} at step {best['step']}, whose weights are in {directory}")


def _loop(run: Run, state: TrainState, progress: Progress) -> int:
    """Trains until the last step or until patience is over; returns the step it came to."""
    total_steps, patience = run.prepared.total_steps, run.prepared.config.patience
    step = int(state.step)
    if progress.owed:  # The run was ended before they were made.
        with run.reporter.paused():
            _evaluate(run, step, state, progress)
    first = step
    while step < total_steps and not progress.is_out_of_patience(patience):
        with _keeping(run, step, state, functools.partial(_present_metadata, run, progress)):
            batch = next(run.batches)
        if step == first:  # Before the step takes the memory of the state.
            with run.reporter.paused():
                pictures = run.pictures.inputs(state.rng, step, batch)
                run.reporter.show(step + 1, pictures)
        run.profile.begin(step + 1, state)
        state, metrics = run.step(state, batch)
        step += 1
        run.profile.end(step, metrics)
        due = _due(run, step, run.stop.is_due(step))
        with _stopping_at_bad_loss(run.store):
            run.reporter.add(step, metrics)
            if due.log:
                run.reporter.log(step)
            if due.evaluators or due.checkpoint:
                run.reporter.update(progress)
        with run.reporter.paused():
            progress.owed = [evaluator.name for evaluator in due.evaluators]
            if due.checkpoint:  # First: whatever evaluation does costs nothing.
                run.store.save(step, state, _metadata(run, progress))
            if due.stop:
                _leave(run, step)
            if progress.owed:
                _evaluate(run, step, state, progress)
    return step


def _leave(run: Run, step: int) -> NoReturn:
    run.store.wait()
    run.stop.leave(f"saved step {step}; the same command continues from there")


class Due(NamedTuple):
    """The actions that are due after a step.

    Attributes:
        log: a line of the training metrics.
        evaluators: what is evaluated.
        checkpoint: the state is saved.
        stop: a signal ends the run.
    """

    log: bool
    evaluators: list[Evaluator]
    checkpoint: bool
    stop: bool


def _due(run: Run, step: int, stop: bool) -> Due:
    prepared = run.prepared
    last = step == prepared.total_steps

    def is_due(every: int) -> bool:
        return last or (every > 0 and step % every == 0)

    return Due(
        log=is_due(prepared.log_every),
        evaluators=[x for x in prepared.evaluators if is_due(x.every)],
        checkpoint=is_due(prepared.checkpoint_every) or stop,
        stop=stop,
    )


def _evaluate(run: Run, step: int, state: TrainState, progress: Progress) -> None:
    """Makes the evaluations that are owed, and where the run ends here by patience all others.

    The deciding evaluator comes first. All are owed until all have been made.
    """
    patience, last = run.prepared.config.patience, step == run.prepared.total_steps
    metadata = _metadata(run, progress)
    ended = False
    params = merge(state.eval_params, run.prepared.config.lora.alpha)
    for evaluator in run.prepared.evaluators:
        if not (ended or evaluator.name in progress.owed):
            continue
        with _keeping(run, step, state, lambda: metadata), run.stop.at_once():
            found = evaluator.run(params)
            pictures = run.pictures.evaluated(params) if evaluator.name == DECIDING else []
        scalars = {name: np.asarray(x).item() for name, x in found.items()}  # JSON takes these.
        run.reporter.evaluated(step, evaluator, scalars)
        run.reporter.show(step, pictures)
        if evaluator.name != DECIDING:
            continue
        if progress.record(step, scalars):
            run.store.save_best(step, state, _metadata(run, progress))
        elif progress.is_out_of_patience(patience) and not last:
            ended = True
            best = progress.best["step"]
            run.reporter.say(
                step,
                f"stopped: {patience} evaluations without one better than that of step {best}",
            )
    progress.owed = []
    if ended:
        run.store.save(step, state, _metadata(run, progress))


def _metadata(run: Run, progress: Progress) -> dict[str, Any]:
    return {**run.metadata, "progress": dataclasses.asdict(progress)}


def _present_metadata(run: Run, progress: Progress) -> dict[str, Any]:
    with _stopping_at_bad_loss(run.store):
        run.reporter.update(progress)
    return _metadata(run, progress)


@contextlib.contextmanager
def _keeping(
    run: Run, step: int, state: TrainState, metadata: Callable[[], dict[str, Any]]
) -> Generator[None]:
    """Saves the state where reading images or an evaluation fails, or is left by a signal.

    Args:
        run: whose processes must all come here to save: where there are several none does.
        step: of the state.
        state: to save.
        metadata: of the run at this step.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        stopped = run.stop.has_come()
        if jax.process_count() > 1 or (isinstance(error, KeyboardInterrupt) and not stopped):
            raise
        run.store.save(step, state, metadata())
        if stopped:  # A worker that the same signal has ended is an error here.
            _leave(run, step)
        run.store.wait()
        if isinstance(error, UserError):
            raise UserError(
                f"{error}; step {step} is saved, and the same command continues from there"
            ) from error
        raise


@contextlib.contextmanager
def _stopping_at_bad_loss(store: CheckpointStore) -> Generator[None]:
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
