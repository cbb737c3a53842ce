"""The stages of an export one after the other, each compared with the Flax model in float32.

Neither JAX nor TensorFlow is imported before a stage that needs it.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.export import parity, runtime
from vit_jax.export.deploy import write_deploy
from vit_jax.export.folder import check_folder, write_folder
from vit_jax.export.onnx_file import read_onnx
from vit_jax.export.precisions import PRECISIONS, Precision
from vit_jax.export.profiles import parse_batch
from vit_jax.export.readme import README
from vit_jax.export.stages import (
    BOXES,
    DENSE,
    PIXELS,
    Resolution,
    missing_packages,
    obstacles,
    resolve,
)
from vit_jax.export.to_tensorrt import build, summary
from vit_jax.files import make_folder
from vit_jax.image_size import of_sides
from vit_jax.pixel_classes import check_same_classes
from vit_jax.printable import printable

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained
    from vit_jax.export.emulation import Emulation
    from vit_jax.export.forward import Forward


_OF_CLASSES = ("logits", "probabilities")
# Of a graph for any size, the heights and widths that it is compared at, by those of the model.
_OTHER_SIZES = ((0.5, 0.5), (1.5, 2), (2, 0.75))


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The images to compare on: a data set, photographs below a directory, or else synthetic ones.

    Attributes:
        dataset: a TFDS name, folder:PATH or digits; or "".
        split: of the data set, in TFDS syntax; "": validation or test.
        data_dir: where TFDS looks; "": its default.
        directory: of photographs; or "".
        number: how many to compare on, at most.
    """

    dataset: str = ""
    split: str = ""
    data_dir: str = ""
    directory: str = ""
    number: int = 256

    def read(
        self, pretrained: "Pretrained", number: int, outputs: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Preprocessed images, at most `number`, and where the outputs have classes labels.

        Raises:
            UserError: an image is damaged, or the data set has other classes than the model.
        """
        preprocessing = pretrained.preprocessing
        if self.dataset:
            source = self._open(pretrained)
            images, labels = parity.read_dataset(source, preprocessing, number)
            return images, labels if outputs in (*_OF_CLASSES, PIXELS) else None
        if self.directory:
            names = _class_names(pretrained, outputs)
            return parity.read_images(self.directory, preprocessing, names, number)
        return parity.synthetic_images(min(number, 16), preprocessing), None

    def read_raw(
        self, pretrained: "Pretrained", number: int, outputs: str
    ) -> tuple[parity.RawImages, np.ndarray | None]:
        """The images of `read` before they are prepared, and labels; synthetic ones of any size."""
        preprocessing = pretrained.preprocessing
        if self.dataset:
            source = self._open(pretrained)
            raw, labels = parity.raw_dataset(source, preprocessing, number)
            return raw, labels if outputs in _OF_CLASSES else None
        if self.directory:
            names = _class_names(pretrained, outputs)
            return parity.raw_files(self.directory, preprocessing, names, number)
        return parity.synthetic_raw(min(number, 16), preprocessing), None

    def _open(self, pretrained: "Pretrained") -> Any:
        from vit_jax.data.classes import difference
        from vit_jax.data.datasets import FileRules, open_evaluation
        from vit_jax.evaluation.class_names import label

        decoder, detector = pretrained.segmentation, pretrained.detection
        source = open_evaluation(
            self.dataset,
            data_dir=self.data_dir,
            split=self.split,
            files=FileRules(channels=pretrained.preprocessing.channels),
            mask_classes=None if decoder is None else len(decoder.class_names),
            has_boxes=detector is not None,
        )
        if detector is not None:  # Its images alone are looked at.
            return source
        if decoder is not None:
            check_same_classes(
                source.name, source.class_names, decoder.class_names, pretrained.source
            )
            return source
        num_classes, names = pretrained.model["num_classes"], pretrained.class_names
        labeled, _ = label(
            source,
            num_classes,
            names,
            lambda *classes: f"{difference(*classes)}: use --data, which takes any photographs",
        )
        return labeled


def _class_names(pretrained: "Pretrained", outputs: str) -> Sequence[str] | None:
    """The classes of images, where these are what comes out."""
    return pretrained.class_names if outputs in _OF_CLASSES else None


class Export:
    """Makes, compares and times the forms of a model, and writes them to a directory.

    Attributes:
        directory: gets saved_model, model.onnx, model.engine, deploy, parity.json, and what
            `write_folder` makes of them.
        failures: what is not as close to Flax as its precision allows, a line each.
    """

    def __init__(
        self,
        directory: Path,
        *,
        precision: Precision = PRECISIONS["fp32"],
        batch: str = "1:8:64",
        latency_seconds: float = 2.0,
    ):
        """Says what every stage has in common.

        Args:
            directory: see above.
            precision: of the ONNX file and of what is built from it.
            batch: batch sizes to time, and to build the engine for, see `parse_batch`.
            latency_seconds: how long to time each batch size; 0 for not at all.
        """
        self.directory = directory
        self.precision = precision
        self.batch = batch
        self.seconds = latency_seconds
        sizes = {size for p in parse_batch(batch) for size in (p.min, p.opt, p.max)}
        self.batch_sizes = sorted(sizes)
        self.failures: list[str] = []
        self._reference: parity.Reference | None = None
        self._stages: list[dict[str, Any]] = []

    def convert(
        self,
        pretrained: "Pretrained",
        *,
        stages: Sequence[str] | None = None,
        converter: str | None = None,
        outputs: str = "logits",
        layer: int | None = None,
        include_preprocessing: bool = False,
        free_size: bool = False,
        in_graph: bool = False,
        photographs: Photographs = Photographs(),
    ) -> None:
        """The stages in which JAX takes part: the SavedModel and the ONNX file.

        Args:
            pretrained: the model.
            stages: of "tf" and "onnx", others are passed over; None: what this environment can.
            converter: to the ONNX file, "jax2tf" or "jax2onnx"; None: what this environment can.
            outputs: see `make_forward`.
            layer: likewise.
            include_preprocessing: likewise.
            free_size: likewise; there is no SavedModel then.
            in_graph: have the ONNX file take raw pixels of any height and width, and prepare them
                itself as evaluation does; there is no SavedModel then, either.
            photographs: what to compare on.

        Raises:
            UserError: a stage cannot be had here, an image is damaged, README.md in the directory
                is not an export's, or the disk refuses.
        """
        from vit_jax.export.forward import make_forward

        check_folder(self.directory)
        forward = make_forward(
            pretrained,
            outputs=outputs,
            layer=layer,
            include_preprocessing=include_preprocessing,
            free_size=free_size,
        )
        only_onnx = free_size or in_graph
        resolution = self._resolve(("onnx",) if only_onnx else stages, converter)
        most = parity.compared(forward.output_bytes, photographs.number)
        number, raw = most + self.precision.calibration_images, None
        if in_graph:
            from vit_jax.export.in_graph import check_rule  # With onnx_ir, which is there now.

            check_rule(pretrained.preprocessing)
            raw, labels = photographs.read_raw(pretrained, number, outputs)
            images = parity.prepared(raw, pretrained.preprocessing)
        else:
            images, labels = photographs.read(pretrained, number, outputs)
        if include_preprocessing:
            images = parity.as_pixels(images, pretrained.preprocessing)
        kept = self._kept(len(images))
        calibration = None if kept.all() else images[~kept]
        kept &= np.cumsum(kept) <= most
        images, labels = images[kept], None if labels is None else labels[kept]
        at_a_time = parity.at_a_time(forward.output_bytes)
        expected = parity.in_batches(forward.jitted(), images, at_a_time)
        data = photographs.dataset or photographs.directory or parity.SYNTHETIC
        given = images if raw is None else raw.chosen(kept)
        self._reference = parity.Reference(given, expected, labels, data)
        make_folder(self.directory)
        parity.save_reference(self._reference, self.directory)
        for line in resolution.left_out:
            print(line, flush=True)
        if "tf" in resolution.stages:
            self._to_tf(forward)
        if "onnx" in resolution.stages:
            self._to_onnx(forward, resolution.converter, calibration, in_graph)
            if free_size and self.precision.runs_on_cpu:
                self._compare_sizes(forward, pretrained)
        if "onnx" in resolution.stages or (self.directory / README).exists():
            write_folder(self.directory)

    def build_engine(self) -> None:
        """The stage that needs TensorRT and a GPU, and neither JAX nor TensorFlow.

        Raises:
            UserError: there is no ONNX file, no TensorRT or no GPU, no engine comes of it, or
                README.md in the directory is not an export's.
        """
        check_folder(self.directory)
        if self._reference is None:
            self._reference = parity.load_reference(self.directory)
            self._stages = parity.load_report(self.directory)
        path = self.directory / "model.onnx"
        description = build(path, self.directory, batch=self.batch)
        print(summary(description), flush=True)
        precision = PRECISIONS[read_onnx(path).precision]
        with runtime.load(self.directory / "model.engine") as model:
            self._compare(f"TensorRT {precision.name}", model.predict, precision.limits("engine"))
        write_deploy(self.directory, batch=self.batch)
        write_folder(self.directory)

    def _resolve(self, stages: Sequence[str] | None, converter: str | None) -> Resolution:
        import jax

        from vit_jax.export.to_tf import can_serialize_graphs

        return resolve(
            stages,
            converter,
            obstacles(jax.__version__, can_serialize_graphs(), missing_packages()),
            needs_onnx=self.precision.converts,
        )

    def _kept(self, number: int) -> np.ndarray:
        """The images to compare on, bool [number]; of the others the scales are taken."""
        wanted = self.precision.calibration_images
        if not wanted:
            return np.ones(number, bool)
        # Every few images one, at most every other.
        return np.arange(number) % max(2, number // wanted) != 1

    def _to_tf(self, forward: "Forward") -> None:
        from vit_jax.export.to_tf import to_tf

        start = time.perf_counter()
        path = to_tf(forward, self.directory)
        _print_made(start, f"{path}: SavedModel")
        with runtime.load(path) as model:
            self._compare("SavedModel", model.predict, self._limits(PRECISIONS["fp32"], forward))

    def _to_onnx(
        self,
        forward: "Forward",
        converter: str,
        calibration: np.ndarray | None,
        in_graph: bool,
    ) -> None:
        from vit_jax.export import to_onnx
        from vit_jax.export.emulation import Emulation

        start = time.perf_counter()
        model = self.precision.apply(to_onnx.to_model(forward, converter), calibration)
        if in_graph:
            from vit_jax.export.in_graph import add_preprocessing

            add_preprocessing(model)
        path = to_onnx.save(model, self.directory)
        count = collections.Counter(node.op_type for node in model.graph)
        operators = ", ".join(f"{number} {name}" for name, number in count.most_common())
        _print_made(start, f"{path}: {sum(count.values())} nodes ({operators})")
        name, limits = f"ONNX {self.precision.name}", self._limits(self.precision, forward)
        if self.precision.runs_on_cpu:
            with runtime.load(path) as loaded:
                self._compare(name, loaded.predict, limits)
        if self.precision.emulated:
            emulation = Emulation(path, self.precision)
            self._compare(f"{name}, emulated", emulation.predict, limits, emulation)
        write_deploy(self.directory, batch=self.batch)

    @staticmethod
    def _limits(precision: Precision, forward: "Forward") -> str:
        """The name of the tolerance for a function in a precision."""
        return precision.limits("tokens" if forward.output_name in (*DENSE, PIXELS, BOXES) else "")

    def _compare_sizes(self, forward: "Forward", pretrained: "Pretrained") -> None:
        """Measures the ONNX file at other heights and widths, each against Flax at these."""
        from vit_jax.checkpoints.pretrained import resize

        limits = self._limits(self.precision, forward)
        step = forward.step
        with runtime.load(self.directory / "model.onnx") as loaded:
            for factors in _OTHER_SIZES:
                height, width = (
                    max(1, round(side * x / step)) * step
                    for side, x in zip(forward.image_shape, factors, strict=False)
                )
                size = of_sides(height, width)
                preprocessing = dataclasses.replace(pretrained.preprocessing, image_size=size)
                images = parity.synthetic_images(4, preprocessing)
                if forward.image_dtype == "uint8":
                    images = parity.as_pixels(images, preprocessing)
                fitted = forward.with_params(resize(pretrained, size).params)
                expected = fitted.jitted()(images)
                reference = parity.Reference(images, expected, None, parity.SYNTHETIC)
                name = f"ONNX {self.precision.name}, {height} x {width}"
                self._compare(name, loaded.predict, limits, reference=reference)

    def _compare(
        self,
        name: str,
        predict: parity.Predict,
        limits: str,
        emulation: "Emulation | None" = None,
        reference: parity.Reference | None = None,
    ) -> None:
        """Measures a model; `limits` are the entry of `thresholds` to hold it to.

        An `emulation` tells its largest numbers, and its times would say nothing; nor are those
        taken that are of another than the export's own `reference`.
        """
        is_own, reference = reference is None, reference or self._reference
        if reference is None:
            raise ValueError("there is nothing to compare with")
        output_bytes = reference.outputs[0].nbytes
        at_a_time = parity.at_a_time(output_bytes)
        outputs = parity.in_batches(predict, reference.images, at_a_time)
        row: dict[str, Any] = dict(parity.compare(reference, outputs))
        row |= emulation.range() if emulation else {}
        found = parity.failures(row, limits, reference)
        self.failures += [f"{name}: {failure}" for failure in found]
        stage = {"name": name, "precision": limits, "images": len(reference.images), **row}
        if self.seconds and not emulation and is_own:
            image = reference.images[0]
            timed = [x for x in self.batch_sizes if x <= parity.compared(output_bytes, x)]
            stage["latency"] = parity.latency(predict, image, timed, self.seconds)
        self._stages = [old for old in self._stages if old["name"] != name] + [stage]
        parity.save_report(reference, self._stages, self.directory)
        print(parity.table([stage]), flush=True)


def _print_made(start: float, text: str) -> None:
    print(printable(f"{text} ({time.perf_counter() - start:.0f} s)"), flush=True)
