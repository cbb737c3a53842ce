"""An array script of Slurm for the runs of experiments: each element does one part of them."""

import pathlib
import shlex
from collections.abc import Sequence

from vit_jax.files import atomic_write

_SCRIPT = """\
#!/bin/bash
# Submit with: sbatch {file}
# Whatever has been stopped goes on when it is submitted again; what is finished is not run twice.

# An element for each of {shards} parts. What needs the run of another part waits for it: leave none
# out. "%N" after the range lets N run at a time, the first ones first.
#SBATCH --array=0-{last}
#SBATCH --job-name={name}
# What each element prints; "append" keeps it when an element starts again.
#SBATCH --output="{logs}/slurm-%A_%a.log"
#SBATCH --open-mode=append
# SIGTERM comes two minutes before the time is up, to Python itself: the run saves its state.
#SBATCH --signal=B:TERM@120
# An element whose node fails or is taken away starts again, and goes on.
#SBATCH --requeue
# What one run needs, and how long an element may take: as your cluster has it. --gpus N is the
# number of GPUs, all of which work on one run.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-task={gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00

cd {directory} || exit
# exec: this shell would keep the signal to itself.
exec {command} --shard "$SLURM_ARRAY_TASK_ID/{shards}"
"""


def write(
    file: pathlib.Path,
    name: str,
    command: Sequence[str],
    shards: int,
    folder: pathlib.Path,
    gpus: int = 1,
) -> None:
    """Writes the script.

    Args:
        file: of the script.
        name: of the job.
        command: that does all, to which each element adds its `--shard`.
        shards: the number of parts.
        folder: takes what the elements print. It must be there when the script is submitted.
        gpus: of each element.

    Raises:
        UserError: the file cannot be written.
    """
    text = _SCRIPT.format(
        file=shlex.quote(str(file)),
        name=name,
        shards=shards,
        last=shards - 1,
        gpus=gpus,
        logs=folder.absolute(),
        directory=shlex.quote(str(pathlib.Path.cwd())),
        command=shlex.join(command),
    )
    with atomic_write(file) as temporary:
        temporary.write_text(text)
