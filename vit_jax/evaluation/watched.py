"""The parts of a run that its evaluators may use."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluation import class_names
from vit_jax.pixel_classes import check_same_classes
from vit_jax.sharding import Mesh
from vit_jax.steps import Objective

if TYPE_CHECKING:  # They import TFDS.
    from vit_jax.data.labeled_files import FileRules
    from vit_jax.data.pipeline import EvalBatches
    from vit_jax.data.source import Source


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run, as its evaluators see it.

    Attributes:
        model: of the run, which maps images to logits unless patches are predicted.
        trunk: the same without a head, which maps images to the representation.
        objective: that is trained for.
        loss: "softmax" or "sigmoid", for which the logits are trained.
        class_names: in the order of the logits; None where no classes are predicted.
        dataset: name of the run's data set.
        data_dir: of the same.
        mask_names: the names of the classes of pixels; None where no masks are predicted.
        box_names: the names of the classes of objects; None where no boxes are predicted.
        broken: what is done with broken files, see `data.labeled_files.FileRules`.
        eval_source: its split to evaluate on.
        preprocessing: what evaluation makes of an image.
        batch_size: of all devices together.
        mesh: the devices.
        report: prints a line.
    """

    model: nn.Module
    trunk: nn.Module
    objective: Objective
    loss: str
    class_names: Sequence[str] | None
    dataset: str
    data_dir: str
    eval_source: "Source"
    preprocessing: Preprocessing
    batch_size: int
    mesh: Mesh
    report: Callable[[str], None] = print
    broken: str = "refuse"
    mask_names: Sequence[str] | None = None
    box_names: Sequence[str] | None = None

    def files_of(self, name: str) -> "FileRules":
        """Rules for the files of a data set; the run's own is divided as the run has it."""
        from vit_jax.data.datasets import FileRules, is_of_files, is_same

        is_own = is_of_files(name) and is_same(name, self.dataset)
        partition = self.eval_source.partition if is_own else None
        channels = self.preprocessing.channels
        return FileRules(broken=self.broken, partition=partition, channels=channels)

    def open(self, settings: Mapping[str, Any]) -> "Source":
        """Opens the images of an entry, their labels being those of the run's head.

        Args:
            settings: "dataset" and "split", which are those of the run where both are "", else
                the run's data set or the usual split of the data set; "data_dir".

        Raises:
            UserError: the data set or split cannot be read, or has other classes than the run's.
        """
        from vit_jax.data import datasets

        if not settings["dataset"] and not settings["split"]:
            return self.eval_source
        name = settings["dataset"] or self.dataset
        data_dir = settings["data_dir"] or (self.data_dir if name == self.dataset else "")
        source = datasets.open_evaluation(
            name,
            data_dir=data_dir,
            split=settings["split"],
            files=self.files_of(name),
            mask_classes=None if self.mask_names is None else len(self.mask_names),
            has_boxes=self.box_names is not None,
        )
        self.tell(source)
        for names, what in ((self.mask_names, "masks"), (self.box_names, "boxes")):
            if names is not None:
                check_same_classes(source.name, source.class_names, names, self.dataset, what=what)
        return source if self.class_names is None else self.label(source)

    def tell(self, source: "Source") -> None:
        """Reports what a user should be told of a data set, if that of the run did not say it."""
        for note in source.notes:
            if note not in self.eval_source.notes:
                self.report(note)

    def label(self, source: "Source") -> "Source":
        """Gives a source the labels of the run's head, by the names of the classes.

        Raises:
            UserError: the source has other classes, or the run none.
        """
        if self.class_names is None:
            raise UserError(f"{source.name} has classes, but the run's objective predicts none")
        num_classes = len(self.class_names)
        labeled, _ = class_names.label(
            source,
            num_classes,
            self.class_names,
            lambda *_: (
                f"{source.name} has {len(source.class_names)} classes that are not all among the "
                f"{num_classes} of {self.dataset}, so the run's head cannot be scored on it: "
                "choose another data set, or type fewshot, which needs no head"
            ),
        )
        return labeled

    def batches(self, source: "Source") -> "EvalBatches":
        """This process' padded batches of a source, whose first image is looked at now.

        Raises:
            UserError: it has other channels than the run's.
        """
        from vit_jax.data.pipeline import check_channels, eval_batches

        check_channels(source, self.preprocessing.channels)
        return eval_batches(
            source,
            batch_size=self.batch_size,
            preprocessing=self.preprocessing,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
