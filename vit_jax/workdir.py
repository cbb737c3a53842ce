"""The directory that a run writes to."""

import contextlib
import errno
import os
import pathlib

import jax

from vit_jax.files import storage_errors


def make_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the directory, if it is not there, and returns its absolute path.

    Raises:
        UserError: it cannot be written.
    """
    workdir = pathlib.Path(workdir).absolute()
    probe = workdir / f".writable-{jax.process_index()}"
    with storage_errors(
        lambda reason: f"workdir {workdir} is not writable ({reason}): choose another --workdir"
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    return workdir


def full_disk(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Turns the error of a disk that takes no more into a UserError with the way out."""
    return storage_errors(
        lambda reason: (
            f"{workdir} cannot be written: {reason}; free space and run the same command again, it "
            "continues from the last checkpoint"
        ),
        errnos=(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    )
