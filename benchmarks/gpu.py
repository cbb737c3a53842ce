"""Everything that is to be measured on a GPU, in one go and in bounded time.

    python benchmarks/gpu.py --output results --seconds 540

It needs JAX, Flax, Optax, NumPy and, for the peers, PyTorch and timm: nothing else that this
project installs. The parts are processes of their own, so that one that fails or runs out of memory
takes nothing else with it. They load, compile and check side by side, of which most is done by the
processor; then they are timed one after the other, in the order of what matters most:

    train_b     training ViT-B/16 with 256 images, 16 bits, remat=nothing, beside timm's, eager and
                compiled
    infer_b     the logits of ViT-B/16, likewise, and of the official style
    train_h     training ViT-H/14 with 64 images, as ViT-B/16, ours alone
    train_l     training ViT-L/16 with 128 images, likewise
    dots_b      training ViT-B/16 with the default policy, remat=dots, ours alone
    triton_b    as train_b, but with XLA's own choice of kernels for products
    correct     4 layers of ViT-B/16 in 32 bits: losses, gradients, an update; official and timm

Each writes its JSON and what it said to the folder as soon as it ends, and gpu.md the tables of all
so far. With --trial everything is tiny, to try the script where there is no GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import turns

BENCHMARKS = Path(__file__).parent
TRIAL = ["ViT-2-64-128/16", "4", "--image_size", "32", "--rounds", "3", "--seconds", "1"]


class Part(NamedTuple):
    """A benchmark to run.

    Attributes:
        script: its name.
        words: its model and batch.
        peers: that take part.
        overrides: of our model's config.
        checked: whether they are held against the reference, which for a large model takes longer
            to compile than all else.
        flags: of XLA.
    """

    script: str
    words: tuple[str, ...]
    peers: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    checked: bool = True
    flags: str = ""


_TIMM = ("timm", "timm, torch.compile")
_BF16 = ("--dtype", "bfloat16")
# On a GPU that has the memory, nothing is worth computing again.
_FAST = ("remat=nothing",)
_B = ("ViT-B/16", "256", *_BF16)
_TRITON = "--xla_gpu_enable_triton_gemm=true"
PARTS = {
    "train_b": Part("train_step.py", _B, _TIMM, _FAST),
    "infer_b": Part("inference.py", _B, ("official", *_TIMM)),
    "train_h": Part("train_step.py", ("ViT-H/14", "64", *_BF16), (), _FAST, checked=False),
    "train_l": Part("train_step.py", ("ViT-L/16", "128", *_BF16), (), _FAST, checked=False),
    "dots_b": Part("train_step.py", _B, checked=False),
    "triton_b": Part("train_step.py", _B, (), _FAST, checked=False, flags=_TRITON),
    "correct": Part("train_step.py", ("ViT-4-768-3072/16", "16"), ("official", "timm")),
}
# Of the time for all, what preparing may take before those that are ready are timed.
PREPARING = 0.6


def command(part: Part, output: Path, overrides: list[str], trial: bool) -> list[str]:
    """The command line of a part."""
    words = [*part.words, "--seconds", "10", "--rounds", "30"]
    if trial:
        words = [*TRIAL, *part.words[2:]]
    words += ["--peers", *part.peers, "--output", str(output)]
    if not part.checked:
        words.append("--unchecked")
    if overrides := [*part.overrides, *overrides]:
        words += ["--override", *overrides]
    return [sys.executable, str(BENCHMARKS / part.script), *words]


def environment(name: str, folder: Path) -> dict[str, str]:
    """The environment of a part: all of them share the memory of the device."""
    path = os.pathsep.join(filter(None, [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]))
    flags = f"{os.environ.get('XLA_FLAGS', '')} {PARTS[name].flags}".strip()
    return os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": flags,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        turns.FOLDER: str(folder),
        turns.NAME: name,
    }


class Run:
    """A part that runs, whose words go to a file."""

    def __init__(self, name: str, words: list[str], log: Path, folder: Path) -> None:
        """Starts it; folder is that of the turns."""
        self.name, self._log, self._folder = name, log, folder
        self._start = time.monotonic()
        with log.open("w") as said:
            self._process = subprocess.Popen(
                words, stdout=said, stderr=subprocess.STDOUT, env=environment(name, folder)
            )

    def is_ready(self) -> bool:
        """Tells whether it can be timed."""
        return turns.ready(self._folder, self.name).exists() and not self.has_ended()

    def has_ended(self) -> bool:
        """Tells whether it has come to its end."""
        return self._process.poll() is not None

    def finish(self, end: float) -> str:
        """Has it timed, at most until a time of the monotonic clock; returns how it went."""
        turns.go(self._folder, self.name).touch()
        try:
            code = self._process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"was ended after {time.monotonic() - self._start:.0f} s"
        if not code:
            return f"done, {time.monotonic() - self._start:.0f} s after its start"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"failed ({code}): {lines[-1] if lines else 'without a word'}"


def finished(runs: list[Run], seconds: float) -> Iterator[tuple[str, str]]:
    """Yields the name of each part and how it went, as soon as it is known."""
    start = time.monotonic()
    end = start + seconds
    while runs:
        prepared = all(run.is_ready() or run.has_ended() for run in runs)
        over = time.monotonic() - start > PREPARING * seconds
        able = [run for run in runs if run.has_ended() or ((prepared or over) and run.is_ready())]
        if not able and time.monotonic() < end:
            time.sleep(0.1)
            continue
        run = able[0] if able else runs[0]
        runs.remove(run)
        yield run.name, run.finish(end)


def tables(folder: Path, outcomes: dict[str, str]) -> str:
    """Markdown of all parts so far."""
    lines = []
    for name, outcome in outcomes.items():
        lines += [f"## {name}: {outcome}", ""]
        said = (folder / f"gpu_{name}.log").read_text(errors="replace").splitlines()
        # The table, the line above it and the one below; of what failed, its last words.
        first = next((i for i, line in enumerate(said) if line.startswith("|")), None)
        lines += said[-5:] if first is None else [said[first - 1], "", *said[first:]]
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; returns 1 if one of them is not done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--override", nargs="+", default=[], help="as of train_step.py")
    parser.add_argument("--trial", action="store_true", help="tiny, where there is no GPU")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name in args.parts:
            path = args.output / f"gpu_{name}.json"
            words = command(PARTS[name], path, args.override, args.trial)
            runs.append(Run(name, words, args.output / f"gpu_{name}.log", Path(folder)))
        for name, outcome in finished(runs, args.seconds):
            outcomes[name] = outcome
            print(f"{name}: {outcome}", flush=True)
            in_order = {part: outcomes[part] for part in args.parts if part in outcomes}
            (args.output / "gpu.md").write_text(tables(args.output, in_order))
            (args.output / "gpu.json").write_text(json.dumps(in_order, indent=1) + "\n")
    print((args.output / "gpu.md").read_text())
    return int(not all(outcome.startswith("done") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
