import dataclasses
import json
import re
import types

import pytest
from flax.traverse_util import flatten_dict

from experiments import objectnet
from experiments.runner.scales import MINI, PAPER, SCALES, SMOKE
from experiments.runner.setting import Setting
from experiments.transfer import score
from vit_jax import recipes, train
from vit_jax.config import check_config, to_dict
from vit_jax.data import datasets
from vit_jax.data.vtab import TASKS
from vit_jax.errors import UserError

PRETRAINED = [*recipes.TABLE_3][:-1] + [(f"ViT-{x}", "imagenet2012") for x in ("B/16", "L/32")]
TASK_NAMES = [*[task for task in recipes.TABLE_4 if task != "vtab"], "vtab:svhn", "vtab:dmlab"]


def differences(config, other):
    one, two = (flatten_dict(to_dict(x), sep=".") for x in (config, other))
    return {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}


def all_runs(setting):
    """Runs of every kind, some of them several times."""
    starts = [setting.pretrain(*key) for key in PRETRAINED]
    runs = [
        *starts,
        setting.pretrain("ViT-L/16", "jft", epochs=7),
        *(setting.pretrain(f"ViT-{x}/32", "jft", subset="3%") for x in "bB"),
        setting.pretrain("ViT-L/16", "jft", epochs=14),
        setting.pretrain("ViT-B/16", "jft", seed=1),
        *(setting.pretrain("ViT-B/16", "jft", subset=x) for x in ("3%", "30%", "100%")),
        setting.pretrain("ViT-B/16", "jft", variant="gap", changes={"model.classifier": "gap"}),
        setting.masked("ViT-B/16"),
    ]
    finals = [
        *(run for task in TASK_NAMES for run in setting.finetune(starts[0], task)),
        *setting.finetune(starts[4], "imagenet2012", large=True),
        *setting.finetune(starts[4], "imagenet2012"),
        *setting.finetune(runs[-1], "imagenet2012"),
        *setting.finetune(None, "imagenet2012", model="ViT-B/16"),
    ]
    return [*runs, *finals, *(rate for run in finals for rate in run.rates)]


@pytest.mark.parametrize(("model", "dataset"), PRETRAINED)
def test_at_the_papers_scale_pre_training_is_the_recipe(model, dataset):
    run = Setting(PAPER, 3).pretrain(model, dataset)
    recipe = recipes.get_config(model, f"pretrain,{dataset}")
    assert differences(run.config, recipe) == {
        f"evals.fewshot.{key}" for key in ("dataset", "every", "shots")
    }
    assert run.config.evals.fewshot.dataset == "imagenet2012"
    assert run.needs == ()


@pytest.mark.parametrize("task", TASK_NAMES)
def test_at_the_papers_scale_fine_tuning_is_the_recipe(task):
    setting = Setting(PAPER, 3)
    start = setting.pretrain("ViT-L/16", "jft")
    finals = setting.finetune(start, task)
    recipe = recipes.get_config("ViT-L/16", f"finetune,{task}")
    real = {f"evals.real.{key}" for key in ("type", "every", "data_dir")}
    expected = {"init_from", "schedule.base_lr"} | (real if task == "imagenet2012" else set())
    assert [run.config.seed for run in finals] == [0, 1, 2]
    assert {run.init_from for run in finals} == {start}
    for run in finals:
        assert differences(run.config, recipe) - {"seed"} <= expected
        assert real.isdisjoint(expected) or real <= differences(run.config, recipe)
    rates = recipes.finetuning_row(task).base_lrs
    held_out = [run.config.schedule.base_lr for run in finals[0].rates]
    assert held_out == ([*rates] if len(rates) > 1 else [])
    for run in finals[0].rates:
        assert run.config.dataset.development
        assert run.init_from == start
        assert not real & differences(run.config, recipe)


def test_table_2s_resolution_and_averaging():
    setting = Setting(PAPER, 1)
    sizes = {}
    for model in ("ViT-L/16", "ViT-H/14"):
        (run,) = setting.finetune(setting.pretrain(model, "jft"), "imagenet2012", large=True)
        sizes[model] = run.config.dataset.image_size
        assert run.config.ema_decay == 0.9999
    assert sizes == {"ViT-L/16": 512, "ViT-H/14": 518}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_name_is_of_one_run_and_can_be_a_folder(scale):
    configs = {}
    for run in all_runs(Setting(scale, 2)):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{,120}", run.name)
        what = (run.config.to_json(), run.init_from and run.init_from.name)
        assert configs.setdefault(run.name, what) == what
        check_config(run.config)
    assert len({*configs.values()}) == len({name.lower() for name in configs}) > 60


def test_the_tasks_of_vtab_are_different_images_at_the_small_scales():
    for scale in (MINI, SMOKE):
        start = Setting(scale, 1).pretrain("ViT-B/16", "jft")
        runs = [Setting(scale, 1).finetune(start, f"vtab:{task}")[0] for task in TASKS]
        assert len({run.config.dataset.subset_seed for run in runs}) == 19


def test_figure_4_takes_as_many_steps_on_every_part_and_stops_early():
    for scale in SCALES.values():
        setting = Setting(scale, 1)
        parts = [setting.pretrain("ViT-B/32", "jft", subset=x) for x in ("3%", "10%", "100%")]
        assert len({setting.count(run)[0] for run in parts}) == 1
        for run in parts:
            config = run.config
            assert config.patience and config.dataset.development
            assert config.evals.fewshot.every == config.evals.val.every != "0 steps"


def test_the_parts_of_figure_4_are_shares_of_what_stands_for_jft():
    setting = Setting(SMOKE, 1)
    subsets = [
        setting.pretrain("ViT-B/32", "jft", subset=x).config.dataset.subset
        for x in ("3%", "30%", "100%")
    ]
    assert subsets == ["3%", "30%", ""]
    assert setting.num_images("jft") == 1442
    assert Setting(PAPER, 1).num_images("jft") == 303_000_000


def test_changes_are_in_the_papers_sizes_and_take_a_sections_place():
    changes = {
        "schedule.base_lr": 1e-3,
        "model.hidden_size": 1536,
        "optimizer": {**recipes.get_config("ViT-B/16", "finetune,cifar10").optimizer},
    }
    run = Setting(SMOKE, 1).pretrain("ViT-B/16", "jft", variant="x", changes=changes)
    assert run.config.optimizer.to_dict() == changes["optimizer"]
    assert run.config.schedule.base_lr == 1e-3 * SMOKE.reduction.rates["sgd"]
    assert run.config.model.hidden_size == 1536 // 12


def test_a_data_set_of_the_users_is_trained_on_by_the_row_of_the_papers():
    named = {"jft": "folder:/data/my photos", "imagenet2012": "folder:/data/birds"}
    setting = Setting(PAPER, 1, named, images={"jft": 1_000_000}, classes={"jft": 50})
    run = setting.pretrain("ViT-B/16", "jft")
    assert run.config.dataset.name == named["jft"]
    assert (run.config.loss, run.config.schedule.base_lr) == ("sigmoid", 8e-4)
    assert re.search("-my-photos-[0-9a-f]{6}-", run.name)
    assert setting.fewshot_metric == "fewshot/birds/5shot"
    assert setting.count(run)[0] == round(7 * 1_000_000 / 4096)
    assert "real" not in setting.finetune(run, "imagenet2012")[0].config.evals
    setting.check([run])


def test_real_is_asked_of_imagenet_alone():
    def sources(**datasets):
        setting = Setting(PAPER, 2, datasets)
        return score(setting, setting.pretrain("ViT-B/16", "jft"), "real")["sources"]

    assert len(sources(jft="folder:/x")) == 2
    assert len(sources(imagenet2012="folder:/x")) == 0


def test_jft_must_be_named():
    setting = Setting(PAPER, 1)
    with pytest.raises(UserError, match="--jft"):
        setting.check([setting.pretrain("ViT-B/16", "jft")])
    Setting(SMOKE, 1).check([Setting(SMOKE, 1).pretrain("ViT-B/16", "jft")])


@pytest.mark.parametrize("scale", [PAPER, SMOKE])
def test_objectnet_must_be_named_where_it_is_no_other_images(scale):
    named = Setting(scale, 1, {"jft": "digits", "objectnet": "/on"})
    unnamed = dataclasses.replace(named, datasets={"jft": "digits"})
    named.check(source for x in objectnet.measure(named) for source in x.sources)
    sources = [source for x in objectnet.measure(unnamed) for source in x.sources]
    if scale is SMOKE:
        unnamed.check(sources)
        return
    with pytest.raises(UserError, match="--objectnet /data/objectnet"):
        unnamed.check(sources)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x: x.pretrain("ViT-B/16", "jtf"), "jtf is no data set .*: did you mean jft"),
        (lambda x: x.masked("ViT-B/16", "cifar10"), "there are jft, imagenet21k, imagenet2012"),
        (lambda x: x.finetune(None, "cifar", model="ViT-B/16"), "did you mean cifar10"),
        (lambda x: x.finetune(None, "vtab:svnh", model="ViT-B/16"), "did you mean vtab:svhn"),
    ],
)
def test_a_data_set_that_the_paper_has_not_is_told_in_a_line(make, text):
    with pytest.raises(UserError, match=text):
        make(Setting(SMOKE, 1))


def test_folders_of_one_last_name_are_different_runs():
    folders = ("folder:/a/birds", "folder:/a/birds/", "folder:/b/birds")
    settings = [Setting(PAPER, 1, {"imagenet2012": folder}) for folder in folders]
    names = [setting.pretrain("ViT-B/16", "imagenet2012").name for setting in settings]
    assert names[0] == names[1] != names[2]
    for setting in settings:
        assert setting.fewshot_metric == "fewshot/birds/5shot"


def test_a_folder_is_opened_once_to_count_its_images(monkeypatch):
    opened = []

    def open_dataset(name, *, data_dir):
        opened.append((name, data_dir))
        return types.SimpleNamespace(num_examples=7), None

    monkeypatch.setattr(datasets, "open_dataset", open_dataset)
    found = [
        Setting(PAPER, seeds, {"jft": "folder:/counted"}, data_dir="/d").num_images("jft")
        for seeds in (1, 2, 3)
    ]
    assert found == [7, 7, 7]
    assert opened == [("folder:/counted", "/d")]


def test_how_a_step_is_computed_is_in_every_config_and_in_no_name():
    hardware = {"accumulate_steps": 4, "sharding": "fsdp", "model.remat": "everything"}
    for scale in SCALES.values():
        plain, other = all_runs(Setting(scale, 1)), all_runs(Setting(scale, 1, hardware=hardware))
        assert [run.name for run in plain] == [run.name for run in other]
        for before, run in zip(plain, other, strict=True):
            changed = differences(before.config, run.config)
            assert {"accumulate_steps", "sharding"} <= changed <= hardware.keys()
            assert run.config.model.remat == "everything"


def test_images_that_nobody_counted_are_asked_for():
    setting = Setting(PAPER, 1, {"jft": "folder:/nowhere"})
    with pytest.raises(UserError, match="--jft_images"):
        setting.count(setting.pretrain("ViT-B/16", "jft"))


def test_a_run_of_the_smoke_scale_learns_and_has_its_metric(tmp_path):
    setting = Setting(SMOKE, 1)
    config = setting.pretrain("R50x1", "jft").config
    config.duration = "40 steps"
    config.evals.fewshot.split = "test[:50%]"
    found = train.train(config, tmp_path)
    records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert setting.fewshot_metric in records[-1]
    assert found["accuracy"] > 0.5  # of ten classes


def test_objectnet_is_a_folder_and_at_small_scales_other_images():
    at_paper = Setting(PAPER, 1, {"objectnet": "/data/on"}, data_dir="/data/tfds").objectnet()
    assert (at_paper["dataset"], at_paper["data_dir"]) == ("objectnet:/data/on", "")
    run = Setting(SMOKE, 1).pretrain(
        "ViT-B/16", "jft", variant="x", changes={"evals.objectnet": Setting(SMOKE, 1).objectnet()}
    )
    check_config(run.config)
    assert run.config.evals.objectnet.type == "classification"
