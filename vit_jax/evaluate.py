"""The command that evaluates a model on a data set: `python -m vit_jax.evaluate`."""

import argparse
import csv
import logging
import math
import os
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax import command, tensorflow_env
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError
from vit_jax.files import atomic_write, of_run, write_json
from vit_jax.printable import csv_cell, printable

if TYPE_CHECKING:
    import numpy as np

    from vit_jax.checkpoints.pretrained import Pretrained
    from vit_jax.evaluation.metrics import ClassificationMetrics
    from vit_jax.evaluation.report import Report

# Pairs of classes that are listed.
_CONFUSED = 10
# Of images; and of masks, where each pixel has logits: 157 MB an image of 512 pixels, 150 classes;
# likewise of boxes, whose images are large.
_BATCH_SIZE, _BATCH_SIZE_OF_DENSE = 128, 8


def build_parser(prog: str = "python -m vit_jax.evaluate") -> command.Parser:
    """The parser of the command line, under the name by which the command is called."""
    parser = command.Parser(prog=prog, description="Evaluates a model on a data set.")
    flags.add_flags(parser)
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="a folder or list of images, a TFDS name, digits, imagenet2012_real, or "
        "objectnet:PATH [of a run its own, what it held out]",
    )
    command.add_image_flags(parser, batch_size=None, usual="128, of a model of pixels or boxes 8")
    parser.add_argument(
        "--per_class",
        action="store_true",
        help="also precision, recall and F1 of each class, and the classes confused most",
    )
    parser.add_argument(
        "--confusion", metavar="FILE", help="images by [true, predicted] class, as .npz or .csv"
    )
    parser.add_argument(
        "--fewshot", metavar="SHOTS", help="images per class to learn from, such as 1,5,10,25"
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a page with the worst images, confusion and classes here: report.html, "
        "worst.png, confusion.png, per_class.csv; of a model of pixels or boxes masks.png or "
        "boxes.png, per_class.csv",
    )
    parser.add_argument(
        "--among",
        choices=("all", "dataset"),
        default="all",
        help="whether the model chooses among all classes that it knows, or those of the data set "
        "alone, which may be some of them [all]",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--ignore_class_names",
        action="store_true",
        help="class i of the model is class i of the data set, whatever the two are called",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: an argument is unknown, missing or impossible.
    """
    args = build_parser().parse_args(argv)
    if args.fewshot is not None:
        from vit_jax.evaluation.fewshot import parse_shots  # With JAX: --help should not wait.

        args.fewshot = parse_shots(args.fewshot)
    if args.confusion and not args.confusion.endswith((".npz", ".csv")):
        raise UserError(f"--confusion {args.confusion} is neither .npz nor .csv")
    for path in filter(None, (args.confusion, args.json)):
        if os.path.isdir(path) or not pathlib.Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} is not a file in a directory that exists")
    if args.report and not _may_be_folder(pathlib.Path(args.report).absolute()):
        raise UserError(
            f"--report {args.report} is not a folder, or one in a directory that exists"
        )
    return args


def _may_be_folder(path: pathlib.Path) -> bool:
    return path.is_dir() or (not path.exists() and path.parent.is_dir())


class _Checkpoint:
    """A pretrained model on all devices."""

    def __init__(self, args: argparse.Namespace):
        from vit_jax.sharding import make_mesh

        self.mesh = make_mesh()
        self._take(flags.load(args))
        usual = _BATCH_SIZE_OF_DENSE if self.mask_names or self.box_names else _BATCH_SIZE
        batch_size = args.batch_size or usual
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size

    def _take(self, pretrained: "Pretrained") -> None:
        import jax

        from vit_jax.checkpoints.decoder import with_decoder
        from vit_jax.checkpoints.detector import with_detector
        from vit_jax.evaluation.metrics import make_apply_fn
        from vit_jax.models import create_model
        from vit_jax.sharding import state_sharding

        self.pretrained = pretrained
        if pretrained.segmentation is not None:
            self.model, params = with_decoder(pretrained)
        elif pretrained.detection is not None:
            self.model, params = with_detector(pretrained)
        else:
            self.model, params = create_model(pretrained.model), pretrained.params
        self.apply_fn = make_apply_fn(self.model, self.mesh)
        self.params = jax.device_put(params, state_sharding(params, self.mesh))

    def label(self, source: Any, args: argparse.Namespace) -> tuple[Any, tuple[int, ...]]:
        """A source with labels of the head, and the head's class of each of the source's."""
        from vit_jax.evaluation.class_names import explain, label

        num_classes, names = self.pretrained.model["num_classes"], self.pretrained.class_names
        if args.ignore_class_names:
            names = None
        labeled, labels = label(source, num_classes, names, explain)
        self.pretrained.check_head()
        if args.among == "dataset" and len(labels) < num_classes:
            from vit_jax.checkpoints.selection import select_classes

            self._take(select_classes(self.pretrained, labels))
            print(f"the {len(labels)} classes of the data set are chosen among, of {num_classes}")
            return source, tuple(range(len(labels)))
        if labeled is not source:
            print(f"classes are matched by name: {len(labels)} of the checkpoint's {num_classes}")
        return labeled, labels

    @property
    def mask_names(self) -> tuple[str, ...]:
        """The names of the classes of pixels; none of a model of whole images."""
        decoder = self.pretrained.segmentation
        return () if decoder is None else decoder.class_names

    @property
    def box_names(self) -> tuple[str, ...]:
        """The names of the classes of objects; none of a model of whole images."""
        detector = self.pretrained.detection
        return () if detector is None else detector.class_names

    def batches(self, source: Any) -> Any:
        """The images of a source, as the model sees them."""
        from vit_jax.data.pipeline import eval_batches

        return eval_batches(
            source, batch_size=self.batch_size, preprocessing=self.pretrained.preprocessing
        )

    def run(self, function: Callable, source: Any, **options: Any) -> Any:
        """Calls a function of `evaluation.metrics` on a source."""
        batches = self.batches(source)
        return function(self.apply_fn, self.params, batches, self.mesh, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_arguments(argv)
    tensorflow_env.silence()
    command.keep_programs()
    # Where it is imported, for a report, it tells of a home without a cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from vit_jax.data import datasets, objectnet

    if args.dataset is None:
        _take_from_run(args)
    args.dataset = datasets.name_or_path(args.dataset)
    result: dict[str, Any] = {"checkpoint": args.checkpoint, "dataset": args.dataset}
    if args.dataset == datasets.REAL:
        if args.fewshot or args.per_class or args.confusion or args.report:
            raise UserError(
                f"{datasets.REAL} has several labels an image: --fewshot, --per_class, "
                "--confusion and --report need --dataset imagenet2012"
            )
        source = datasets.open_real(data_dir=args.data_dir, split=args.split or "validation")
        result |= {"split": source.split} | _evaluate_real(_Checkpoint(args), source, args)
    elif args.dataset.startswith(objectnet.PREFIX):
        result |= _evaluate_objectnet(args)
    else:
        checkpoint = _Checkpoint(args)
        files = _file_rules(args, checkpoint)
        source = datasets.open_evaluation(
            args.dataset,
            data_dir=args.data_dir,
            split=args.split,
            files=files,
            mask_classes=len(checkpoint.mask_names) or None,
            has_boxes=bool(checkpoint.box_names),
        )
        for note in source.notes:
            print(printable(note), flush=True)
        evaluate = _evaluate_several_labels if source.multi_label else _evaluate_classes
        evaluate = _evaluate_masks if source.has_masks else evaluate
        evaluate = _evaluate_boxes if source.has_boxes else evaluate
        result |= {"split": source.split} | evaluate(checkpoint, source, args)
        if args.fewshot:
            result |= _evaluate_fewshot(checkpoint, args)
    if args.json:
        write_json(pathlib.Path(args.json), result)
    return 0


def _take_from_run(args: argparse.Namespace) -> None:
    """Completes the flags by the images that the run of the checkpoint was evaluated on."""
    from vit_jax.config import read_config

    path = of_run(args.checkpoint, "config.json")
    if path is None or not (path.parent / "checkpoints").is_dir():
        raise UserError(
            f"--dataset is missing, and {args.checkpoint} is not a run, whose data set would be "
            "taken: add --dataset, for example a folder with a directory of images for each class"
        )
    data = read_config(str(path)).dataset
    args.dataset = data.name
    args.data_dir = args.data_dir or data.data_dir
    args.split = args.split or data.eval_split
    print(printable(f"of {path}: --dataset {data.name}"), flush=True)


def _file_rules(args: argparse.Namespace, checkpoint: _Checkpoint) -> Any:
    """Images without splits are divided as the checkpoint's run had them, if it is theirs."""
    from vit_jax.data import datasets, holdout

    of_files = datasets.is_of_files(args.dataset)
    partition = holdout.of_checkpoint(args.checkpoint) if of_files else None
    return datasets.FileRules(
        broken=args.broken,
        skip_flag="--broken skip",
        partition=partition,
        must_fit=False,
        channels=checkpoint.pretrained.preprocessing.channels,
    )


def _evaluate_classes(
    checkpoint: _Checkpoint, source: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from vit_jax.data import datasets
    from vit_jax.evaluation.metrics import classification_metrics

    try:
        labeled, labels = checkpoint.label(source, args)
    except UserError as error:
        if not args.fewshot or args.per_class or args.confusion or args.report:
            raise
        print(f"the head is left out: {error}")
        return {}
    found = checkpoint.run(classification_metrics, labeled, loss=checkpoint.pretrained.loss)
    result: dict[str, Any] = {**found.scalars()}
    _print_rows(result)
    if re.split("[:/]", args.dataset)[0] == "imagenet2012" and source.split == "validation":
        try:
            real = datasets.open_real(data_dir=args.data_dir)
        except UserError as error:
            print(f"ImageNet-ReaL is left out: {error}")
        else:
            result |= _evaluate_real(checkpoint, real, args)
    if args.confusion:
        _write_confusion(args.confusion, found.confusion(), labeled.class_names)
    scores = found.per_class()
    rows = [
        {"name": name, **scores.row(label)}
        for name, label in zip(source.class_names, labels, strict=True)
    ]
    if args.per_class:
        result |= _show_classes(rows, found, labeled.class_names)
    if args.report:
        from vit_jax.evaluation.report import of_classes

        _write_report(of_classes, checkpoint, found, labeled, rows, args)
    return result


def _show_classes(
    rows: Sequence[dict[str, Any]], found: "ClassificationMetrics", names: Sequence[str]
) -> dict[str, Any]:
    """Prints the scores of every class and the most confused pairs; returns them for JSON."""
    from vit_jax.evaluation.per_class import most_confused

    pairs = [
        {"true": names[true], "predicted": names[predicted], "examples": images}
        for true, predicted, images in most_confused(found.labels, found.predicted, _CONFUSED)
    ]
    _print_per_class(rows)
    _print_confused(pairs)
    # Of the images of a class, the accuracy is the recall.
    of_classes = [{"name": row["name"], "accuracy": row["recall"], **row} for row in rows]
    return {"per_class": of_classes, "most_confused": pairs}


def _evaluate_masks(
    checkpoint: _Checkpoint, source: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from vit_jax.evaluation.segmentation import examples, make_counting, segmentation_metrics
    from vit_jax.pixel_classes import check_same_classes

    if args.fewshot or args.among == "dataset":
        raise UserError(
            f"{args.dataset} has masks, and a model of pixels: leave --fewshot and --among out"
        )
    pretrained, names = checkpoint.pretrained, checkpoint.mask_names
    check_same_classes(
        source.name,
        source.class_names,
        names,
        pretrained.source,
        by_name=not args.ignore_class_names,
    )
    counting = make_counting(checkpoint.model, checkpoint.mesh)
    batches = checkpoint.batches(source)
    found = segmentation_metrics(counting, checkpoint.params, batches, checkpoint.mesh)
    result: dict[str, Any] = {**found.scalars()}
    _print_rows(result)
    rows = found.per_class(names)
    if args.per_class:
        result["per_class"] = rows
        _print_per_class(rows)
    if args.confusion:
        _write_confusion(args.confusion, found.confusion, names)
    if args.report:
        from vit_jax.evaluation.mask_pictures import write_report

        shown = examples(checkpoint.model, checkpoint.params, source, pretrained.preprocessing)
        _write_pages(lambda *place: write_report(*place, shown, rows), source, args)
    return result


def _evaluate_boxes(
    checkpoint: _Checkpoint, source: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from vit_jax.evaluation import detection
    from vit_jax.evaluation.detections import detect, make_detecting
    from vit_jax.pixel_classes import check_same_classes

    if args.fewshot or args.confusion or args.among == "dataset":
        raise UserError(
            f"{args.dataset} has boxes, and a model of objects: leave --fewshot, --confusion and "
            "--among out"
        )
    pretrained, names = checkpoint.pretrained, checkpoint.box_names
    by_name = not args.ignore_class_names
    check_same_classes(
        source.name, source.class_names, names, pretrained.source, by_name=by_name, what="boxes"
    )
    detection.check_installed()
    detecting = make_detecting(checkpoint.model, checkpoint.mesh)
    batches, mesh = checkpoint.batches(source), checkpoint.mesh
    found = list(detect(detecting, checkpoint.params, batches, mesh, pretrained.preprocessing))
    truth = detection.truth(source)
    measured = detection.detection_metrics(found, truth, names)
    result: dict[str, Any] = {**measured.scalars()}
    _print_rows(result)
    rows = measured.per_class(names)
    if args.per_class:
        result["per_class"] = rows
        _print_per_class(rows)
    if args.report:
        from vit_jax.evaluation.box_pictures import examples, write_report

        shown = examples(source, found, truth, pretrained.preprocessing.channels)
        _write_pages(lambda *place: write_report(*place, shown, rows), source, args)
    return result


def _evaluate_several_labels(
    checkpoint: _Checkpoint, source: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from vit_jax.evaluation.multilabel import check_loss, multilabel_metrics

    if args.fewshot or args.confusion:
        raise UserError(
            f"{args.dataset} has several labels an image, which are no single class: leave "
            "--fewshot and --confusion out"
        )
    check_loss(args.dataset, checkpoint.pretrained.loss)
    labeled, labels = checkpoint.label(source, args)
    found = checkpoint.run(multilabel_metrics, labeled)
    result: dict[str, Any] = {**found.scalars()}
    _print_rows(result)
    scores, precisions = found.per_class(), found.average_precision()
    rows = [
        {"name": name, "average_precision": _or_none(precisions[label]), **scores.row(label)}
        for name, label in zip(source.class_names, labels, strict=True)
    ]
    if args.per_class:
        result["per_class"] = rows
        _print_per_class(rows)
    if args.report:
        from vit_jax.evaluation.report import of_labels

        _write_report(of_labels, checkpoint, found, labeled, rows, args)
    return result


def _evaluate_real(
    checkpoint: _Checkpoint, source: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from vit_jax.evaluation.metrics import real_accuracy

    labeled, _ = checkpoint.label(source, args)
    accuracy, examples = checkpoint.run(real_accuracy, labeled)
    result = {"real_accuracy": accuracy, "real_examples": examples}
    _print_rows(result)
    return result


def _evaluate_objectnet(args: argparse.Namespace) -> dict[str, Any]:
    from vit_jax.data import objectnet
    from vit_jax.evaluation.metrics import multilabel_accuracy

    if args.fewshot or args.per_class or args.confusion or args.report or args.split:
        raise UserError(
            "objectnet has several labels an image and is a test set alone: leave --fewshot, "
            "--per_class, --confusion, --report and --split out"
        )
    source, found, passed_over = objectnet.open_objectnet(args.dataset)
    checkpoint = _Checkpoint(args)
    num_classes = checkpoint.pretrained.model["num_classes"]
    if num_classes != len(source.class_names):
        raise UserError(
            f"the checkpoint has {num_classes} classes and ObjectNet is scored by ImageNet's "
            f"{len(source.class_names)}: give a checkpoint that was fine-tuned on imagenet2012"
        )
    labeled, _ = checkpoint.label(source, args)
    expected = len(objectnet.classes())
    print(f"{found} of the {expected} classes of ObjectNet that ImageNet has, too")
    print(f"{passed_over} directories of other classes are passed over", flush=True)
    result = checkpoint.run(multilabel_accuracy, labeled)
    _print_rows(result)
    return {"split": source.split, "classes": found, "passed_over": passed_over} | result


def _evaluate_fewshot(checkpoint: _Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    from vit_jax.data import datasets
    from vit_jax.evaluation.fewshot import create_fewshot

    # Of images without splits those held out: all, which the head is scored on, are learned from.
    files = _file_rules(args, checkpoint)
    train, test = datasets.open_dataset(
        args.dataset, data_dir=args.data_dir, eval_split=args.split, files=files
    )
    if train.partition is not None:
        print(
            f"few-shot: learned from {train.split}, {train.num_examples:,} images, and scored on "
            f"{test.split}, {test.num_examples:,}",
            flush=True,
        )
    evaluator = create_fewshot(
        checkpoint.model,
        train,
        test,
        shots=args.fewshot,
        preprocessing=checkpoint.pretrained.preprocessing,
        batch_size=checkpoint.batch_size,
        mesh=checkpoint.mesh,
    )
    result: dict[str, Any] = {}
    for number, accuracies in evaluator(checkpoint.params).items():
        mean = statistics.fmean(accuracies)
        result[str(number)] = {"accuracy": mean, "seeds": accuracies}
        seeds = ", ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        print(f"{f'{number}-shot accuracy':20}{mean:10.4f}   of seeds {seeds}")
    return {"fewshot": result, "fewshot_split": test.split}


def _print_rows(result: dict[str, Any]) -> None:
    for name, value in result.items():
        text = f"{value:.4f}" if isinstance(value, float) else f"{value}"
        print(f"{name.replace('_', ' '):20}{text:>10}", flush=True)


def _print_per_class(rows: Sequence[dict[str, Any]]) -> None:
    names = ["class", *(_shown(row["name"]) for row in rows)]
    columns = [key for key in rows[0] if key != "name"]
    header = [_HEADERS.get(key, key) for key in columns]
    lines = [header, *([_share(row[key]) for key in columns] for row in rows)]
    width = max(map(len, names))
    for name, cells in zip(names, lines, strict=True):
        print(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells))


_HEADERS = {"f1": "F1", "iou": "IoU", "average_precision": "AP", "examples": "images"}


def _share(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _print_confused(pairs: Sequence[dict[str, Any]]) -> None:
    if pairs:
        print("confused most:")
    for pair in pairs:
        true, predicted = _shown(pair["true"]), _shown(pair["predicted"])
        print(f"{pair['examples']:6}  {true} taken for {predicted}")


def _shown(name: str) -> str:
    from vit_jax.data import imagenet

    return printable(imagenet.readable(name))[:40]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _write_report(
    make: Callable[..., "Report"],
    checkpoint: _Checkpoint,
    found: Any,
    source: Any,
    rows: Sequence[dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    from vit_jax.evaluation.report import write

    preprocessing = checkpoint.pretrained.preprocessing
    _write_pages(
        lambda folder, title: write(folder, make(title, found, source, preprocessing, rows)),
        source,
        args,
    )


def _write_pages(
    write: Callable[[pathlib.Path, str], Sequence[pathlib.Path]],
    source: Any,
    args: argparse.Namespace,
) -> None:
    """Writes what --report asks for into its folder, under a title, and prints its paths."""
    title = f"{args.checkpoint} on {args.dataset}, {source.split}"
    for path in write(pathlib.Path(args.report), title):
        print(printable(str(path)), flush=True)


def _write_confusion(path: str, matrix: "np.ndarray", class_names: Sequence[str]) -> None:
    import numpy as np

    with atomic_write(pathlib.Path(path)) as temporary:
        if path.endswith(".npz"):
            with temporary.open("wb") as file:
                np.savez_compressed(file, confusion=matrix, class_names=np.array(class_names))
            return
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = [csv_cell(name) for name in class_names]
            writer.writerow(["true \\ predicted", *names])
            rows = zip(names, matrix.tolist(), strict=True)
            writer.writerows([name, *row] for name, row in rows)


if __name__ == "__main__":
    command.run(main)
