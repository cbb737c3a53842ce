"""The directory that a run writes to."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Generator

import jax

from vit_jax.errors import UserError


def make_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the directory, if it is not there, and returns its absolute path.

    Raises:
        UserError: it cannot be written.
    """
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


@contextlib.contextmanager
def full_disk(workdir: pathlib.Path) -> Generator[None]:
    """Turns the error of a disk that takes no more into a UserError with the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise UserError(
            f"{workdir} cannot be written: {error.strerror}; free space and run the same command "
            "again, it continues from the last checkpoint"
        ) from error
