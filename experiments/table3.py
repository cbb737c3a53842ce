"""Table 3: the recipes of pre-training, each trained."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement
from experiments.transfer import NAMES

if TYPE_CHECKING:
    from experiments.runner.setting import Setting

# The row of all ViTs on ImageNet is that of these, for which Table 5 has numbers.
ON_IMAGENET = ("ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16")


# Table 3 has no such row; Table 5 has the model. It takes that of L, for the longest.
WITHOUT_ROW = {("ViT-H/14", "imagenet21k"): ((90,), *paper.TABLE_3["ViT-L/16", "imagenet21k"][1:])}
ALL = paper.TABLE_3 | WITHOUT_ROW


def rows() -> Iterator[tuple[str, str, int, dict[str, str]]]:
    """Yields model, data set, epochs and the labels of each row, one for each length."""
    for (name, dataset), (lengths, rate, decay, weight_decay, dropout) in ALL.items():
        for model in ON_IMAGENET if name == "ViT-*" else (name,):
            for epochs in lengths:
                labels = {
                    "model": model,
                    "data": NAMES[dataset],
                    "epochs": f"{epochs}",
                    "base rate": f"{rate:g}",
                    "decay": decay,
                    "weight decay": f"{weight_decay:g}",
                    "dropout": f"{dropout:g}",
                }
                yield model, dataset, epochs, labels


def measure(setting: "Setting") -> list[Measurement]:
    """Lists what every pre-training reaches on its own validation images, and by few-shot."""
    found = []
    for model, dataset, epochs, labels in rows():
        run = setting.pretrain(model, dataset, epochs=epochs)
        longest = epochs == max(ALL.get((model, dataset), ((epochs,),))[0])
        upstream = paper.UPSTREAM.get((model, dataset)) if longest else None
        scores = {
            "validation": ("eval_accuracy", upstream),
            "5-shot": (setting.fewshot_metric, None),
        }
        found += [
            Measurement({**labels, "accuracy": name}, [run], metric, paper=number)
            for name, (metric, number) in scores.items()
        ]
    return found


EXPERIMENT = Experiment(
    "table3",
    "Table 3: pre-training",
    measure,
    rows=("model", "data", "epochs", "base rate", "decay", "weight decay", "dropout"),
    column="accuracy",
    about="The hyperparameters are the paper's; a smaller scale shortens the runs and multiplies "
    "the learning rates. Shown is what each pre-training reaches: its own validation accuracy, and "
    "linear classification from 5 images a class of ImageNet. The paper prints neither: the "
    "numbers beside validation are those of logs that the authors published later, at 224 pixels, "
    "of ImageNet-21k precision@1. Table 3 has no row for ViT-H/14 on ImageNet-21k: it takes that "
    "of ViT-L.",
    reference="published later",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
