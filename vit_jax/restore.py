"""From images to what a model makes of half of them: `python -m vit_jax.restore`, see docs."""

import argparse
import contextlib
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from vit_jax import command
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.files import atomic_write, make_folder
from vit_jax.image_outputs import check_names, check_output
from vit_jax.image_size import sides
from vit_jax.printable import printable

if TYPE_CHECKING:
    import jax
    import numpy as np

    from vit_jax.checkpoints.pretrained import Pretrained
    from vit_jax.evaluation.pictures import Shown

_IMAGES_A_SHEET = 6
_EPILOG = """Writes to the folder, for photo.jpg:
  photo.restored.png  what the model sees of the image, at the size of its input, in which masked
                      patches are replaced by the predicted ones
  sheet-1.png         image, masked image and restored image of the first six, and so on

Prints the error of each, the root mean square of masked pixels in gray levels of 255, beside that
of the mean color of what is left, and of an interpolation from the edges inward (Telea, OpenCV).

examples:
  %(prog)s --checkpoint runs/restoration photos/ --output restored
  %(prog)s --checkpoint runs/restoration photo.jpg --output restored --share 0.25 --seed 3

exit codes:
  0  every image was restored
  1  some could not be read; each is one line on stderr, the others were done
  2  none could be read, or a flag or the checkpoint is wrong"""


class Restored(NamedTuple):
    """An image, float32 [height, width, 3] in [0, 1] of the size of the model's input.

    Attributes:
        file: it was read from.
        image: as the model would see it as a whole.
        masked: likewise, gray where it is masked.
        restored: likewise, with predicted patches there.
        errors: of the masked pixels, see `evaluation.restoration.error`: "model", "mean color" and
            "neighbors".
    """

    file: str
    image: "np.ndarray"
    masked: "np.ndarray"
    restored: "np.ndarray"
    errors: dict[str, float]


class Restorer:
    """A model of masked patch prediction, and one mask for all images.

    Attributes:
        target: what it predicts, one of `models.masked.TARGETS`.
        mask: bool [height, width], of the size of its input.
    """

    def __init__(self, pretrained: "Pretrained", share: float, seed: int):
        """Draws the mask.

        Args:
            pretrained: of a run of masked patch prediction.
            share: of the patches that are masked.
            seed: of the mask, which is a function of it, the grid and the share alone.

        Raises:
            UserError: the checkpoint is of no such run, or no patch would be masked, or none left.
        """
        import jax
        import numpy as np

        from vit_jax.checkpoints.patch_head import with_patch_head
        from vit_jax.models.masked import draw_mask

        self._pretrained = pretrained
        self._module, params, self.target = with_patch_head(pretrained)
        grid = self._module.config.grid(*sides(pretrained.preprocessing.image_size))
        patches, size = math.prod(grid), self._module.downsampling
        if not 0 < round(share * patches) < patches:
            raise UserError(
                f"--share {share} of {patches} patches is {round(share * patches)}: one must be "
                "masked at least, and one left"
            )
        self._params = jax.device_put(params)
        self._corruption = draw_mask(jax.random.key(seed), 1, patches, share)
        masked = np.asarray(self._corruption.masked).reshape(grid)
        self.mask = masked.repeat(size, axis=0).repeat(size, axis=1)

    def __call__(self, files: Sequence[str], batch_size: int) -> Iterator[Restored]:
        """Yields every image that can be read; one that cannot is a line on stderr.

        Args:
            files: image files.
            batch_size: how many images are restored at a time, at most.

        Raises:
            UserError: what the model predicts is not finite.
        """
        import jax
        import numpy as np

        from vit_jax.data.image_files import read_batches
        from vit_jax.evaluation.metrics import one_ahead

        predict = jax.jit(self._predict)
        preprocessing = self._pretrained.preprocessing
        batches = read_batches(files, preprocessing, batch_size, command.report)
        started = ((found, batch, predict(self._params, batch)) for found, batch in batches)
        for found, batch, (restored, is_finite) in one_ahead(started):
            if not is_finite:
                source = self._pretrained.source
                raise UserError(f"{source} predicts what is not finite: mend it")
            for file, *both in zip(found, batch, np.asarray(restored), strict=False):
                yield self._beside_baselines(file, *map(preprocessing.to_pixels, both))

    def _predict(self, params: dict, images: "jax.Array") -> "tuple[jax.Array, jax.Array]":
        import jax
        import jax.numpy as jnp

        from vit_jax.models import masked

        count = len(images)
        corruption = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), self._corruption
        )
        predictions: Any = self._module.apply({"params": params}, images, corruption)
        size = self._module.downsampling
        restored = masked.restore(images, predictions, corruption.chosen, self.target, size)
        return restored, jnp.isfinite(predictions).all()

    def _beside_baselines(self, file: str, image: "np.ndarray", restored: "np.ndarray") -> Restored:
        import numpy as np

        from vit_jax.evaluation.restoration import error, with_mean_color, with_neighbors

        radius = self._module.downsampling
        filled = {
            "model": restored,
            "mean color": with_mean_color(image, self.mask),
            "neighbors": with_neighbors(image, self.mask, radius),
        }
        errors = {name: error(image, x, self.mask) for name, x in filled.items()}
        masked = np.where(self.mask[..., None], np.float32(0.5), image)
        return Restored(file, image, masked, restored, errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser("python -m vit_jax.restore").parse_args(argv)
    # PIL warns of odd metadata and large sizes, from several threads.
    warnings.simplefilter("ignore")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It tells of a home without a cache.
    command.keep_programs()
    # Imported here: --help should wait for neither NumPy nor JAX.
    from vit_jax.data.image_files import find_images

    restorer = Restorer(flags.load(args), args.share, args.seed)
    files = find_images(args.images)
    check_names(files, "restored images", "restore")
    check_output(args.output, args.images, files, "restored images")
    output, done = Path(args.output), []
    make_folder(output)
    restored = (_write(output, each) for each in restorer(files, args.batch_size))
    for number in itertools.count(1):
        if not (several := list(itertools.islice(restored, _IMAGES_A_SHEET))):
            break
        sheet = output / f"sheet-{number}.png"
        _draw(sheet, several, args.share, restorer.target)
        print(printable(f"{sheet}: {len(several)} images"), flush=True)
        done += [each.errors for each in several]
    if not done:
        return 2
    mean = {name: sum(errors[name] for errors in done) / len(done) for name in done[0]}
    print(f"mean of {len(done)}: {_in_words(mean)}, of 255 gray levels", flush=True)
    return 0 if len(done) == len(files) else 1


def _in_words(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in errors.items())


def _write(output: Path, each: Restored) -> Restored:
    """Writes the restored image, prints its errors, and gives it back."""
    from PIL import Image

    with atomic_write(output / f"{Path(each.file).stem}.restored.png") as temporary:
        Image.fromarray(_bytes(each.restored)).save(temporary, "PNG")
    print(printable(f"{each.file}: {_in_words(each.errors)}"), flush=True)
    return each


def _draw(sheet: Path, several: Sequence[Restored], share: float, target: str) -> None:
    from vit_jax.evaluation.pictures import SIDE, contact_sheet

    cells = [cell for each in several for cell in _cells(each, share, target)]
    title = f"{share:.0%} of patches masked; RMS error of masked pixels, of 255"
    longest = max(several[0].image.shape)
    figure = contact_sheet(cells, title, columns=min(len(cells), 6))
    with atomic_write(sheet) as temporary:
        # No pixel of an image is lost.
        figure.savefig(temporary, format="png", dpi=max(110, math.ceil(longest / SIDE)))


def _cells(each: Restored, share: float, target: str) -> "tuple[Shown, Shown, Shown]":
    from vit_jax.evaluation.pictures import Shown

    model, *baselines = (f"{name}: {value:.1f}" for name, value in each.errors.items())
    return (
        Shown(_bytes(each.image), (PurePath(each.file).name, "", "")),
        Shown(_bytes(each.masked), (f"{share:.0%} masked", *baselines)),
        Shown(_bytes(each.restored), ("restored", model, f"target: {target}")),
    )


def _bytes(image: "np.ndarray") -> "np.ndarray":
    return (image * 255).round().astype("uint8")


def build_parser(prog: str) -> command.Parser:
    """The parser of the command line, under the name by which the command is called."""
    parser = command.Parser(
        prog=prog,
        description="Masks patches of images, and restores them by a model that learned to.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_DIR", help="directories are searched recursively"
    )
    flags.add_flags(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the files go; made if missing"
    )
    parser.add_argument(
        "--share", type=_share, default=0.5, metavar="S", help="of the patches to mask [0.5]"
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of the mask, one for all images [0]"
    )
    parser.add_argument(
        "--batch_size", type=command.positive, default=8, metavar="N", help="at a time [8]"
    )
    return parser


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")


def _seed(text: str) -> int:
    if text.isdecimal() and len(text) < 12 and int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")


if __name__ == "__main__":
    command.run(main)
