"""Appendix D.9: ViT-H/14 on ObjectNet."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement, Task

if TYPE_CHECKING:
    from experiments.runner.setting import Setting

METRICS = {"accuracy": "top-1", "top5_accuracy": "top-5"}


def measure(setting: "Setting") -> list[Measurement]:
    """Lists both accuracies of Table 2's ViT-H/14."""
    start = setting.pretrain("ViT-H/14", "jft")
    entry = {"data_dir": setting.data_dir, **setting.objectnet()}
    tasks = [
        Task(f"objectnet-{run.name}", "experiments.objectnet:evaluate", entry, (run,))
        for run in setting.finetune(start, "imagenet2012", large=True)
    ]
    return [
        Measurement(
            {"model": "ViT-H/14", "accuracy": METRICS[metric]}, tasks, metric, paper=accuracy
        )
        for metric, accuracy in paper.OBJECTNET.items()
    ]


def evaluate(
    workdir: pathlib.Path, runs: Sequence[pathlib.Path], **entry: Any
) -> Mapping[str, float]:
    """The accuracies of a run on the images of an entry of `config.evals`."""
    from vit_jax import evaluate

    found = workdir / "evaluation.json"
    given = {key: entry[key] for key in ("dataset", "split", "data_dir") if entry.get(key)}
    flags = {"checkpoint": runs[0], "json": found, **given}
    evaluate.main([f"--{key}={value}" for key, value in flags.items()])
    scalars = json.loads(found.read_text())
    return {metric: scalars[metric] for metric in METRICS}


EXPERIMENT = Experiment(
    "objectnet",
    "Appendix D.9: ObjectNet",
    measure,
    rows=("model",),
    column="accuracy",
    about="ViT-H/14 of Table 2, pre-trained on JFT-300M and fine-tuned on ImageNet at 518 pixels, "
    "on the images of ObjectNet's 113 classes that ImageNet has too. The paper has 82.1% top-5 and "
    "61.7% top-1. ObjectNet is a folder that the user names.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
