import itertools
import math

import pytest
from flax.traverse_util import flatten_dict

from experiments.runner.scales import MINI, PAPER, SMOKE
from experiments.runner.setting import Setting
from vit_jax import models, recipes
from vit_jax.config import check_config, count_steps, to_dict

SMALL = pytest.mark.parametrize("scale", [MINI, SMOKE], ids=["mini", "smoke"])
# Each has less arithmetic than the next.
ORDERS = [
    ["ViT-Ti/16", "ViT-S/16", "ViT-B/16", "ViT-L/16", "ViT-H/14"],
    ["ViT-b/32", "ViT-B/32", "ViT-L/32", "ViT-L/16"],
    ["ViT-B/32", "ViT-B/16"],
    ["R50x1", "R101x1", "R152x1", "R152x2", "R152x4"],
    ["R50x1", "R50x2", "R152x2", "R200x3"],
    ["ViT-B/32", "R50+ViT-B/32", "R50+ViT-L/32"],
    ["ViT-B/16", "R50+ViT-B/16", "R50+ViT-L/16"],
    ["ViT-B/32", "Axial-ViT-B/32", "Axial-ViT-B/16"],
    ["ViT-B/16", "Axial-ViT-B/16"],
    *(
        [f"ViT-{layers}-1024-2048/32" for layers in pair]
        for pair in itertools.pairwise((4, 8, 16, 32, 64))
    ),
    ["ViT-8-512-2048/32", "ViT-8-1024-2048/32", "ViT-8-2048-2048/32"],
    ["ViT-8-1024-1024/32", "ViT-8-1024-2048/32", "ViT-8-1024-8192/32"],
    ["ViT-8-1024-2048/32", "ViT-8-1024-2048/16", "ViT-8-1024-2048/8"],
]
# What a scale may change.
SIZES = {
    "batch_size",
    "checkpoint_every",
    "duration",
    "evals.fewshot.dataset",
    "evals.fewshot.every",
    "evals.fewshot.shots",
    "evals.val.every",
    "dataset.image_size",
    "dataset.name",
    "dataset.protocol",
    "dataset.random_crop",
    "dataset.random_flip",
    "dataset.subset",
    "dataset.subset_seed",
    "model.dtype",
    "model.head_bias_init",
    "model.hidden_size",
    "model.mlp_dim",
    "model.num_heads",
    "model.num_layers",
    "model.patch_size",
    "model.representation_size",
    "model.resnet_layers",
    "schedule.base_lr",
    "schedule.end_lr",
    "schedule.warmup",
}


def multiply_adds(config):
    return models.describe(config.model, num_classes=10).multiply_adds(config.dataset.image_size)


@SMALL
@pytest.mark.parametrize("names", ORDERS, ids=lambda names: names[0])
def test_models_keep_their_order(scale, names):
    configs = [Setting(scale, 1).pretrain(name, "jft").config for name in names]
    for config in configs:
        check_config(config)
    costs = [multiply_adds(config) for config in configs]
    assert all(a < b for a, b in itertools.pairwise(costs)), dict(zip(names, costs, strict=True))


@SMALL
@pytest.mark.parametrize("model", ["ViT-B/16", "R50x1", "R50+ViT-B/16", "AxialResNet50"])
def test_a_scale_changes_sizes_and_durations_only(scale, model):
    def flat(config):
        return flatten_dict(to_dict(config), sep=".")

    for dataset in recipes.paper.PRETRAIN_DATASETS:
        small = flat(Setting(scale, 1).pretrain(model, dataset).config)
        paper = flat(recipes.get_config(model, f"pretrain,{dataset}"))
        assert small.keys() == paper.keys()
        assert {key for key in paper if small[key] != paper[key]} <= SIZES


@SMALL
def test_durations_keep_their_order_within_bounds(scale):
    setting = Setting(scale, 1)
    keys = [
        ("imagenet2012", 300),
        ("imagenet21k", 30),
        ("imagenet21k", 90),
        ("jft", 7),
        ("jft", 14),
    ]
    steps = [setting.count(setting.pretrain("ViT-L/16", x, epochs=n))[0] for x, n in keys]
    assert steps == sorted(steps)
    paper = [
        Setting(PAPER, 1).count(Setting(PAPER, 1).pretrain("ViT-L/16", x, epochs=n))[0]
        for x, n in keys
    ]
    for a, b in itertools.combinations(range(len(keys)), 2):
        assert steps[b] / steps[a] == pytest.approx((paper[b] / paper[a]) ** (1 / 3), rel=0.03)


@SMALL
def test_the_warm_up_is_the_papers_share_of_a_run(scale):
    for task in ("imagenet2012", "cifar10", "oxford_iiit_pet"):
        setting = Setting(scale, 1)
        config = setting.finetune(setting.pretrain("ViT-B/16", "jft"), task)[0].config
        row = recipes.TABLE_4[task]
        steps, warmup = (count_steps(x, 0, 1) for x in (config.duration, config.schedule.warmup))
        assert warmup == pytest.approx(steps * row.warmup_steps / row.steps, abs=0.5)


@SMALL
def test_a_grid_of_patches_grows_in_fine_tuning(scale):
    setting = Setting(scale, 1)
    for model in ("ViT-B/16", "ViT-B/32", "ViT-H/14", "R50+ViT-B/32", "R50+ViT-B/16"):
        start = setting.pretrain(model, "jft")
        runs = [start, *(setting.finetune(start, "imagenet2012", large=x)[0] for x in (0, 1))]
        grids = []
        for run in runs:
            size = run.config.dataset.image_size
            grids.append(models.describe(run.config.model).grid(size, size))
        assert grids == sorted(set(grids))


@SMALL
def test_the_heads_bias_says_that_a_class_is_as_rare_as_in_the_paper(scale):
    bias = Setting(scale, 1).pretrain("ViT-B/16", "jft").config.model.head_bias_init
    # exp(-10) is 0.83 of JFT's 18,291 classes' share.
    assert math.exp(bias) * 10 == pytest.approx(math.exp(-10) * 18_291, abs=0.15)
