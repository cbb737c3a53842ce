"""From images to features of every patch: `python -m vit_jax.features --checkpoint C IMAGE...`."""

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.files import atomic_write
from vit_jax.printable import printable

if TYPE_CHECKING:
    import numpy as np

    from vit_jax.dense_features import DenseFeatures, Extractor

SUFFIXES = (".npz", ".safetensors")

_EPILOG = """examples:
  %(prog)s --checkpoint B_16 photos/ --output features.npz
  %(prog)s --checkpoint B_16 photos/ --output f.safetensors --image_size 320x480 --layers 6,12

arrays, float32, a row for every image that was read:
  pooled         [images, features]               what a head is applied to
  grid           [images, rows, columns, width]   the patches after the last LayerNorm
  prefix         [images, tokens, width]          the tokens before them, if there are any
  layer_6/grid, layer_6/prefix                    of --layers, before any LayerNorm
and texts, in .npz arrays, in .safetensors JSON in the header's metadata:
  files          the images' paths
  prefix_names   class, distillation, register_1 ...

exit codes:
  0  the features of every image were written
  1  some could not be read; each is one line on stderr, the others were written
  2  none could be read, or a flag or the checkpoint is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parse(argv)
    # PIL warns of odd metadata and large sizes, from several threads.
    warnings.simplefilter("ignore")
    command.keep_programs()
    # Imported here: --help should wait for neither NumPy nor JAX.
    from vit_jax.data.image_files import find_images
    from vit_jax.dense_features import Extractor

    # The extractor fits the model to it: a side may be no multiple of the patch size.
    size, args.image_size = args.image_size, None
    extractor = Extractor(flags.load(args), args.layers, size)
    files = find_images(args.images, extractor.preprocessing.channels)
    done, features = extract(extractor, files, args.batch_size)
    if features is None:
        return 2
    arrays = to_arrays(features)
    write(Path(args.output), arrays, done, features.prefix)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    print(printable(f"written   {args.output}: {shapes}"), flush=True)
    return 0 if len(done) == len(files) else 1


def extract(
    extractor: "Extractor", files: Sequence[str], batch_size: int
) -> tuple[list[str], "DenseFeatures | None"]:
    """Computes the features of every image that can be read; None of none.

    One that cannot is a line on stderr.

    Args:
        extractor: the model.
        files: image files.
        batch_size: how many images are computed at a time, at most.

    Returns:
        The files that were read, and their features.

    Raises:
        UserError: a feature is not finite.
    """
    import jax
    import numpy as np

    from vit_jax.data.image_files import read_batches
    from vit_jax.evaluation.metrics import one_ahead

    batches = read_batches(files, extractor.preprocessing, batch_size, command.report)
    done: list[str] = []
    parts, counts = [], []
    for found, part in one_ahead((found, extractor(batch)) for found, batch in batches):
        parts.append(jax.device_get(part))
        counts.append(len(found))
        done += found
    if not done:
        return done, None
    features = extractor.collect(parts, counts)
    if not np.isfinite(features.tokens).all():
        raise UserError("the model's features are not finite: its weights are damaged")
    return done, features


def to_arrays(features: "DenseFeatures") -> dict[str, "np.ndarray"]:
    """The arrays of a file, by their names; see the command's `--help`."""
    arrays = {"pooled": features.pooled}
    by_prefix = {"": features.tokens}
    by_prefix |= {f"layer_{number}/": tokens for number, tokens in features.layers.items()}
    for name, tokens in by_prefix.items():
        arrays[f"{name}grid"] = features.on_grid(tokens)
        if features.prefix:
            arrays[f"{name}prefix"] = tokens[:, : len(features.prefix)]
    return arrays


def write(path: Path, arrays: dict[str, Any], files: Sequence[str], prefix: Sequence[str]) -> None:
    """Writes features whole or not at all.

    Args:
        path: of the file, which ends in one of `SUFFIXES`; what is there is replaced.
        arrays: from `to_arrays`.
        files: the images' paths.
        prefix: see `DenseFeatures`.

    Raises:
        UserError: the file cannot be written.
    """
    import numpy as np

    if path.suffix == ".safetensors":
        from vit_jax.checkpoints.formats.safetensors import write_safetensors

        texts = {"files": json.dumps(list(files)), "prefix_names": json.dumps(list(prefix))}
        write_safetensors(path, arrays, **texts)
        return
    texts: dict[str, Any] = {"files": np.array(files), "prefix_names": np.array(prefix, np.str_)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **texts, **arrays)


def build_parser(prog: str = "python -m vit_jax.features") -> command.Parser:
    """The parser of the command line, under the name by which the command is called."""
    parser = command.Parser(
        prog=prog, description="Writes features of every patch of images.", epilog=_EPILOG
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_DIR", help="directories are searched recursively"
    )
    flags.add_flags(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="ends in .npz or .safetensors"
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        default=(),
        metavar="N,...",
        help="also the results of these, from 1 on",
    )
    parser.add_argument(
        "--batch_size", type=command.positive, default=32, metavar="N", help="at a time [32]"
    )
    return parser


def _layers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(command.positive(part) for part in text.split(",")))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if not args.output.endswith(SUFFIXES) or os.path.isdir(args.output):
        raise UserError(f"--output {args.output} is no file that ends in .npz or .safetensors")
    if not os.path.isdir(os.path.dirname(args.output) or "."):
        raise UserError(f"--output {args.output} is not in a folder that exists")
    return args


if __name__ == "__main__":
    command.run(main)
