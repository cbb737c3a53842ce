"""Object detection of drawn shapes, where the right answer is known.

python -m experiments.detection [--small] [--workdir W]

Draws discs, squares and triangles of any color on noise, and writes their boxes in COCO's format.
Says what the grid of cells can reach: the AP of cells that tell just what they learn. Then trains
configs/detection.py:tiny, prints its AP beside that, and writes a picture of images with the true
boxes and with those found. With --small the color of a shape tells its class, and the model has two
layers. Started again it goes on where it stopped. Each number of images, with --small or without,
has a folder of its own in W.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

if not __package__:
    sys.exit("error: this is a module now: run python -m experiments.detection")

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from experiments.segmentation import CLASSES as MASKS
from experiments.segmentation import draw as draw_masks
from vit_jax import command, config_files, tensorflow_env
from vit_jax.data.boxes import Boxes, in_rows
from vit_jax.data.protocols import evaluation
from vit_jax.evaluation.detection import DetectionMetrics, detection_metrics
from vit_jax.evaluation.detections import MOST_CANDIDATES, in_original
from vit_jax.files import atomic_folder, make_folder
from vit_jax.models.detection import Cells, Found, candidates
from vit_jax.models.detection_loss import assign

CLASSES = MASKS[1:]
SIDE = 64
_SURE = 20.0  # a logit


class Drawn(NamedTuple):
    """An image, uint8 [side, side, 3], its objects' boxes, and pixels of each."""

    image: np.ndarray
    boxes: Boxes


def draw(rng: np.random.Generator, side: int = SIDE, colored: bool = False) -> Drawn:
    """Draws one to three shapes that do not touch, as `experiments.segmentation.draw` does.

    A box reaches from the first pixel of a shape to the last, and no shape lies in another's: so
    what is connected in the mask is a shape.
    """
    import cv2

    drawn = draw_masks(rng, side, colored)
    corners, classes, areas = [], [], []
    for label in range(1, len(MASKS)):
        _, _, stats, _ = cv2.connectedComponentsWithStats(np.uint8(drawn.mask == label))
        for left, top, width, height, area in stats[1:].tolist():
            corners.append([left, top, left + width, top + height])
            classes.append(label - 1)
            areas.append(area)
    return Drawn(
        drawn.image,
        Boxes(
            np.array(corners, np.float64).reshape(-1, 4),
            np.array(classes, np.int32),
            np.zeros(len(classes), bool),
            np.array(areas, np.float64),
        ),
    )


def write_folder(
    folder: pathlib.Path, counts: dict[str, int], side: int = SIDE, colored: bool = False
) -> None:
    """Writes images and annotations as `data.coco_folder` reads them, all or nothing.

    Nothing is written where the folder is there already. The ids of the categories have gaps, as
    COCO's.

    Args:
        folder: gets a directory for each split, and annotations/.
        counts: the images of each split.
        side: as in `draw`.
        colored: likewise.
    """
    if folder.exists():
        return
    make_folder(folder.parent, "--workdir")
    with atomic_folder(folder) as new:
        (new / "annotations").mkdir()
        for seed, (split, count) in enumerate(counts.items()):
            (new / split).mkdir()
            rng, images, annotations = np.random.default_rng(seed), [], []
            for index in range(count):
                drawn, name = draw(rng, side, colored), f"{index:04}.png"
                Image.fromarray(drawn.image).save(new / split / name)
                images.append({"id": index, "file_name": name, "height": side, "width": side})
                annotations += _annotations(index, drawn.boxes, len(annotations))
            categories = [{"id": 7 * i + 3, "name": name} for i, name in enumerate(CLASSES)]
            document = {"images": images, "annotations": annotations, "categories": categories}
            path = new / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(document))


def _annotations(image: int, boxes: Boxes, number: int) -> list[dict]:
    return [
        {
            "id": number + index,
            "image_id": image,
            "category_id": 7 * int(label) + 3,
            "bbox": [left, top, right - left, bottom - top],
            "area": area,
            "iscrowd": 0,
        }
        for index, ((left, top, right, bottom), label, area) in enumerate(
            zip(boxes.corners.tolist(), boxes.classes, boxes.areas.tolist(), strict=True)
        )
    ]


def ceiling(truth: Sequence[Boxes], grid: tuple[int, int], side: int) -> DetectionMetrics:
    """The scores of cells that tell just what they learn, whatever the model.

    They miss objects of which no cell is told, since they are small or lie under smaller ones.

    Args:
        truth: the objects of each image.
        grid: rows and columns of cells.
        side: of the images, in pixels.
    """
    most = max(map(len, truth))
    labels = np.stack([in_rows(x.corners, x.classes, most) for x in truth])
    targets = assign(jnp.asarray(labels), grid, (side, side))
    told = np.asarray(targets.classes)[..., None] == np.arange(len(CLASSES))
    centerness = np.asarray(targets.centerness)
    cells = Cells(
        jnp.where(told, _SURE, -_SURE),
        targets.distances,
        jnp.asarray(np.log(centerness + 1e-6) - np.log1p(1e-6 - centerness)),
    )
    found = candidates(cells, (side, side), MOST_CANDIDATES)
    rule = evaluation("letterbox", side)
    each = [
        in_original(Found(*(np.asarray(x)[index] for x in found)), rule, side, side)
        for index in range(len(truth))
    ]
    return detection_metrics(each, truth, CLASSES)


def config_of(args: argparse.Namespace, folder: pathlib.Path) -> ConfigDict:
    """The config of the run on a folder of images and annotations."""
    config = config_files.load(f"detection:tiny,folder:{folder}").config
    if args.small:
        config.batch_size = 16
        config.model.num_layers = 2
        config.detection.update({"width": 32, "layers": 1})
    config.duration = f"{args.steps or (800 if args.small else 2000)} steps"
    return config


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        default=pathlib.Path("runs/detection"),
        metavar="DIR",
        help="gets the images, the run and the picture [runs/detection]",
    )
    parser.add_argument("--small", action="store_true", help="colored shapes and a small model")
    parser.add_argument(
        "--steps", type=command.positive, metavar="N", help="of the run [2000, small 800]"
    )
    parser.add_argument(
        "--images", type=command.positive, metavar="N", help="to train on [2000, small 1000]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_parser("python -m experiments.detection").parse_args(argv)
    tensorflow_env.quiet()
    from vit_jax import evaluate
    from vit_jax.data.datasets import open_evaluation
    from vit_jax.evaluation.detection import truth
    from vit_jax.train import train

    counts = {"train": args.images or (1000 if args.small else 2000), "test": 200}
    place = args.workdir / f"{'small-' * args.small}{counts['train']}"
    folder, run = place / "shapes", place / "run"
    config = config_of(args, folder)
    write_folder(folder, counts, colored=args.small)
    source = open_evaluation(f"folder:{folder}", split="test", has_boxes=True)
    rows = SIDE // config.model.patch_size * config.detection.upsample
    best = ceiling(truth(source), (rows, rows), SIDE).scalars()
    print(f"ceiling: AP {best['AP']:.4f} of cells that tell just what they learn", flush=True)
    final = train(config, run)
    flags = ["--checkpoint", str(run), "--dataset", f"folder:{folder}", "--split", "test"]
    evaluate.main([*flags, "--per_class", "--report", str(place / "report")])
    print(f"AP {final['AP']:.4f}, of a ceiling of {best['AP']:.4f}")
    return 0


if __name__ == "__main__":
    command.run(main)
