"""Results of experiments, made by hand."""

from experiments.runner.experiment import Experiment, Measurement, Run
from experiments.runner.results import Result, Results
from experiments.runner.scales import SCALES
from experiments.runner.setting import Setting
from vit_jax import recipes

from .webpages import HOSTILE as HOSTILE


def make_run(name):
    return Run(name, recipes.get_config("ViT-B/32", "finetune,cifar10"))


def make_result(labels, values, problems=(), **options):
    sources = [make_run(f"run-{'-'.join(labels.values())}-{i}") for i in range(len(values))]
    return Result(Measurement(labels, sources, **options), tuple(values), tuple(problems))


def make_results(*found, name="table0", title="Table 0: a test", scale="smoke", **options):
    experiment = Experiment(
        name, title, lambda _: (), **{"rows": ("task",), "column": "model", **options}
    )
    return Results(experiment, Setting(SCALES[scale], SCALES[scale].seeds), found, {})
