"""Everything that is to be measured on a GPU, in one go and in bounded time.

    python benchmarks/gpu.py --output results --seconds 540

It needs JAX, Flax, Optax, NumPy and, for the peers, PyTorch and timm: nothing else that this
project installs. In the order of what matters most it runs the parts below, each in a process of
its own, so that one that fails, hangs or runs out of memory takes nothing else with it:

    correct     4 layers of ViT-B/16 in 32 bits: losses, gradients, an update; official and timm
    train_b     training ViT-B/16 with 256 images, 16 bits, remat=nothing, beside timm's, eager and
                compiled
    infer_b     the logits of ViT-B/16, likewise
    train_l     training ViT-L/16 with 128 images, likewise, ours alone
    train_h     training ViT-H/14 with 64 images, likewise, ours alone

Each writes its JSON and what it said to the folder as soon as it ends, and gpu.md the tables of all
so far. With --trial everything is tiny, to try the script where there is no GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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
        seconds: that it may take.
    """

    script: str
    words: tuple[str, ...]
    peers: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    checked: bool = True
    seconds: float = 240


_TIMM = ("timm", "timm, torch.compile")
_BF16 = ("--dtype", "bfloat16")
# On a GPU that has the memory, nothing is worth computing again.
_FAST = ("remat=nothing",)
PARTS = {
    "correct": Part("train_step.py", ("ViT-4-768-3072/16", "16"), ("official", "timm")),
    "train_b": Part("train_step.py", ("ViT-B/16", "256", *_BF16), _TIMM, _FAST, seconds=300),
    "infer_b": Part("inference.py", ("ViT-B/16", "256", *_BF16), ("official", *_TIMM)),
    "train_l": Part("train_step.py", ("ViT-L/16", "128", *_BF16), (), _FAST, checked=False),
    "train_h": Part("train_step.py", ("ViT-H/14", "64", *_BF16), (), _FAST, checked=False),
}


def command(part: Part, output: Path, overrides: list[str], trial: bool) -> list[str]:
    """The command line of a part."""
    words = [*part.words, "--seconds", "20", "--rounds", "30"]
    if trial:
        words = [*TRIAL, *part.words[2:]]
    words += ["--peers", *part.peers, "--output", str(output)]
    if not part.checked:
        words.append("--unchecked")
    if overrides := [*part.overrides, *overrides]:
        words += ["--override", *overrides]
    return [sys.executable, str(BENCHMARKS / part.script), *words]


def environment(part: Part) -> dict[str, str]:
    """The environment of a part: PyTorch's peers need memory of the device, too."""
    alone = not any("timm" in peer for peer in part.peers)
    memory = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true" if alone else "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95" if alone else "0.75",
    }
    path = os.pathsep.join(filter(None, [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]))
    return memory | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(part: Part, words: list[str], log: Path, seconds: float) -> str:
    """Runs a command, whose words go to a file; returns "done" or what went wrong."""
    with log.open("w") as said:
        try:
            ended = subprocess.run(
                words, stdout=said, stderr=subprocess.STDOUT, env=environment(part), timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"was ended after {seconds:.0f} s"
    if not ended.returncode:
        return "done"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"failed ({ended.returncode}): {lines[-1] if lines else 'without a word'}"


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
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--override", nargs="+", default=[], help="as of train_step.py")
    parser.add_argument("--trial", action="store_true", help="tiny, where there is no GPU")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    outcomes: dict[str, str] = {}
    for name in args.parts:
        left = end - time.monotonic()
        log = args.output / f"gpu_{name}.log"
        part = PARTS[name]
        words = command(part, args.output / f"gpu_{name}.json", args.override, args.trial)
        if left < 10:
            log.write_text("")
            outcomes[name] = "left out: no time"
        else:
            start = time.monotonic()
            outcomes[name] = run(part, words, log, min(left, part.seconds))
            outcomes[name] += f", {time.monotonic() - start:.0f} s"
        print(f"{name}: {outcomes[name]}", flush=True)
        (args.output / "gpu.md").write_text(tables(args.output, outcomes))
        (args.output / "gpu.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    print((args.output / "gpu.md").read_text())
    return int(not all(outcome.startswith("done") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
