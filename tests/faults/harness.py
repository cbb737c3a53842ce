"""The run that is attacked, the faults that strike it, and what must hold afterwards."""

import ctypes
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vit_jax.checkpoints.integrity import read_document
from vit_jax.config import to_dict
from vit_jax.recipes import get_config

from ..runs import assert_same_run, checkpoint_steps, read_arrays

# The long schedule is that of `make faults`; the short one, a part of it, that of CI.
LONG = os.environ.get("FAULTS") == "long"
SEED = int(os.environ.get("FAULTS_SEED") or 0)
ROOT = Path(__file__).parents[2]
LIBC = ctypes.CDLL(None)  # Before a fork, in which the loader's lock may be held.
HOOK = Path(__file__).parent / "hook"
STEPS, CHECKPOINT_EVERY, KEEP = 24, 4, 2
# What a run leaves, besides checkpoints/ and best/.
FINAL_NAMES = r"config\.json|metrics\.jsonl?|events\.out\.tfevents\.\S+"
DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24  # linux/capability.h, linux/prctl.h


def some(options, count=1):
    """All in the long schedule, else as many as are asked for."""
    options = sorted(options)
    return options if LONG else random.Random(f"{SEED} {options}").sample(options, count)


class Fault(NamedTuple):
    """What strikes a process, and when: see `hook/sitecustomize.py`.

    Attributes:
        kind: of the call: "line", "read", "write", "rename", "mkdir", "rmtree", "import".
        pattern: is searched in the line, path or module.
        nth: of the calls that match.
        do: a method of `Striker`, with its `target` and `amount`.
        target: likewise.
        amount: likewise.
    """

    kind: str
    pattern: str
    nth: int = 1
    do: str = "kill"
    target: str = "KILL"
    amount: float = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    struck: bool

    @property
    def text(self):
        return f"exit code {self.code}, struck: {self.struck}\n{self.stdout}\n{self.stderr}"


class Command:
    """`vit_jax train`, as a process of its own.

    Args:
        config: path of its JSON.
        workdir: of the run.
        scratch: takes what the harness notes, outside of what the run writes.
        fault: that strikes it.
        flags: further ones.
    """

    def __init__(self, config, workdir, scratch, fault=None, flags=()):
        self.mark = scratch / "struck"
        self.mark.unlink(missing_ok=True)
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        environment.pop("XLA_FLAGS", None)
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(ROOT)])
        if fault is not None:
            environment["VIT_JAX_FAULT"] = json.dumps({**fault._asdict(), "mark": str(self.mark)})
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vit_jax", "train", "--config", str(config)),
                *("--workdir", str(workdir), *flags),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=_obey_modes,
        )

    def wait_until_struck(self, seconds=120):
        deadline = time.monotonic() + seconds
        while not self.mark.exists():
            assert self.process.poll() is None, self.end().text
            assert time.monotonic() < deadline, "the moment has not come"
            time.sleep(0.02)

    def end(self, seconds=180):
        try:
            stdout, stderr = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            stdout, stderr = self.process.communicate()
            stderr += f"\nkilled by the harness: not at its end after {seconds} s"
        return Outcome(self.process.returncode, stdout, stderr, self.mark.exists())


def _obey_modes():
    """Has root obey the modes of files as everybody does; others have nothing to lose."""
    LIBC.prctl(PR_CAPBSET_DROP, DAC_OVERRIDE, 0, 0, 0)


def write_images(folder):
    """Draws a data set of four classes: 48 images to train on, 16 to test, 8 to watch."""
    noise = np.random.default_rng(0)
    means = noise.integers(60, 196, (4, 8, 8, 3))
    for split, count in (("data/train", 12), ("data/test", 4), ("watched/test", 2)):
        for label, mean in enumerate(means):
            directory = folder / split / str(label)
            directory.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(mean + noise.normal(0, 60, mean.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(directory / f"{index}.png")


def make_config(folder):
    """A run of 24 steps: an epoch is six, every second is logged, every fourth saved."""
    config = get_config("ViT-Ti/4", f"pretrain,folder:{folder / 'data'}")
    config.update_from_flattened_dict(
        {
            "batch_size": 8,
            "duration": f"{STEPS} steps",
            "ema_decay": 0.9,
            "log_every": "2 steps",
            "checkpoint_every": f"{CHECKPOINT_EVERY} steps",
            "keep_checkpoints": KEEP,
            "dataset.image_size": 8,
            "dataset.protocol": "pad",
            "model.hidden_size": 32,
            "model.num_layers": 2,
            "model.mlp_dim": 64,
            "model.num_heads": 2,
            "model.representation_size": 0,
            "model.dropout_rate": 0.1,
            "model.dtype": "float32",
            "schedule.base_lr": 1e-2,
            "schedule.warmup": "2 steps",
        }
    )
    config.evals.val.every = "6 steps"
    config.evals.watched = {
        "type": "objective",
        "dataset": f"folder:{folder / 'watched'}",
        "every": "8 steps",
    }
    return config


def write_config(config, path, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    path.write_text(json.dumps(to_dict(config)))
    return path


class Reference:
    """The run that nothing has disturbed, with every step saved."""

    def __init__(self, workdir):
        self.workdir = workdir
        self._arrays = {}

    def arrays(self, step):
        if step not in self._arrays:
            self._arrays[step] = read_arrays(self.workdir, step)
        return self._arrays[step]


def assert_nothing_half_written(workdir, reference):
    """What has its final name is whole: documents, and the arrays of every checkpoint."""
    for name in ("config.json", "metrics.json"):
        if (workdir / name).exists():
            json.loads((workdir / name).read_text())
    if (workdir / "metrics.jsonl").exists():
        *whole, _ = (workdir / "metrics.jsonl").read_text().split("\n")
        for line in whole:
            json.loads(line)
    for step in checkpoint_steps(workdir):
        read_document(workdir / "checkpoints" / str(step))
        assert_same_arrays(read_arrays(workdir, step), reference.arrays(step))


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name


def assert_finished_alike(workdir, reference, may_hold=""):
    """The run has ended with the bits of the reference, and holds no file beyond those it should.

    Args:
        workdir: of the run.
        reference: the undisturbed one.
        may_hold: a pattern of what the fault at hand leaves on purpose, `damaged-8` for example.
    """
    assert_same_run(reference.workdir, workdir, STEPS)
    best = json.loads((workdir / "metrics.json").read_text())["best"]["step"]
    assert_same_arrays(read_arrays(workdir, best, "best"), reference.arrays(best))
    steps = sorted(checkpoint_steps(workdir))
    assert len(steps) == KEEP and steps[-1] == STEPS, steps
    for step in steps:  # One may have been saved at a signal.
        assert_same_arrays(read_arrays(workdir, step), reference.arrays(step))
    known = {f"checkpoints/{step}" for step in steps} | {f"best/{best}"}
    strays = [
        name
        for name in _top_names(workdir)
        if name not in known and not re.fullmatch(f"{FINAL_NAMES}|{may_hold}", name)
    ]
    assert not strays, f"stray files: {strays}"
    last = reference.workdir / "checkpoints" / str(STEPS)
    for step in steps:
        assert _shape(workdir / "checkpoints" / str(step)) <= _shape(last)


def _top_names(workdir):
    """What lies in the workdir, and in checkpoints/ and best/ one level deeper."""
    for path in sorted(workdir.iterdir()):
        if path.name in ("checkpoints", "best"):
            yield from (f"{path.name}/{inner.name}" for inner in sorted(path.iterdir()))
        else:
            yield path.name


def _shape(checkpoint):
    """The files of a checkpoint; those of OCDBT are named by random numbers."""
    names = (str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*"))
    return {re.sub("[0-9a-f]{32}", "N", name) for name in names}


def assert_refused(outcome):
    """Exit code 2 and one line, which is returned."""
    assert outcome.code == 2, outcome.text
    assert outcome.stderr.count("\n") == 1, outcome.text
    line = outcome.stderr.strip()
    assert line.startswith("error: "), outcome.text
    return line.removeprefix("error: ")


def assert_ended_by(outcome, name, workdir):
    """How a process may end after a signal: by it, having saved, or because it was at its end."""
    assert "Traceback" not in outcome.text, outcome.text
    if outcome.code == 0:
        assert (workdir / "metrics.json").exists(), outcome.text
        return "was at its end"
    number = signal.Signals[f"SIG{name}"]
    if name == "KILL":
        assert outcome.code == -number, outcome.text
        return "killed"
    # Before it listens the signal itself ends it.
    assert outcome.code in (128 + number, -number), outcome.text
    assert len(outcome.stderr.splitlines()) <= 1, outcome.text
    return "saved and ended" if "saved step" in outcome.stdout else "ended"
