"""Several processes of one run: how they find each other, and end together."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Mapping

from vit_jax import command
from vit_jax.errors import UserError
from vit_jax.signals import Stopped

AUTO = "auto"
# From the last word of a process that has died until the others are ended; JAX's default is 100.
HEARTBEAT_SECONDS = 40
# Until JAX has also told the others, and where a signal has come too late.
_GRACE_SECONDS = 20
# What the communication libraries say when a peer has gone.
_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|[Cc]onnection (reset|closed|refused)|[Ss]ocket closed")


def launcher(environment: Mapping[str, str]) -> str | None:
    """The launcher by which this is one process of several, None if none has started more.

    Args:
        environment: its variables. A Slurm allocation without srun, or one process, is none.
    """

    def several(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    if several("SLURM_NTASKS") and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return "Slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "Kubernetes"
    return None


def check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises a UserError for flags of which some lack, or that contradict each other."""
    if coordinator == AUTO:
        if (num_processes, process_id) != (None, None):
            raise UserError(
                "--coordinator auto finds the number and the process itself: give no "
                "--num_processes and --process_id, or a coordinator of HOST:PORT"
            )
        return
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if (coordinator, num_processes, process_id) == (None, 1, None) or not any(given):
        return
    if not all(given):
        raise UserError(
            "--coordinator, --num_processes and --process_id go together: give all three, or none "
            "under Slurm, Open MPI and Kubernetes, where the processes find each other"
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator {coordinator!r} has no port: give HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id {process_id} is not from 0 to {num_processes - 1}, the last of "
            f"--num_processes {num_processes}"
        )


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, workdir: str
) -> None:
    """Connects this process with the others of its run, if there are others.

    Args:
        coordinator: HOST:PORT of process 0; "auto" lets JAX find it; None does so as well where a
            launcher has started several processes, and else is a run of one.
        num_processes: how many there are; 1 is a run of one whatever has started it.
        process_id: which this is.
        workdir: of the run, in which the last saved step is looked up when another process dies.

    Raises:
        UserError: the launcher is known, but what JAX needs to ask it is not installed.
    """
    found = launcher(os.environ) if num_processes is None else None
    if coordinator is None and found is None:
        return
    if found == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "Kubernetes has started this process, and JAX finds the others by its API: pip install "
            "'jax[k8s]', or give --coordinator, --num_processes and --process_id, or "
            "--num_processes 1"
        )
    import jax

    _tell_why_it_ends(workdir)
    if coordinator in (None, AUTO):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(
                f"JAX does not find the other processes ({error}): give --coordinator, "
                "--num_processes and --process_id"
            ) from error
    else:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


def _tell_why_it_ends(workdir: str) -> None:
    """Sends stderr through `last_words`: JAX aborts a process in many lines, not by an error."""
    reader = subprocess.Popen(
        [sys.executable, "-m", "vit_jax.last_words", workdir],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), sys.stderr.fileno())
    reader.stdin.close()


@contextlib.contextmanager
def ending_together() -> Generator[None]:
    """Ends this process at once when it fails, so that the others end as well.

    Python would wait at its exit for the others to come to theirs, while they wait for this one.
    """
    import jax

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        if _LOST.search(str(error)) and not isinstance(error, UserError):
            # It is another that has gone: JAX soon knows which, and ends this one.
            time.sleep(HEARTBEAT_SECONDS + _GRACE_SECONDS)
        code = 130
        if isinstance(error, UserError):
            command.report(error)
            code = 2
        elif isinstance(error, Exception):
            traceback.print_exc()
            code = 1
        elif not isinstance(error, Stopped):
            print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
