"""Masked patch prediction on CIFAR-10 (Section 4.6), sized for an hour on two CPU cores.

python -m experiments.masked_patch_prediction [--data_dir D] [--workdir W]

Pre-trains a small ViT on all training images without their labels. Then trains it to classify, from
there and from scratch, under one recipe and for equal steps, on the part of the images whose labels
it may see. Prints a table and draws the curves. Started again it goes on where it stopped.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

if not __package__:
    sys.exit("error: this is a module now: run python -m experiments.masked_patch_prediction")

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from experiments.training_curves import read_curve
from vit_jax import command, recipes
from vit_jax.models import masked

NAMES = {"scratch": "from scratch", "finetune": "after masked patch prediction"}
COLORS = {"masked": "#0b6bcb", "scratch": "#9aa5b1", "finetune": "#0b6bcb"}


def masked_config(args: argparse.Namespace) -> ConfigDict:
    """Pre-training: the paper's recipe for a small model and few steps, at a higher rate."""
    config = _small(recipes.get_config("ViT-Ti/4", "masked,cifar10"), args)
    config.duration = f"{args.pretrain_steps} steps"
    config.schedule.warmup = f"{max(args.pretrain_steps // 10, 1)} steps"
    config.eval_every = f"{max(args.pretrain_steps // 8, 1)} steps"
    config.dataset.random_crop = False  # The black beyond a shifted image's edge is too easy.
    return config


def classification_config(args: argparse.Namespace, init_from: str = "") -> ConfigDict:
    """Training on the labeled part: the recipe of cifar10_from_scratch.py, wherever from."""
    config = _small(recipes.get_config("ViT-Ti/4", "pretrain,cifar10"), args)
    config.dataset.train_split = f"train[:{args.labeled}]"
    config.duration = f"{args.finetune_steps} steps"
    config.schedule.warmup = f"{max(args.finetune_steps // 10, 1)} steps"
    config.eval_every = f"{max(args.finetune_steps // 6, 1)} steps"
    config.model.representation_size = 0
    config.model.dropout_rate = 0.0
    config.init_from = init_from
    return config


def _small(config: ConfigDict, args: argparse.Namespace) -> ConfigDict:
    config.batch_size = 128
    config.log_every = "25 steps"
    config.checkpoint_every = "100 steps"
    config.dataset.data_dir = args.data_dir
    config.dataset.image_size = 32
    config.dataset.protocol = "pad"
    config.model.hidden_size = 64
    config.model.num_layers = 4
    config.model.mlp_dim = 128
    config.model.num_heads = 4
    config.model.dtype = "float32"
    config.schedule.base_lr = 1e-3
    return config


def entropy(counts: np.ndarray) -> float:
    """In nats, of the distribution that counts [outcomes] are of."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def test_images(config: ConfigDict) -> Iterator[np.ndarray]:
    """The images that a run is evaluated on, batches of [images, height, width, 3]."""
    from vit_jax.data import datasets, pipeline
    from vit_jax.data.protocols import evaluation

    data = config.dataset
    _, source = datasets.open_dataset(data.name, data_dir=data.data_dir)
    preprocessing = evaluation(data.protocol, data.image_size, data.jpeg_dct)
    for batch in pipeline.eval_batches(source, batch_size=1000, preprocessing=preprocessing):
        yield batch["image"][batch["mask"] > 0]


def trivial_loss(config: ConfigDict) -> float:
    """The least loss of a prediction that is the same for every patch, on the test images.

    It is the entropy of how often each color is the target.
    """
    counts = np.zeros(masked.NUM_COLORS, np.int64)
    for images in test_images(config):
        colors = masked.TARGETS[config.masking.target](images, config.model.patch_size)
        counts += np.bincount(np.ravel(colors), minlength=masked.NUM_COLORS)
    return entropy(counts)


def draw(workdir: pathlib.Path, trivial: float, output: pathlib.Path) -> None:
    """Draws the loss of pre-training, and the accuracies of both classifiers."""
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    color = COLORS["masked"]
    loss.plot(
        *read_curve(workdir / "masked" / "metrics.jsonl", "loss"),
        color=color,
        alpha=0.4,
        label="training",
    )
    loss.plot(
        *read_curve(workdir / "masked" / "metrics.jsonl", "eval_loss"),
        color=color,
        marker="o",
        ms=3,
        label="test",
    )
    loss.axhline(trivial, color="black", ls="--", lw=1, label="best constant prediction")
    loss.set(xlabel="step", ylabel="loss, nats a patch", title="masked patch prediction")
    for run, name in NAMES.items():
        curve = read_curve(workdir / run / "metrics.jsonl", "eval_accuracy")
        accuracy.plot(*curve, color=COLORS[run], marker="o", ms=3, label=name)
    accuracy.set(xlabel="step", ylabel="test accuracy", title="classification")
    for axes in (loss, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(output, dpi=110)


def table(results: dict[str, dict[str, Any]], trivial: float) -> str:
    """The last evaluation of every run, a row each."""
    found = results["masked"]
    rows = [
        f"{'loss of the best constant prediction':44}{trivial:8.4f}",
        f"{'loss of masked patch prediction':44}{found['loss']:8.4f}",
        f"{'accuracy of masked patch prediction':44}{found['accuracy']:8.2%}",
    ]
    rows += [
        f"{f'classification {name}':44}{results[run]['accuracy']:8.2%}"
        for run, name in NAMES.items()
    ]
    return "\n".join(rows)


def run(
    args: argparse.Namespace, train: Callable[[ConfigDict, pathlib.Path], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Does the three runs, or what is left of them; returns the last evaluation of each."""
    pretrained = args.workdir / "masked"
    configs = {
        "masked": masked_config(args),
        "finetune": classification_config(args, init_from=str(pretrained)),
        "scratch": classification_config(args),
    }
    results = {}
    for name, config in configs.items():
        print(f"-- {name}: {args.workdir / name}", flush=True)
        results[name] = train(config, args.workdir / name)
    return results


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "--data_dir", default="", metavar="DIR", help="where TFDS looks [its default]"
    )
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        default=pathlib.Path("runs/masked_patch_prediction"),
        metavar="DIR",
        help="where the runs go [runs/masked_patch_prediction]",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="PNG", help="the curves [WORKDIR/curves.png]"
    )
    parser.add_argument(
        "--pretrain_steps", type=command.positive, default=2000, metavar="N", help="[2000]"
    )
    parser.add_argument(
        "--finetune_steps", type=command.positive, default=600, metavar="N", help="[600]"
    )
    parser.add_argument(
        "--labeled", type=command.positive, default=5000, metavar="N", help="images [5000]"
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    return build_parser("python -m experiments.masked_patch_prediction").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_arguments(argv)
    from vit_jax.train import train  # TensorFlow takes seconds to import: --help should not

    results = run(args, train)
    trivial = trivial_loss(masked_config(args))
    output = args.output or args.workdir / "curves.png"
    draw(args.workdir, trivial, output)
    print(table(results, trivial))
    print(f"curves: {output}")
    return 0


if __name__ == "__main__":
    command.run(main)
