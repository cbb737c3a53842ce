"""From images to their classes: `python -m vit_jax.predict --checkpoint C IMAGE_OR_DIR...`."""

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.files import atomic_write
from vit_jax.printable import printable

if TYPE_CHECKING:
    import numpy as np

    from vit_jax.checkpoints.pretrained import Pretrained

_EPILOG = """examples:
  %(prog)s --checkpoint ViT-B_16-224 photo.jpg
  %(prog)s --checkpoint runs/digits --topk 1 --json photos/ > predictions.jsonl

exit codes:
  0  every image was classified
  1  some could not be read; each is one line on stderr, the others were done
  2  none could be read, or a flag or the checkpoint is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parse(argv)
    # PIL warns of odd metadata and large sizes, from several threads.
    warnings.simplefilter("ignore")
    # A terminal that lacks a letter of a class's name should not end the command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    command.keep_programs()
    # Imported here: --help should wait for neither NumPy nor JAX.
    import numpy as np

    from vit_jax.data.image_files import find_images
    from vit_jax.inference import predictions

    pretrained = flags.load(args)
    files = find_images(args.images, pretrained.preprocessing.channels)
    names = pretrained.class_names
    if args.class_names:
        names = read_class_names(args.class_names, pretrained.model["num_classes"])
    done, rows = [], []
    for file, logits in classify(pretrained, files, args.batch_size):
        _print(file, predictions(logits, names, pretrained, args.topk), args.json)
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
) -> Iterator[tuple[str, "np.ndarray"]]:
    """Yields every image that can be read, with its logits, float32 [num_classes].

    One that cannot is a line on stderr. Images are seen as in evaluation, in batches of one shape.

    Args:
        pretrained: the model.
        files: image files.
        batch_size: how many images are classified at a time, at most.

    Raises:
        UserError: the model has no head or an untrained one, or its logits are not finite.
    """
    from vit_jax.data.image_files import read_batches
    from vit_jax.inference import VisionModel

    size = min(batch_size, len(files))
    model = VisionModel(pretrained, size)
    pretrained.check_head()
    for found, batch in read_batches(files, pretrained.preprocessing, size, command.report):
        yield from zip(found, model.logits(batch)[: len(found)], strict=True)


def _print(file: str, classes: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": file, "predictions": classes}), flush=True)
        return
    lines = [printable(file)]
    if not classes:
        lines.append("       -  no class is above 50%")
    for each in classes:
        label = f"class {each['index']}" if each["label"] is None else printable(each["label"])
        lines.append(f"{each['probability']:8.2%}  {label}")
    print("\n".join(lines), flush=True)


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(
        prog=prog, description="Tells the most probable classes of images.", epilog=_EPILOG
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_DIR", help="directories are searched recursively"
    )
    flags.add_flags(parser)
    parser.add_argument(
        "--topk",
        type=command.positive,
        metavar="K",
        help="classes an image [5; of a model that was trained on several labels an image, all "
        "that are above 50%%]",
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
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = build_parser("python -m vit_jax.predict").parse_args(argv)
    if args.logits and (os.path.isdir(args.logits) or not os.path.isdir(_parent(args.logits))):
        raise UserError(f"--logits {args.logits} is not a file in a directory that exists")
    return args


def _parent(path: str) -> str:
    return os.path.dirname(path) or "."


if __name__ == "__main__":
    command.run(main)
