"""From a checkpoint to what is deployed: `python -m vit_jax.export --checkpoint C --output DIR`.

Writes DIR/saved_model (stage tf), DIR/model.onnx (onnx) and DIR/model.engine (tensorrt), compares
each with the Flax model in float32, and fails where a precision's threshold is passed.
"""

import argparse
import collections
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # With it TensorFlow greets on every start.

import numpy as np

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.export import parity, runtime
from vit_jax.export.deploy import write_deploy
from vit_jax.export.onnx_file import read_onnx
from vit_jax.export.stages import CONVERTERS, STAGES, missing_packages, obstacles, resolve
from vit_jax.export.to_tensorrt import build, parse_batch, summary

OUTPUTS = ("logits", "probabilities", "features")
_CALIBRATION = 64  # images
_EPILOG = """exit codes:
  0  every stage ran, and is as close to Flax as its precision allows
  1  every stage ran, but one is not close enough
  2  a flag, the checkpoint or this machine does not allow a stage; those before it are written
     (without --stages, one that this machine has not the packages for is named and left out)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parse(argv)
    report = _Report(Path(args.output), args.latency_seconds, args.batch)
    if args.stages != ["tensorrt"]:
        _convert(args, report)
    if "tensorrt" in (args.stages or ()):
        _build(args, report)
    for failure in report.failures:
        print(f"error: {failure}; see {report.directory / 'parity.json'}", file=sys.stderr)
    return 1 if report.failures else 0


class _Report:
    """Compares and times what the stages made; prints it and writes it to parity.json."""

    def __init__(self, directory: Path, seconds: float, batch: str):
        self.directory = directory
        self.seconds = seconds
        sizes = {size for p in parse_batch(batch) for size in (p.min, p.opt, p.max)}
        self.batch_sizes = sorted(sizes)
        self.reference: Any = None
        self.failures: list[str] = []
        self.stages: list[dict[str, Any]] = []

    def add(self, name: str, predict: Any, precision: str, emulation: Any = None) -> None:
        """Measures a model; `precision` is the entry of `parity.THRESHOLDS` to hold it to.

        An `emulation` tells its largest numbers, and its times would say nothing.
        """
        reference = self.reference
        row = parity.compare(reference, parity.in_batches(predict, reference.images))
        row |= emulation.range() if emulation else {}
        found = parity.failures(row, precision, reference)
        self.failures += [f"{name}: {failure}" for failure in found]
        stage = {"name": name, "precision": precision, "images": len(reference.images), **row}
        if self.seconds and not emulation:
            image = reference.images[0]
            stage["latency"] = parity.latency(predict, image, self.batch_sizes, self.seconds)
        self.stages = [old for old in self.stages if old["name"] != name] + [stage]
        parity.save_report(reference, self.stages, self.directory)
        print(parity.table([stage]), flush=True)


def _convert(args: argparse.Namespace, report: _Report) -> None:
    """The stages in which JAX takes part."""
    import jax
    from absl import logging

    from vit_jax.export.forward import make_forward
    from vit_jax.export.to_tf import can_serialize_graphs, to_tf

    # TensorFlow warns that gradients of the SavedModel are missing, which nobody asks for.
    logging.set_verbosity(logging.ERROR)
    pretrained = flags.load(args)
    if pretrained.has_untrained_head and args.outputs != "features":
        print(f"note: {pretrained.source} has a head of zeros: its {args.outputs} mean nothing yet")
    forward = make_forward(
        pretrained, outputs=args.outputs, include_preprocessing=args.include_preprocessing
    )
    stages, converter, left_out = resolve(
        args.stages,
        args.converter,
        obstacles(jax.__version__, can_serialize_graphs(), missing_packages()),
        needs_onnx=args.precision != "fp32",
    )
    report.reference, calibration = _reference(args, pretrained, forward)
    report.directory.mkdir(parents=True, exist_ok=True)
    parity.save_reference(report.reference, report.directory)
    for line in left_out:
        print(line, flush=True)
    if "tf" in stages:
        start = time.perf_counter()
        path = to_tf(forward, report.directory)
        _print_stage(start, f"{path}: SavedModel")
        with runtime.load(path) as model:
            report.add("SavedModel", model.predict, "fp32")
    if "onnx" in stages:
        _to_onnx(args, report, forward, converter, calibration)


def _reference(args: argparse.Namespace, pretrained: Any, forward: Any) -> tuple[Any, Any]:
    """What to compare with, and for int8 other images of the same kind to take the scales from."""
    preprocessing, labels = pretrained.preprocessing, None
    number = args.num_images + (_CALIBRATION if args.precision == "int8" else 0)
    if args.dataset:
        source = _open_dataset(args, pretrained)
        images, labels = parity.read_dataset(source, preprocessing, number)
    elif args.data:
        names = pretrained.class_names if args.outputs != "features" else None
        images, labels = parity.read_images(args.data, preprocessing, names, number)
    else:
        images = parity.synthetic_images(min(number, 16), preprocessing)
    if args.include_preprocessing:
        images = parity.as_pixels(images, preprocessing)
    calibration = None
    if args.precision == "int8":
        # Every few images one, at most every other.
        chosen = np.arange(len(images)) % max(2, len(images) // _CALIBRATION) == 1
        calibration, images = images[chosen], images[~chosen]
        labels = None if labels is None else labels[~chosen]
    outputs = parity.in_batches(forward.jitted(), images)
    data = args.dataset or args.data or parity.SYNTHETIC
    return parity.Reference(images, outputs, labels, data), calibration


def _open_dataset(args: argparse.Namespace, pretrained: Any) -> Any:
    from vit_jax.data import classes
    from vit_jax.data.datasets import open_evaluation, relabel

    source = open_evaluation(args.dataset, data_dir=args.data_dir, split=args.split)
    own = pretrained.model["num_classes"], pretrained.class_names
    labels = classes.match(*own, source.class_names)
    if labels is None:
        difference = classes.difference(*own, source.class_names)
        raise UserError(f"{difference}: use --data, which takes any photographs")
    return relabel(source, labels, pretrained.class_names or source.class_names)


def _to_onnx(
    args: argparse.Namespace, report: _Report, forward: Any, converter: str, calibration: Any
) -> None:
    from vit_jax.export import precision, to_onnx

    start = time.perf_counter()
    model = to_onnx.to_model(forward, converter)
    if args.precision in precision.HALF:
        precision.to_half(model, args.precision)
    elif args.precision == "int8":
        model = precision.to_int8(model, calibration)
    path = to_onnx.save(model, report.directory)
    count = collections.Counter(node.op_type for node in model.graph)
    operators = ", ".join(f"{number} {name}" for name, number in count.most_common())
    _print_stage(start, f"{path}: {sum(count.values())} nodes ({operators})")
    name = f"ONNX {args.precision}"
    if args.precision != "bf16":  # Of which onnxruntime has no products on a CPU.
        with runtime.load(path) as model:
            report.add(name, model.predict, args.precision)
    if args.precision in precision.HALF:
        emulation = precision.Emulation(path)
        report.add(f"{name}, emulated", emulation.predict, args.precision, emulation)
    write_deploy(report.directory, batch=args.batch)


def _build(args: argparse.Namespace, report: _Report) -> None:
    """The stage that needs TensorRT and a GPU, and neither JAX nor TensorFlow."""
    if report.reference is None:
        report.reference = parity.load_reference(report.directory)
        report.stages = parity.load_report(report.directory)
    path = report.directory / "model.onnx"
    description = build(path, report.directory, batch=args.batch)
    print(summary(description), flush=True)
    kind = read_onnx(path).precision
    with runtime.load(report.directory / "model.engine") as model:
        limits = "fp32 engine" if kind == "fp32" else kind
        report.add(f"TensorRT {kind}", model.predict, limits)
    write_deploy(report.directory, batch=args.batch)


def _print_stage(start: float, text: str) -> None:
    print(f"{text} ({time.perf_counter() - start:.0f} s)", flush=True)


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(prog=prog, description=__doc__, epilog=_EPILOG)
    flags.add_flags(parser, required=False)
    parser.add_argument("--output", required=True, metavar="DIR", help="what it writes goes there")
    parser.add_argument(
        "--stages",
        type=_stages,
        metavar="S,...",
        help=f"of {', '.join(STAGES)} [tf,onnx, or what this machine has the packages for]",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        default="fp32",
        help="of the ONNX file and of what is built from it [fp32]",
    )
    parser.add_argument(
        "--batch",
        default="1:8:64",
        metavar="MIN:OPT:MAX",
        help="batch sizes to time, and to build the engine for [1:8:64]",
    )
    parser.add_argument("--outputs", choices=OUTPUTS, default="logits", help="[logits]")
    parser.add_argument(
        "--converter",
        choices=CONVERTERS,
        help="jax2tf for JAX 0.7.1, jax2onnx for newer ones, to the ONNX file alone [what is "
        "installed]",
    )
    parser.add_argument(
        "--include_preprocessing",
        action="store_true",
        help="take uint8 pixels; resizing and cropping are the caller's in any case",
    )
    group = parser.add_argument_group("parity")
    group.add_argument(
        "--dataset",
        metavar="D",
        help="a data set of the model's classes to compare on and to tell the accuracy of: a TFDS "
        "name, folder:PATH or digits",
    )
    group.add_argument("--split", default="", help="in TFDS syntax [validation or test]")
    group.add_argument("--data_dir", default="", help="where TFDS looks [its default]")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="or photographs, searched recursively; accuracy is told if their "
        "directories have the names of the model's classes [synthetic images]",
    )
    group.add_argument(
        "--num_images", type=command.positive, default=256, metavar="N", help="at most [256]"
    )
    group.add_argument(
        "--latency_seconds",
        type=float,
        default=2.0,
        metavar="S",
        help="how long to time each batch size; 0 for not at all [2]",
    )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = build_parser("python -m vit_jax.export").parse_args(argv)
    if args.checkpoint is None and args.stages != ["tensorrt"]:
        raise UserError("--checkpoint is missing: only --stages tensorrt goes without")
    if args.data and args.dataset:
        raise UserError(f"--data {args.data} and --dataset {args.dataset}: give one of them")
    if args.dataset and args.outputs == "features":
        raise UserError("--outputs features have no accuracy: use --data in place of --dataset")
    makes_onnx = args.stages is None or "onnx" in args.stages
    if args.precision == "int8" and not (args.data or args.dataset) and makes_onnx:
        raise UserError(
            "--precision int8 needs photographs to take its scales from: add --data DIR"
        )
    if args.data and not os.path.isdir(args.data):
        raise UserError(f"--data {args.data} is not a directory")
    return args


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]


if __name__ == "__main__":
    command.run(main)
