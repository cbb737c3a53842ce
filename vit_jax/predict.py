"""From images to their classes: `python -m vit_jax.predict --checkpoint C IMAGE_OR_DIR...`."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.data import imagenet
from vit_jax.data.image_files import find_images, read_batches
from vit_jax.errors import UserError
from vit_jax.files import atomic_write

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained

_EPILOG = """exit codes:
  0  every image was classified
  1  some could not be read; each is one line on stderr, the others were done
  2  none could be read, or a flag or the checkpoint is wrong"""


def main() -> int:
    """Runs the command; returns its exit code."""
    args = _parse(sys.argv[1:])
    # PIL warns of odd metadata and large sizes, from several threads.
    warnings.simplefilter("ignore")
    # A terminal that lacks a letter of a class's name should not end the command.
    sys.stdout.reconfigure(errors="backslashreplace")
    files = find_images(args.images)
    pretrained = flags.load(args)
    names = pretrained.class_names
    if args.class_names:
        names = read_class_names(args.class_names, pretrained.model["num_classes"])
    done, rows = [], []
    for file, logits in classify(pretrained, files, args.batch_size):
        _print(file, top(logits, names, pretrained.loss, args.topk), args.json)
        done.append(file)
        if args.logits:
            rows.append(logits)
    if not done:
        return 2
    if args.logits:
        with atomic_write(Path(args.logits)) as temporary, temporary.open("wb") as file:
            np.savez(file, files=np.array(done), logits=np.stack(rows))
    return 0 if len(done) == len(files) else 1


def read_class_names(path: str, num_classes: int) -> tuple[str, ...]:
    """Reads one class name a line, in the order of the logits.

    Raises:
        UserError: the file cannot be read, or has another number of lines.
    """
    try:
        names = tuple(line.strip() for line in Path(path).read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class_names {path} cannot be read as text: {error}") from error
    if len(names) != num_classes:
        raise UserError(
            f"--class_names {path} has {len(names)} lines for {num_classes} classes: write one "
            "name a line, in the order of the logits"
        )
    return names


def classify(
    pretrained: "Pretrained", files: Sequence[str], batch_size: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every image that can be read, with its logits, float32 [num_classes].

    One that cannot is a line on stderr. Images are seen as in evaluation, in batches of one shape.

    Args:
        pretrained: the model.
        files: image files.
        batch_size: how many images are classified at a time, at most.

    Raises:
        UserError: the model has no head or an untrained one, or its logits are not finite.
    """
    # Here because JAX takes half a second to import, for which --help should not wait.
    import jax

    from vit_jax.models import create_model, model_keys

    pretrained.check_head()
    # Compiling one layer instead of all takes half the time, which one image waits for.
    scan = {"scan_layers"} & model_keys(pretrained.model["architecture"])
    model = create_model(pretrained.model, **dict.fromkeys(scan, True))
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    params = jax.device_put(pretrained.params)
    for found, batch in read_batches(files, pretrained.preprocessing, batch_size, command.report):
        logits = np.asarray(apply(params, batch))[: len(found)]
        if not np.isfinite(logits).all():
            raise UserError(f"{pretrained.source} gives logits that are not finite: mend it")
        yield from zip(found, logits, strict=True)


def top(
    logits: np.ndarray, class_names: Sequence[str] | None, loss: str, topk: int
) -> list[dict[str, Any]]:
    """The most probable classes of one image, the first one first.

    Args:
        logits: [num_classes].
        class_names: one per class, or None if nobody knows them; labels are then None. WordNet ids
            of ImageNet's classes become their names.
        loss: "softmax", or "sigmoid" for probabilities each on its own, that need not sum to 1.
        topk: how many; all if there are fewer.

    Returns:
        `index`, `label` and `probability` of each.
    """
    logits = logits.astype(np.float64)
    if loss == "sigmoid":
        probabilities = np.exp(-np.logaddexp(0, -logits))
    else:
        probabilities = np.exp(logits - np.logaddexp.reduce(logits))
    return [
        {
            "index": int(index),
            "label": None if class_names is None else imagenet.readable(class_names[index]),
            "probability": float(probabilities[index]),
        }
        for index in np.argsort(-logits, kind="stable")[:topk]
    ]


def _print(file: str, predictions: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": file, "predictions": predictions}), flush=True)
        return
    lines = [file if file.isprintable() else ascii(file)]
    for each in predictions:
        label = f"class {each['index']}" if each["label"] is None else each["label"]
        lines.append(f"{each['probability']:8.2%}  {label}")
    print("\n".join(lines), flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.Parser(prog="python -m vit_jax.predict", description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_DIR", help="directories are searched recursively"
    )
    flags.add_flags(parser)
    parser.add_argument(
        "--topk", type=command.positive, default=5, metavar="K", help="classes an image [5]"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one object a line: file, predictions (index, label, probability); label is null "
        "where the classes have no names",
    )
    parser.add_argument(
        "--logits",
        metavar="NPZ",
        help="also write the arrays `files` and `logits`, a row for every image that was read",
    )
    parser.add_argument(
        "--batch_size", type=command.positive, default=32, metavar="N", help="at a time [32]"
    )
    parser.add_argument(
        "--class_names",
        metavar="FILE",
        help="one name a line, in the order of the logits, in place of the checkpoint's",
    )
    args = parser.parse_args(argv)
    if args.logits and (os.path.isdir(args.logits) or not os.path.isdir(_parent(args.logits))):
        raise UserError(f"--logits {args.logits} is not a file in a directory that exists")
    return args


def _parent(path: str) -> str:
    return os.path.dirname(path) or "."


if __name__ == "__main__":
    command.run(main)
