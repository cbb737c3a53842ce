"""From images to the class of every pixel: `python -m vit_jax.segment --checkpoint C IMAGE...`."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.files import atomic_write, make_folder
from vit_jax.image_outputs import check_names, check_output
from vit_jax.printable import printable

if TYPE_CHECKING:
    import numpy as np

    from vit_jax.checkpoints.pretrained import Pretrained

_EPILOG = """Writes to the folder, for photo.jpg:
  photo.png          the index of the class of every pixel, a PNG with a palette, of the image's
                     size; 255 where the model did not look, as beyond a central crop
  photo.overlay.jpg  the image under the colors of the classes

examples:
  %(prog)s --checkpoint runs/streets photos/ --output masks

exit codes:
  0  every image was segmented
  1  some could not be read; each is one line on stderr, the others were done
  2  none could be read, or a flag or the checkpoint is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser().parse_args(argv)
    # PIL warns of odd metadata and large sizes, from several threads.
    warnings.simplefilter("ignore")
    command.keep_programs()
    # Imported here: --help should wait for neither NumPy nor JAX.
    from vit_jax.data.image_files import find_images

    pretrained = flags.load(args)
    files = find_images(args.images, pretrained.preprocessing.channels)
    check_names(files, "masks", "segment")
    check_output(args.output, args.images, files, "masks")
    output, done = Path(args.output), 0
    masks = segment(pretrained, files, args.batch_size)
    make_folder(output)
    for file, mask in masks:
        done += _write(output, file, mask, pretrained)
    return 2 if not done else 0 if done == len(files) else 1


def segment(
    pretrained: "Pretrained", files: Sequence[str], batch_size: int
) -> Iterator[tuple[str, "np.ndarray"]]:
    """Returns every image that can be read, with the class of each pixel that the model sees.

    One that cannot is a line on stderr. Images are seen as in evaluation, in batches of one shape.

    Args:
        pretrained: of a run of segmentation.
        files: image files.
        batch_size: how many images are segmented at a time, at most.

    Returns:
        Pairs of the file and uint8 [height, width], of the size of the model's input. Where logits
        are not finite the next raises a UserError.

    Raises:
        UserError: the checkpoint is no such one.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vit_jax.checkpoints.decoder import with_decoder
    from vit_jax.data.image_files import read_batches
    from vit_jax.evaluation.metrics import one_ahead

    module, params = with_decoder(pretrained)
    params = jax.device_put(params)

    @jax.jit
    def classify(params: dict, images: "np.ndarray") -> tuple[jax.Array, jax.Array]:
        logits: Any = module.apply({"params": params}, images)
        return jnp.argmax(logits, -1).astype(jnp.uint8), jnp.isfinite(logits).all()

    def segmented() -> Iterator[tuple[str, np.ndarray]]:
        batches = read_batches(files, pretrained.preprocessing, batch_size, command.report)
        started = ((found, classify(params, batch)) for found, batch in batches)
        for found, (masks, is_finite) in one_ahead(started):
            if not is_finite:
                raise UserError(f"{pretrained.source} gives logits that are not finite: mend it")
            yield from zip(found, np.asarray(masks)[: len(found)], strict=True)

    return segmented()


def _write(output: Path, file: str, mask: "np.ndarray", pretrained: "Pretrained") -> bool:
    """Writes the mask of an image, and it over the image; tells whether it could be read again."""
    from PIL import Image

    from vit_jax.data.images import read_image
    from vit_jax.data.preprocess import onto_image
    from vit_jax.evaluation.mask_pictures import overlay, save_mask

    preprocessing, name = pretrained.preprocessing, Path(file).stem
    try:
        image = read_image(file, channels=preprocessing.channels)
    except UserError as error:
        command.report(error)
        return False
    whole = onto_image(mask, preprocessing, *image.shape[:2])
    # Of other channels than three the first is shown.
    rgb = image if image.shape[-1] == 3 else image[..., :1].repeat(3, axis=-1)
    with atomic_write(output / f"{name}.png") as temporary:
        save_mask(temporary, whole)
    with atomic_write(output / f"{name}.overlay.jpg") as temporary:
        Image.fromarray(overlay(rgb, whole)).save(temporary, "JPEG", quality=90)
    print(printable(f"{file}: {output / name}.png"), flush=True)
    return True


def build_parser(prog: str = "python -m vit_jax.segment") -> command.Parser:
    """The parser of the command line, under the name by which the command is called."""
    parser = command.Parser(
        prog=prog, description="Tells the class of every pixel of images.", epilog=_EPILOG
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_DIR", help="directories are searched recursively"
    )
    flags.add_flags(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="gets two files an image")
    parser.add_argument(
        "--batch_size", type=command.positive, default=8, metavar="N", help="at a time [8]"
    )
    return parser


if __name__ == "__main__":
    command.run(main)
