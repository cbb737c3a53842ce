"""Dropout in the MLP, before or after its GELU, which the paper leaves open."""

from typing import TYPE_CHECKING

from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement, Run

if TYPE_CHECKING:
    from experiments.runner.setting import Setting

PLACES = {"none": "none", "dense": "before the GELU", "activation": "after the GELU"}
# What every other pre-training has, so that its runs are theirs.
DEFAULT = "activation"


def measure(setting: "Setting") -> list[Measurement]:
    """Lists ViT-B/16 and B/32 without dropout and with each placement."""
    return [
        Measurement(
            {"model": model, "dropout": title},
            pretrainings(setting, model, place),
            setting.fewshot_metric,
        )
        for model in ("ViT-B/16", "ViT-B/32")
        for place, title in PLACES.items()
    ]


def pretrainings(setting: "Setting", model: str, place: str) -> list[Run]:
    """The pre-trainings of a model, one for each seed."""
    options: dict = {} if place == DEFAULT else {"variant": f"dropout-{place}"}
    if place == "none":
        options["changes"] = {"model.dropout_rate": 0.0}
    elif place != DEFAULT:
        options["changes"] = {"model.dropout_after": place}
    return [
        setting.pretrain(model, "imagenet21k", seed=seed, **options)
        for seed in range(setting.seeds)
    ]


EXPERIMENT = Experiment(
    "dropout_placement",
    "Dropout before or after the GELU",
    measure,
    rows=("model",),
    column="dropout",
    about="ViTs pre-trained on ImageNet-21k, with the dropout of 0.1 that Table 3 has there, "
    "scored by linear classification from 5 images a class of ImageNet. Appendix B.1: dropout "
    '"is applied after every dense layer except for the qkv-projections"; by these words the '
    "first one of the MLP comes before its GELU, in the published code after it. Every seed is a "
    "pre-training of its own.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
