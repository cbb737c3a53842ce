"""From images to the objects in them: `python -m vit_jax.detect --checkpoint C IMAGE...`."""

import argparse
import itertools
import json
import os
import re
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
    from vit_jax.evaluation.detections import Detections

RESULTS = "detections.json"
_EPILOG = """Writes to the folder:
  detections.json    all objects in COCO's format of results: image_id, category_id, bbox (left,
                     top, width, height in pixels) and score, and beside these file and category
  photo.boxes.jpg    photo.jpg with the boxes of a score of --threshold or more

Without --annotations an image has the number that it is called by, as 000000000139.jpg 139, or if
one of them is called otherwise its place, and categories are numbered from 1.

examples:
  %(prog)s --checkpoint runs/streets photos/ --output found
  %(prog)s --checkpoint runs/coco coco/val2017 --output found \\
      --annotations coco/annotations/instances_val2017.json

exit codes:
  0  every image was looked at
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
    check_names(files, "pictures", "detect")
    check_output(args.output, args.images, files, "pictures")
    numbers = _Numbers(pretrained, files, args.annotations)
    output, results, done = Path(args.output), [], 0
    make_folder(output)
    for file, image, found in detect(pretrained, files, args.batch_size):
        results += numbers.rows(file, found)
        _draw(output, file, image, found.above(args.threshold), pretrained)
        done += 1
    if not done:
        return 2
    with atomic_write(output / RESULTS) as temporary:
        temporary.write_text(json.dumps(results) + "\n")
    return 0 if done == len(files) else 1


def detect(
    pretrained: "Pretrained", files: Sequence[str], batch_size: int
) -> Iterator[tuple[str, "np.ndarray", "Detections"]]:
    """Yields every image that can be read, with its pixels and the objects in it.

    One that cannot is a line on stderr. Images are seen as in evaluation, in batches of one shape.

    Args:
        pretrained: of a run of detection.
        files: image files.
        batch_size: how many images are looked at at a time, at most.

    Raises:
        UserError: the checkpoint is no such one, or its outputs are not finite.
    """
    import jax

    from vit_jax.checkpoints.detector import with_detector
    from vit_jax.data.image_files import read_batches
    from vit_jax.data.images import read_image
    from vit_jax.evaluation.detections import MOST_CANDIDATES, in_original
    from vit_jax.evaluation.metrics import one_ahead
    from vit_jax.models.detection import Found, candidates

    module, params = with_detector(pretrained)
    params = jax.device_put(params)
    preprocessing = pretrained.preprocessing

    @jax.jit
    def find(params: dict, images: "np.ndarray") -> Found:
        cells: Any = module.apply({"params": params}, images)
        return candidates(cells, preprocessing.image_shape[:2], MOST_CANDIDATES)

    batches = read_batches(files, preprocessing, batch_size, command.report)
    started = ((names, find(params, batch)) for names, batch in batches)
    for names, found in one_ahead(started):
        on_host = jax.device_get(found)
        for index, file in enumerate(names):
            try:
                image = read_image(file, channels=preprocessing.channels)
            except UserError as error:  # It has gone in the meantime.
                command.report(error)
                continue
            one = Found(*(array[index] for array in on_host))
            yield file, image, in_original(one, preprocessing, *image.shape[:2])


class _Numbers:
    """The numbers of images and categories in COCO's format of results.

    Args:
        pretrained: of a run of detection.
        files: image files.
        annotations: a file in COCO's format that has numbers for them; "" for none.

    Raises:
        UserError: the file cannot be read, lacks one of the model's classes or an image, or has two
            that an image may be.
    """

    def __init__(self, pretrained: "Pretrained", files: Sequence[str], annotations: str):
        from vit_jax.checkpoints.detector import with_detector

        with_detector(pretrained)  # Before anything is written.
        assert pretrained.detection is not None
        self._names = pretrained.detection.class_names
        self._categories = {name: index for index, name in enumerate(self._names, 1)}
        self._images = dict(zip(files, _numbers(files), strict=True))
        if annotations:
            self._follow(annotations, files)

    def _follow(self, annotations: str, files: Sequence[str]) -> None:
        from vit_jax.data.coco_file import read_coco

        given = read_coco(annotations)
        self._categories = {name: number for number, name in given.categories.items()}
        if missing := [name for name in self._names if name not in self._categories]:
            raise UserError(
                f"--annotations {annotations} has no category {missing[0]!r}, which the model has: "
                "give those that it was trained with"
            )
        names: dict[str, list[str]] = {}
        for name in given.image_ids:
            names.setdefault(Path(name).name, []).append(name)
        self._images = {
            file: given.image_ids[_named_as(file, names.get(Path(file).name, []), annotations)]
            for file in files
        }

    def rows(self, file: str, found: "Detections") -> list[dict[str, Any]]:
        """The objects of an image as COCO's results."""
        rows = []
        for (left, top, right, bottom), label, score in zip(
            found.corners.tolist(), found.classes, found.scores, strict=True
        ):
            name = self._names[label]
            box = [round(x, 2) for x in (left, top, right - left, bottom - top)]
            row = {"image_id": self._images[file], "category_id": self._categories[name]}
            rows.append({**row, "bbox": box, "score": float(score), "file": file, "category": name})
        return rows


def _named_as(file: str, names: Sequence[str], annotations: str) -> str:
    """Picks the most like a file's path of names in annotations, all of which end as the file's.

    Raises:
        UserError: there is none, or several are.
    """
    if not names:
        raise UserError(
            f"--annotations {annotations} has no image {printable(Path(file).name)}: give images "
            "that it has"
        )
    path = Path(os.path.abspath(file)).parts
    alike = [_common_tail(path, Path(name).parts) for name in names]
    best = [name for name, count in zip(names, alike, strict=True) if count == max(alike)]
    if len(best) > 1:
        raise UserError(
            f"--annotations {annotations} has {best[0]} and {best[1]}, and {file} may be either: "
            "give images that lie in folders as it names them"
        )
    return best[0]


def _common_tail(path: Sequence[str], other: Sequence[str]) -> int:
    """The number of parts in which two paths agree, from the last on."""
    pairs = zip(reversed(path), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _numbers(files: Sequence[str]) -> Sequence[int]:
    """The numbers that files are called by, as COCO's are, or else their places from 1 on."""
    stems = [Path(file).stem for file in files]
    if all(re.fullmatch(r"[0-9]{1,18}", stem) for stem in stems):
        numbers = list(map(int, stems))
        if len({*numbers}) == len(numbers):
            return numbers
    return range(1, len(files) + 1)


def _draw(
    output: Path,
    file: str,
    image: "np.ndarray",
    found: "Detections",
    pretrained: "Pretrained",
) -> None:
    """Writes an image with the boxes found in it."""
    from PIL import Image

    from vit_jax.evaluation.box_pictures import draw, rgb

    assert pretrained.detection is not None
    path = output / f"{Path(file).stem}.boxes.jpg"
    names = pretrained.detection.class_names
    picture = draw(rgb(image), found.corners, found.classes, names, found.scores)
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary, "JPEG", quality=90)
    print(printable(f"{file}: {len(found.scores)} objects, {path}"), flush=True)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def build_parser(prog: str = "python -m vit_jax.detect") -> command.Parser:
    """The parser of the command line, under the name by which the command is called."""
    parser = command.Parser(prog=prog, description="Finds objects in images.", epilog=_EPILOG)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_DIR", help="directories are searched recursively"
    )
    flags.add_flags(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="gets what is found")
    parser.add_argument(
        "--threshold", type=_share, default=0.5, metavar="P", help="score of what is drawn [0.5]"
    )
    parser.add_argument(
        "--annotations", default="", metavar="JSON", help="whose numbers the results have"
    )
    parser.add_argument(
        "--batch_size", type=command.positive, default=8, metavar="N", help="at a time [8]"
    )
    return parser


if __name__ == "__main__":
    command.run(main)
