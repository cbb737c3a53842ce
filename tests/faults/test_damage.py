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


def damage(checkpoint, name, way, other):
    """Damages a file; of OCDBT's, whose names are random, the one most like it is the same."""
    path, near = checkpoint / name, (other / name).parent
    data = path.read_bytes()
    same = [other / name] if (other / name).exists() else [p for p in near.iterdir() if p.is_file()]
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
    for path in chance.sample(sound, 4 if LONG else 1):
        workdir = tmp_path / "run"
        copy_run(reference, steps, workdir)
        name = path.relative_to(reference.workdir / kind / str(step))
        other = workdir / "checkpoints" / str(steps[0])
        damage(workdir / kind / str(step), name, way, other)
        train(config, workdir)
        aside = f"checkpoint {step} is damaged" in capsys.readouterr().out
        harness.assert_finished_alike(workdir, reference, rf"checkpoints/damaged-{LAST}")
        shown = name if len(name.name) < 30 else name.with_name("…")
        told = "set aside" if aside else "rewritten" if kind == "best" else "not needed"
        row(f"file {way}", f"{kind}/{step}/{shown}", f"{told}, bit-identical")
        shutil.rmtree(workdir)
