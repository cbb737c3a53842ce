"""A run's own checkpoints: saved in the background, committed atomically, verified when read."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from vit_jax.checkpoints.integrity import (
    DamagedError,
    item_handlers,
    items,
    mapping_differences,
    read_document,
    read_state,
)
from vit_jax.errors import UserError, first_line, shortlist

_STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
)


class CheckpointStore:
    """The newest checkpoints of a run, `checkpoints/<step>`, and its best one, `best/<step>`.

    Every process of the run makes the same calls. A save returns as soon as the arrays have left
    the devices, so the state may be donated; an error of the background write is raised by the
    next call. What a killed run left half-written is removed when the store is opened.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep: int,
        report: Callable[[str], None] = logging.warning,
    ) -> None:
        """Opens or creates the store.

        Args:
            workdir: of the run, on a file system that all its processes share.
            keep: how many of the newest checkpoints are kept.
            report: receives one line for every damaged checkpoint that is passed over.

        Raises:
            UserError: the directories cannot be written.
        """
        self._report = report
        self._keep = keep
        self._newest_dir = Path(workdir).absolute() / "checkpoints"
        self._best_dir = Path(workdir).absolute() / "best"
        self._opened: dict[Path, os.stat_result] = {}
        with self._storage_errors():
            self._newest = _manager(self._newest_dir, keep)
            self._best = _manager(self._best_dir, keep=1)
        self._opened = {path: path.stat() for path in (self._newest_dir, self._best_dir)}

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Saves `state`, a tree of arrays, with JSON-like `metadata`; a step already saved stays.

        Raises:
            UserError: this save, or the one before in the background, could not be written.
        """
        self._save(self._newest, self._newest_dir, step, state, metadata)

    def save_best(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Saves in the same way as the best checkpoint, in place of the best before it.

        One of the same step is replaced: nobody has looked whether it is intact.
        """
        self.wait()
        self._remove(self._best, self._best_dir, {step}.intersection(saved_steps(self._best_dir)))
        self._save(self._best, self._best_dir, step, state, metadata)

    def _save(
        self,
        manager: ocp.CheckpointManager,
        directory: Path,
        step: int,
        state: Any,
        metadata: dict[str, Any],
    ) -> None:
        # One save at a time: two managers at work can mix up the barriers of their processes.
        self.wait()
        with self._storage_errors():
            if step not in saved_steps(directory):
                manager.save(step, args=items(state, metadata), force=True)

    def latest_step(self) -> int | None:
        """The newest committed step, None if there is none."""
        return next(iter(saved_steps(self._newest_dir)), None)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest intact checkpoint.

        Damaged ones before it are reported and renamed to `damaged-<step>`, so that the run can
        save these steps again.

        Args:
            abstract_state: the tree of `jax.ShapeDtypeStruct` with the shardings wanted now.

        Returns:
            The state, whose arrays are safe to donate, and the metadata; None without checkpoints.

        Raises:
            UserError: the newest intact checkpoint is of another tree, or none is intact.
        """
        damaged: dict[int, DamagedError] = {}
        for step in saved_steps(self._newest_dir):
            try:
                restored = read_state(self._newest_dir / str(step), abstract_state)
            except DamagedError as error:
                damaged[step] = error
                continue
            self._set_aside(damaged, step)
            self._prune()
            return restored
        if damaged:
            reasons = shortlist([f"step {step}: {error}" for step, error in damaged.items()])
            raise UserError(
                f"no checkpoint in {self._newest_dir} is intact ({reasons}): "
                "choose another --workdir"
            )
        return None

    def wait(self) -> None:
        """Blocks until all saves are committed.

        Raises:
            UserError: one of them could not be written; the checkpoints before it are intact.
        """
        with self._storage_errors():
            self._newest.wait_until_finished()
            self._best.wait_until_finished()

    def close(self) -> None:
        """Waits like `wait`, with its errors, and releases the threads."""
        with self._storage_errors(), contextlib.ExitStack() as stack:
            stack.callback(self._newest.close)
            stack.callback(self._best.close)

    def _set_aside(self, damaged: dict[int, DamagedError], used: int) -> None:
        for step, error in damaged.items():
            aside = self._newest_dir / f"damaged-{step}"
            with self._storage_errors():
                if jax.process_index() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    (self._newest_dir / str(step)).rename(aside)
            self._report(
                f"checkpoint {step} is damaged ({error}): moved to {aside}, using step {used}"
            )
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._newest.reload()

    def _prune(self) -> None:
        """Removes what a run that was killed in its last save had no time to remove."""
        self._remove(self._newest, self._newest_dir, saved_steps(self._newest_dir)[self._keep :])

    def _remove(
        self, manager: ocp.CheckpointManager, directory: Path, steps: Iterable[int]
    ) -> None:
        # All processes meet here, whether or not their listings of the directory agree.
        multihost_utils.sync_global_devices("checkpoints are to be removed")
        with self._storage_errors():
            if jax.process_index() == 0:
                for step in steps:
                    shutil.rmtree(directory / str(step))
        multihost_utils.sync_global_devices("checkpoints are removed")
        manager.reload()

    @contextlib.contextmanager
    def _storage_errors(self) -> Generator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore wrap the OSError in classes of theirs
            problem = _storage_problem(error)
            if problem is None:
                if not (gone := [str(path) for path in self._opened if not self._is_there(path)]):
                    raise
                raise UserError(
                    f"checkpoints cannot be written ({first_line(error)}): no longer there is "
                    f"{' or '.join(gone)}; bring it back and run the same command again"
                ) from error
            good = self.latest_step()
            raise UserError(
                f"cannot write checkpoints to {self._newest_dir.parent}: {problem}; free space or "
                "choose another --workdir ("
                + ("none is saved yet)" if good is None else f"the last good one is step {good})")
            ) from error

    def _is_there(self, directory: Path) -> bool:
        """Tells whether a directory is the one that was opened: a write may make another anew."""
        try:
            return os.path.samestat(directory.stat(), self._opened[directory])
        except OSError:
            return False


def saved_steps(directory: Path) -> list[int]:
    """The committed steps in a directory of checkpoints, the newest first."""
    return sorted((int(p.name) for p in directory.glob("*") if p.name.isdecimal()), reverse=True)


def latest_metadata(workdir: Path) -> dict[str, Any] | None:
    """The newest intact metadata of a run, None if there is none; no folder need be there."""
    newest_dir = workdir / "checkpoints"
    for step in saved_steps(newest_dir):
        with contextlib.suppress(DamagedError):
            return read_document(newest_dir / str(step))["metadata"]
    return None


def config_differences(
    saved: dict[str, Any], current: dict[str, Any], ignore: Iterable[str] = ()
) -> list[str]:
    """Lists what differs between two configs: `schedule.base_lr: 0.03 in the checkpoint, 0.01 now`.

    Args:
        saved: the nested config of a checkpoint, as it came out of JSON.
        current: the nested config of this run; tuples equal lists.
        ignore: dotted names that may differ, together with all below them.
    """
    ignored = tuple(f"{name}." for name in ignore)

    def flat(config: dict[str, Any]) -> dict[str, Any]:
        values = flatten_dict(json.loads(json.dumps(config)), keep_empty_nodes=True)
        named = {".".join(path): value for path, value in values.items()}
        return {name: x for name, x in named.items() if not f"{name}.".startswith(ignored)}

    return mapping_differences(flat(saved), flat(current))


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    directory.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(
        directory,
        item_handlers=item_handlers(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
    )


def _storage_problem(error: Exception) -> str | None:
    number = getattr(error, "errno", None)
    for code in _STORAGE_ERRORS:
        if number == code or os.strerror(code) in str(error):
            return os.strerror(code).lower()
    return None
