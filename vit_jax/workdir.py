"""The directory that a run writes to."""

import contextlib
import errno
import pathlib
from collections.abc import Generator

import jax

from vit_jax.files import storage_errors


@contextlib.contextmanager
def making_workdir(workdir: pathlib.Path) -> Generator[None]:
    """Makes the directory, if it is not there; what an error leaves empty of it is removed.

    Raises:
        UserError: it cannot be written.
    """
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    try:
        _make(workdir)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # What is not empty stays.
            for path in made:
                path.rmdir()
        raise


def _make(workdir: pathlib.Path) -> None:
    probe = workdir / f".writable-{jax.process_index()}"
    with storage_errors(
        lambda reason: f"workdir {workdir} is not writable ({reason}): choose another --workdir"
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def full_disk(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Turns the error of a disk that takes no more into a UserError with the way out."""
    return storage_errors(
        lambda reason: (
            f"{workdir} cannot be written: {reason}; free space and run the same command again, it "
            "continues from the last checkpoint"
        ),
        errnos=(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    )
