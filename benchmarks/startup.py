"""How long a command takes to its first words, and training to its first step.

    python benchmarks/startup.py                       # help of every command, and ViT-B/16
    python benchmarks/startup.py --config b16:pretrain,digits --scan False True
    python benchmarks/startup.py --config vit:ViT-Ti/16,finetune,folder:DIR --scan False \
        --batch 32 --config.init_from=Ti_16.npz --config.dataset.image_size=224

Training is started on the digits, which need no download, with a compilation cache of its own that
is empty at first, and then again with what the first run left there. Each process begins when its
command does: imports, data, initial weights, compilation and the step itself are in it. The last
line has the ratio of the two times until the first step begins, without scan, if that is among what
is asked for: the step itself takes long on a CPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import paired

from vit_jax.cli import COMMANDS

ROOT = Path(__file__).parents[1]
# The first words of `vit-jax train`, of compilation, its end, and the first step's.
MOMENTS = {
    "first_words": r"",
    "compiling": r"compiling",
    "compiled": r"compiled",
    "first_step": r"step +1/",
}


def command(*words: str) -> list[str]:
    """The command line `vit-jax WORDS` in this interpreter."""
    return [sys.executable, "-m", "vit_jax", *words]


def time_moments(words: list[str], moments: dict[str, str], cache: str) -> dict[str, float]:
    """Seconds from the start of a command to the first line that each pattern begins.

    The command is ended after the last of them.

    Args:
        words: the command line.
        moments: regular expressions by name, in the order in which they come.
        cache: a directory for compiled programs.

    Raises:
        RuntimeError: the command ended before.
    """
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    waiting, found, said = dict(moments), {}, []
    start = time.perf_counter()
    with subprocess.Popen(
        words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            for name, pattern in list(waiting.items()):
                if re.match(pattern, line):
                    found[name] = time.perf_counter() - start
                    del waiting[name]
            if not waiting:
                break
        process.terminate()
    if waiting:
        raise RuntimeError(f"{' '.join(words)} ended before {', '.join(waiting)}: {said[-3:]}")
    return found


def time_help(rounds: int) -> dict[str, list[float]]:
    """Seconds from each command's start to the first line of its help, in turns."""
    commands = {"vit-jax --help": command("--help")}
    commands |= {f"vit-jax {name} --help": command(name, "--help") for name in COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(rounds):
            for name, words in commands.items():
                found = time_moments(words, {"first_words": r""}, cache)
                times[name].append(found["first_words"])
    return times


def train_words(config: str, batch: int, workdir: str, scan: bool, further: list[str]) -> list[str]:
    """A run of ten steps without evaluation, whose first step is told as it is done."""
    values = {
        "batch_size": batch,
        "duration": "10 steps",
        "log_every": "1 steps",
        "schedule.warmup": "0 steps",
        "model.scan_layers": scan,
        "model.dtype": "float32",
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return command("train", "--config", config, "--workdir", workdir, *flags, *further)


def time_training(
    config: str, batch: int, scan: bool, further: list[str]
) -> dict[str, dict[str, float]]:
    """Seconds to the moments of a run with an empty cache, and of the same with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: time_moments(
                train_words(config, batch, f"{folder}/{name}", scan, further),
                MOMENTS,
                f"{folder}/cache",
            )
            for name in ("cold", "warm")
        }


def main(argv: list[str] | None = None) -> None:
    """Times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="b16:pretrain,digits", help="none is left out as ''")
    parser.add_argument("--batch", type=int, default=8)
    scans = parser.add_argument("--scan", nargs="*", default=["False", "True"])
    scans.choices = ["False", "True"]
    parser.add_argument("--rounds", type=int, default=3, help="of the commands' help; 0 for none")
    parser.add_argument("--output", help="a file for the numbers as JSON")
    args, further = parser.parse_known_args(argv)
    if other := [flag for flag in further if not flag.startswith("--config.")]:
        parser.error(f"{other[0]} is no flag, nor --config.KEY=VALUE of the run")
    found: dict[str, Any] = {"help": {}, "training": {}}
    rows = []
    for name, times in time_help(args.rounds).items() if args.rounds else ():
        found["help"][name] = times
        rows.append([name, f"{paired.summary(times).median:.2f}"])
    if rows:
        print(paired.markdown(["", "first words, s"], rows), flush=True)
    rows = []
    for scan in args.scan if args.config else ():
        moments = time_training(args.config, args.batch, scan == "True", further)
        found["training"][f"scan_layers={scan}"] = moments
        for cache, seconds in moments.items():
            cells = [f"{seconds[name]:.1f}" for name in MOMENTS]
            rows.append([f"{args.config}, batch {args.batch}, scan {scan}, {cache}", *cells])
    if rows:
        print(paired.markdown(["", *(f"{x.replace('_', ' ')}, s" for x in MOMENTS)], rows))
    paired.write(args.output, paired.report(benchmark="startup", **found))
    if plain := found["training"].get("scan_layers=False"):
        ratio = plain["cold"]["compiled"] / plain["warm"]["compiled"]
        print(f"cold/warm {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
