"""The progress of a run: what is saved beside its state and continues when it resumes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Progress:
    """The measurements of a run so far; a checkpoint's metadata has these fields as "progress".

    Attributes:
        window: sums of the training metrics since the last log line, see `reporting.Window`.
        evaluation: the last one of val: "step", "examples" and its scalars; empty before the first.
        best: the best of these.
        evaluations_since_best: how many there were since.
        seconds: spent in training.
    """

    window: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluations_since_best: int = 0
    seconds: float = 0.0

    def record(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Takes down an evaluation; returns whether it is the best so far."""
        self.evaluation = {"step": step, **scalars}
        self.evaluations_since_best += 1
        if not is_better(self.evaluation, self.best):
            return False
        self.best = self.evaluation
        self.evaluations_since_best = 0
        return True

    def is_out_of_patience(self, patience: int) -> bool:
        """Tells whether the last `patience` evaluations were no better; 0 is endless patience."""
        return 0 < patience <= self.evaluations_since_best


def is_better(result: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Tells whether an evaluation is better than the best: by its loss if it has no accuracy."""
    if "accuracy" in result:
        return result["accuracy"] > best.get("accuracy", -1.0)
    return result["loss"] < best.get("loss", math.inf)
