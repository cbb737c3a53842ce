"""The paper's numbers hold among each other, which a slip in typing them would break."""

import statistics

import pytest

from experiments import paper
from vit_jax.data.vtab import TASKS
from vit_jax.models import model_config

TASKS_OF_TABLE_7 = ("imagenet2012", "cifar10", "cifar100", "oxford_iiit_pet", "oxford_flowers102")


@pytest.mark.parametrize("name", paper.TABLE_1)
def test_the_models_have_the_sizes_of_table_1(name):
    config = model_config(f"{name}/16")
    sizes = tuple(config[key] for key in ("num_layers", "hidden_size", "mlp_dim", "num_heads"))
    assert sizes == paper.TABLE_1[name][:4]


@pytest.mark.parametrize("column", [key[1:] for key in paper.TABLE_9 if key[0] == "mean"])
def test_the_means_of_table_9_are_those_of_its_19_tasks_and_of_table_2(column):
    mean = statistics.fmean(paper.TABLE_9[task, *column] for task in TASKS)
    assert round(mean, 1) == paper.TABLE_9["mean", *column]
    # Table 9 has one decimal of each task.
    assert mean == pytest.approx(paper.TABLE_2["vtab", *column][0], abs=0.05)


@pytest.mark.parametrize("model", ["R50x1", "R152x2"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_means_of_table_7_are_those_of_its_tasks(model, optimizer):
    mean = statistics.fmean(paper.TABLE_7[model, task, optimizer] for task in TASKS_OF_TABLE_7)
    assert mean == pytest.approx(paper.TABLE_7[model, "mean", optimizer], abs=0.0051)


@pytest.mark.parametrize("model", ["R50x1", "R152x2"])
def test_adam_in_table_7_is_table_6(model):
    for task in TASKS_OF_TABLE_7:
        assert paper.TABLE_7[model, task, "adam"] == paper.TABLE_6[model, 7, task]


@pytest.mark.parametrize("model", ["ViT-B/16", "ViT-B/32", "ViT-L/16", "ViT-L/32"])
def test_tables_5_and_6_have_the_same_numbers_after_jft(model):
    epochs = 14 if model == "ViT-L/16" else 7
    for task in (*TASKS_OF_TABLE_7, "real"):
        assert paper.TABLE_5["jft", task, model] == paper.TABLE_6[model, epochs, task]


def test_tables_2_and_5_have_the_same_numbers_of_h14_after_jft():
    """On the tasks that both fine-tune at 384 pixels, without averaging."""
    for task in TASKS_OF_TABLE_7[1:]:
        assert paper.TABLE_2[task, "ViT-H/14", "jft"][0] == paper.TABLE_5["jft", task, "ViT-H/14"]


def test_masked_patches_are_2_above_scratch_and_4_below_supervised_pretraining():
    scratch = paper.TABLE_5["imagenet2012", "imagenet2012", "ViT-B/16"]
    supervised = paper.TABLE_5["jft", "imagenet2012", "ViT-B/16"]
    assert (
        round(paper.SELF_SUPERVISION - scratch),
        round(supervised - paper.SELF_SUPERVISION),
    ) == (2, 4)
