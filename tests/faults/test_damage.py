"""Each file of a checkpoint damaged in each way: passed over, and the run ends with its bits."""

import shutil

import pytest

from vit_jax.train import train

from . import harness
from .harness import CHECKPOINT_EVERY, LONG, some

LAST = harness.STEPS


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# From what a file holds, and the same one of another checkpoint, to what it holds then.
WAYS = {
    "deleted": lambda data, other: None,
    "cut": lambda data, other: data[: len(data) // 2],
    "emptied": lambda data, other: b"",
    "bit flipped": lambda data, other: flip(data),
    "swapped": lambda data, other: other,
}


def damage(path, way, other):
    """Damages a file; of OCDBT's, whose names are random, the one most like it is the same."""
    near = [p for p in files(other) if p.parent.name == path.parent.name]
    same = [p for p in near if p.name == path.name] or near
    data = path.read_bytes()
    twin = min(same, key=lambda p: abs(p.stat().st_size - len(data)))
    left = WAYS[way](data, twin.read_bytes())
    path.unlink()
    if left is not None:
        path.write_bytes(left)


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def copy_run(reference, steps, workdir):
    """What the reference would have left at the last of these steps."""
    ignore = shutil.ignore_patterns("metrics.json", "checkpoints")
    shutil.copytree(reference.workdir, workdir, ignore=ignore)
    for step in steps:
        where = f"checkpoints/{step}"
        shutil.copytree(reference.workdir / where, workdir / where)


@pytest.mark.parametrize("way", some(WAYS, 2))
@pytest.mark.parametrize("kind", ["checkpoints", "best"])
def test_a_damaged_file_is_passed_over(kind, way, reference, chance, config, row, tmp_path, capsys):
    step, steps = LAST, (LAST - CHECKPOINT_EVERY, LAST)
    if kind == "best":  # The run will come to its step again.
        (step,) = (int(path.name) for path in (reference.workdir / "best").iterdir())
        steps = (step - 2, step - 1)
    sound = files(reference.workdir / kind / str(step))
    for index in range(len(sound)) if LONG else [chance.randrange(len(sound))]:
        workdir = tmp_path / str(index)
        copy_run(reference, steps, workdir)
        where = sound[index].relative_to(reference.workdir)
        damage(workdir / where, way, other=workdir / "checkpoints" / str(steps[0]))
        train(config, workdir)
        aside = f"checkpoint {step} is damaged" in capsys.readouterr().out
        harness.assert_finished_alike(workdir, reference, rf"checkpoints/damaged-{LAST}")
        name = where.name if len(where.name) < 30 else "…"
        told = "set aside" if aside else "rewritten" if kind == "best" else "not needed"
        row(f"file {way}", str(where.with_name(name)), f"{told}, bit-identical")
        shutil.rmtree(workdir)
