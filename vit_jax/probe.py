"""The command that trains a linear probe: `python -m vit_jax.probe --data D --init C`."""

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vit_jax import command, tensorflow_env
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.files import atomic_folder, make_folder, write_json
from vit_jax.printable import printable

if TYPE_CHECKING:
    from vit_jax.checkpoints.feature_file import Features
    from vit_jax.checkpoints.pretrained import Pretrained
    from vit_jax.data.source import Source
    from vit_jax.evaluation.probe import AnyScore, Probe
    from vit_jax.sharding import Mesh

_EPILOG = """examples:
  %(prog)s --data photos/ --init B_16 --output runs/probe
  %(prog)s --data cifar10 --init B_16 --features cifar10.npz --mirror

The trunk stays as it is: its features of every image are computed once, and a linear head is
fitted to them, whose regularization is chosen on a fifth of the training images. What --output
names is a model like any other: predict, evaluate, convert and export take it."""


class _Sources(NamedTuple):
    """The images to learn from, and those to be scored on."""

    train: "Source"
    test: "Source"


def build_parser(prog: str = "python -m vit_jax.probe") -> command.Parser:
    """The parser of the command line, under the name by which the command is called."""
    parser = command.Parser(
        prog=prog, description="Trains a linear classifier on frozen features.", epilog=_EPILOG
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="D",
        help="a folder or list of images, or a data set's name as `train` takes it",
    )
    flags.add_flags(parser, "--init")
    parser.add_argument("--output", metavar="DIR", help="a folder to be made, with the model")
    parser.add_argument(
        "--features",
        metavar="NPZ",
        help="read features from here, or write them if it is not there",
    )
    parser.add_argument(
        "--mirror", action="store_true", help="learn from the mirror image of each image, too"
    )
    parser.add_argument(
        "--C",
        type=_positive_number,
        metavar="C",
        help="inverse L2 regularization, as in scikit-learn [chosen between 1e-6 and 1e6]",
    )
    command.add_image_flags(parser)
    return parser


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: an argument is unknown, missing or impossible.
    """
    args = build_parser().parse_args(argv)
    if args.output and os.path.lexists(args.output):
        raise UserError(
            f"--output {args.output} exists already: remove it, or choose another folder"
        )
    if args.features:
        is_file = os.path.isfile(args.features) or not os.path.lexists(args.features)
        if not args.features.endswith(".npz") or not is_file:
            raise UserError(f"--features {args.features} is not a file that ends in .npz")
        if not Path(args.features).absolute().parent.is_dir():
            raise UserError(f"--features {args.features} is not in a folder that exists")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_arguments(argv)
    tensorflow_env.silence()
    command.keep_programs()
    pretrained = flags.load(args)
    sources = _open(args, pretrained.preprocessing.channels)
    from vit_jax.sharding import make_mesh

    mesh = make_mesh()
    began = time.monotonic()
    splits = _features(pretrained, sources, args, mesh)
    computed = time.monotonic()
    probe, test = _train(splits, sources, args, mesh)
    seconds = {"features": computed - began, "head": time.monotonic() - computed}
    _print_result(probe, test, seconds)
    if args.output:
        result = _describe(args, sources, probe, test, seconds)
        _write(Path(args.output), pretrained, sources, probe, result)
    return 0


def _open(args: argparse.Namespace, channels: int) -> _Sources:
    from vit_jax.data import datasets

    train, test = datasets.open_dataset(
        datasets.name_or_path(args.data),
        data_dir=args.data_dir,
        eval_split=args.split,
        files=datasets.FileRules(broken=args.broken, skip_flag="--broken skip", channels=channels),
    )
    for note in train.notes:
        print(printable(note), flush=True)
    if len(train.class_names) < 2:
        raise UserError(f"{args.data} has one class, so there is nothing to tell apart: add others")
    print(
        printable(
            f"images    {train.num_examples:,} of {len(train.class_names)} classes to learn from "
            f"({train.split}), {test.num_examples:,} to score ({test.split})"
        ),
        flush=True,
    )
    return _Sources(train, test)


def _features(
    pretrained: "Pretrained", sources: _Sources, args: argparse.Namespace, mesh: "Mesh"
) -> dict[str, "Features"]:
    """Computes the features of all images, unless a file has them, and says so."""
    from vit_jax.checkpoints import feature_file

    if not args.features:
        return _compute(pretrained, sources, args, mesh)
    fingerprints = _fingerprints(pretrained, sources, args)
    if os.path.exists(args.features):
        rows, train = _rows(sources, args), sources.train
        shape = (_width(pretrained), len(train.class_names))
        splits = feature_file.read_features(
            args.features, fingerprints, rows, *shape, train.multi_label
        )
        print(printable(f"features  read from {args.features}"), flush=True)
        return splits
    splits = _compute(pretrained, sources, args, mesh)
    feature_file.write_features(args.features, splits, fingerprints)
    print(printable(f"features  written to {args.features}"), flush=True)
    return splits


def _compute(
    pretrained: "Pretrained", sources: _Sources, args: argparse.Namespace, mesh: "Mesh"
) -> dict[str, "Features"]:
    import jax

    from vit_jax.evaluation.metrics import make_apply_fn
    from vit_jax.models import create_model
    from vit_jax.sharding import state_sharding

    apply_fn = make_apply_fn(create_model(pretrained.model).without_head(), mesh)
    params = jax.device_put(pretrained.params, state_sharding(pretrained.params, mesh))
    rows, width = _rows(sources, args), _width(pretrained)
    total = sum(rows.values())
    # Standardized in a copy, which lies on the device as well.
    print(
        f"features  {total:,} x {width:,} in float32: {total * width * 4 / 1e6:,.1f} MB, at most "
        "three times that at the end",
        flush=True,
    )
    began = time.monotonic()
    splits = {}
    for name, source in sources._asdict().items():
        batches = _batches(name, source, pretrained, args.batch_size, mesh)
        views = rows[name] // source.num_examples
        splits[name] = _of_views(apply_fn, params, batches, mesh, source.num_examples, views)
    print(f"          computed in {time.monotonic() - began:.1f} s", flush=True)
    return splits


def _rows(sources: _Sources, args: argparse.Namespace) -> dict[str, int]:
    views = 2 if args.mirror else 1
    return {"train": views * sources.train.num_examples, "test": sources.test.num_examples}


def _batches(
    name: str, source: "Source", pretrained: "Pretrained", batch_size: int, mesh: "Mesh"
) -> Any:
    """The images as evaluation sees them, with a bar on a terminal."""
    import tqdm

    from vit_jax.data.pipeline import eval_batches

    batches = eval_batches(
        source,
        batch_size=-(-batch_size // mesh.size) * mesh.size,
        preprocessing=pretrained.preprocessing,
    )
    return tqdm.tqdm(batches, desc=name, unit="batch", leave=False, disable=None)


def _of_views(
    apply_fn: Any, params: Any, batches: Any, mesh: "Mesh", images: int, views: int
) -> "Features":
    from vit_jax.checkpoints.feature_file import Features
    from vit_jax.evaluation.features import collect, with_mirror

    of_image = with_mirror(apply_fn) if views == 2 else apply_fn
    values, labels = collect(of_image, params, batches, mesh, images)
    return Features(values.reshape(views * len(labels), -1), labels.repeat(views, axis=0))


def _width(pretrained: "Pretrained") -> int:
    """The number of features of an image."""
    import jax
    import numpy as np

    from vit_jax.models import create_model

    image = jax.ShapeDtypeStruct((1, *pretrained.preprocessing.image_shape), np.float32)
    model = create_model(pretrained.model).without_head()
    return jax.eval_shape(model.apply, {"params": pretrained.params}, image).shape[-1]


def _fingerprints(
    pretrained: "Pretrained", sources: _Sources, args: argparse.Namespace
) -> dict[str, bytes]:
    """Digests of what features depend on, by the words in which a difference is told."""
    from vit_jax.checkpoints.feature_file import fingerprint_params, fingerprint_text
    from vit_jax.checkpoints.pretrained import fit_params
    from vit_jax.models import create_model

    trunk = create_model(pretrained.model, num_classes=0)
    size = pretrained.preprocessing.image_size
    params = fit_params(trunk, size, pretrained.params, old_size=size)
    model = {key: x for key, x in pretrained.model.items() if key != "num_classes"}
    described = [
        [x.split, x.class_names, x.num_examples, x.num_bytes, x.border, x.turn] for x in sources
    ]
    return {
        "weights": fingerprint_params(params) + fingerprint_text(model),
        "preprocessing": fingerprint_text(dataclasses.asdict(pretrained.preprocessing)),
        "images": fingerprint_text(
            described, args.mirror, _listing(args.data), lines=[y for x in sources for y in x.ids()]
        ),
    }


def _listing(data: str) -> str:
    """The text of a list of images, whose labels may change where its images do not."""
    path = Path(data.removeprefix("list:")).expanduser()
    return path.read_text(errors="surrogateescape") if path.is_file() else ""


def _train(
    splits: dict[str, "Features"], sources: _Sources, args: argparse.Namespace, mesh: "Mesh"
) -> tuple["Probe", "AnyScore"]:
    from vit_jax.evaluation.probe import hold_out, score_head, train_probe

    train, test = splits["train"], splits["test"]
    views = 2 if args.mirror else 1
    if sources.train.multi_label:
        _check_labeled(splits, sources)
    held_out = hold_out(train.labels[::views]).repeat(views)
    if args.C is None and not held_out.any():
        raise UserError(
            f"{args.data} has one image of each class at most, so none can be held out to choose "
            "C: set --C, for example --C=1"
        )
    probe = train_probe(
        train.values, train.labels, len(sources.train.class_names), held_out, mesh, args.C
    )
    return probe, score_head(probe.head, test.values, test.labels, mesh)


def _check_labeled(splits: dict[str, "Features"], sources: _Sources) -> None:
    for name, source in sources._asdict().items():
        if not splits[name].labels.any():
            raise UserError(
                f"no image of split {source.split!r} of {source.name} has a label: choose another"
            )


def _print_result(probe: "Probe", test: "AnyScore", seconds: dict[str, float]) -> None:
    chosen = f"the best of {len(probe.tried)}, " if len(probe.tried) > 1 else ""
    print(f"C         {probe.c:.4g}, {chosen}in {seconds['head']:.1f} s")
    print(f"{test._fields[0]:9} {probe.train[0]:.4f} of the images learned from")
    if probe.tried:
        held_out = probe.tried[probe.c][0]
        why = "while C was chosen" if len(probe.tried) > 1 else "from a first head with this C"
        print(f"          {held_out:.4f} of the fifth of them held out {why}")
    print(f"          {test[0]:.4f} of the images to score", flush=True)


def _describe(
    args: argparse.Namespace,
    sources: _Sources,
    probe: "Probe",
    test: "AnyScore",
    seconds: dict[str, float],
) -> dict[str, Any]:
    return {
        "init": args.checkpoint,
        "data": args.data,
        "splits": {name: x.split for name, x in sources._asdict().items()},
        "images": {name: x.num_examples for name, x in sources._asdict().items()},
        "mirror": args.mirror,
        "C": probe.c,
        "train": probe.train._asdict(),
        "test": test._asdict(),
        "tried": [{"C": c, **score._asdict()} for c, score in probe.tried.items()],
        "seconds": seconds,
    }


def _write(
    path: Path,
    pretrained: "Pretrained",
    sources: _Sources,
    probe: "Probe",
    result: dict[str, Any],
) -> None:
    from vit_jax.checkpoints.heads import replace_head
    from vit_jax.checkpoints.save import write_official
    from vit_jax.data import holdout

    train = sources.train
    model = replace_head(pretrained, *probe.head, train.class_names, train.multi_label)
    make_folder(path.absolute().parent)
    with atomic_folder(path) as folder:
        write_official(model, folder)
        holdout.record(train.partition, folder)  # By which `evaluate` scores the others.
        write_json(folder / "probe.json", result)
    print(printable(f"written   {path}: vit-jax predict --checkpoint {path} IMAGE"), flush=True)


if __name__ == "__main__":
    command.run(main)
